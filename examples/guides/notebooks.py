"""The guides as notebooks: made from the scripts, run, kept with outputs.

    KERAS_BACKEND=jax python -m examples.guides.notebooks

writes all to `docs/guides`, or those that are named.
"""

import argparse
import ast
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

SCRIPTS = pathlib.Path(__file__).parent
ROOT = SCRIPTS.parents[1]
NOTEBOOKS = ROOT / "docs/guides"
GUIDES = (
    "finetune_and_pick_a_rank",
    "gpt2_at_every_rank",
    "smollm2_at_every_rank",
    "export_and_serve",
)
HEADER = ("Title", "Authors", "Date created", "Description", "Accelerator")


def header(script):
    """Dict of the fields in the docstring that a script begins with."""
    lines = ast.get_docstring(ast.parse(script)).splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    if tuple(found) != HEADER:
        raise ValueError(
            f"A guide must begin with the fields {HEADER}. "
            f"Received: {tuple(found)}"
        )
    return found


def parts(script):
    """Yields `("markdown", text)` and `("code", text)` after the docstring.

    A string that stands by itself is Markdown, all between two is one cell.
    """
    lines, end = script.splitlines(), 0
    for statement in ast.parse(script).body:
        match statement:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield "code", "\n".join(lines[end : statement.lineno - 1])
                yield "markdown", text
                end = statement.end_lineno
    yield "code", "\n".join(lines[end:])


def notebook(script, name):
    """The notebook of a script that has a name, without outputs."""
    title, *fields = header(script).items()
    fields.append(
        (
            "Run it yourself",
            "download this notebook, or run "
            f"`python -m examples.guides.{name}` in a clone.",
        )
    )
    details = "<br>\n".join(f"**{field}:** {x}" for field, x in fields)
    cells = [nbformat.v4.new_markdown_cell(f"# {title[1]}\n\n{details}")]
    found = [(kind, text.strip()) for kind, text in parts(script)]
    (_, docstring), *found = [part for part in found if part[1]]
    assert docstring.startswith("Title: ")
    for kind, text in found:
        new = {
            "code": nbformat.v4.new_code_cell,
            "markdown": nbformat.v4.new_markdown_cell,
        }[kind]
        cells.append(new(text))
    for i, cell in enumerate(cells):  # random, otherwise
        cell.id = f"cell-{i}"
    kernel = {"name": "python3", "display_name": "Python 3"}
    return nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": {**kernel, "language": "python"}},
    )


def run(found):
    """Runs a notebook in a folder that goes away, and keeps its outputs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            found,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute(env=environment)
    found.metadata["language_info"] = {"name": "python"}
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs = list(filter(_is_kept, cell.outputs))


def _is_kept(output):
    """Whether an output says what the code does; logs go to the terminal."""
    if output.get("name") == "stderr":
        sys.stderr.write(output.text)
        return False
    text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
    for machine in (ROOT, sys.prefix, tempfile.gettempdir(), " at 0x"):
        if str(machine) in text:
            raise ValueError(
                f"An output must be the same on every machine. Received: {text}"
            )
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guides", nargs="*", default=GUIDES, metavar="guide")
    args = parser.parse_args(argv)
    NOTEBOOKS.mkdir(exist_ok=True)
    for name in args.guides:
        found = notebook((SCRIPTS / f"{name}.py").read_text(), name)
        run(found)
        nbformat.write(found, NOTEBOOKS / f"{name}.ipynb")
        print((NOTEBOOKS / f"{name}.ipynb").relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()

"""The guides: scripts that run to their end, and their notebooks."""

import os
import pathlib
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from examples.guides import notebooks  # noqa: E402
from tests import links  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "examples/guides").glob("*.py")
    if path.stem not in ("__init__", "notebooks")
)
every_guide = pytest.mark.parametrize("path", SCRIPTS, ids=lambda x: x.stem)


def lines(text):
    """The lines that aren't blank, nor the border of a string."""
    return [x for x in text.splitlines() if x.strip() not in ("", '"""')]


def text_of(cells):
    return "\n".join(cell.source for cell in cells)


def test_every_guide_becomes_a_notebook():
    assert sorted(notebooks.GUIDES) == [path.stem for path in SCRIPTS]


@every_guide
def test_notebook_holds_the_script(path):
    script = path.read_text()
    found = notebooks.notebook(script, path.stem)
    nbformat.validate(found)
    title, *cells = found.cells
    _, head, body = script.split('"""', 2)
    for line in lines(head):
        assert line.split(": ", 1)[1] in title.source
    # Strings within the code keep their borders.
    assert lines(text_of(cells)) == lines(body)
    assert {cell.cell_type for cell in cells} == {"code", "markdown"}
    for cell in cells:
        if cell.cell_type == "code":
            compile(cell.source, path, "exec")


@every_guide
def test_markdown_is_told_from_code(path):
    cells = notebooks.notebook(path.read_text(), path.stem).cells
    kinds = [cell.cell_type for cell in cells]
    headings = [cell.source.startswith("#") for cell in cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert all(
        kind == "markdown"
        for kind, heading in zip(kinds, headings, strict=True)
        if heading
    )


@every_guide
def test_kept_notebook_is_of_the_script(path):
    kept = nbformat.read(ROOT / f"docs/guides/{path.stem}.ipynb", as_version=4)
    nbformat.validate(kept)
    made = notebooks.notebook(path.read_text(), path.stem)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count for cell in code)
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)


@every_guide
def test_links_lead_to_files(path):
    files = links.relative(path.read_text())
    assert files
    assert all((ROOT / "docs/guides" / x).exists() for x in files)


def test_an_output_of_this_machine_is_refused():
    output = nbformat.v4.new_output("stream", name="stdout", text=str(ROOT))
    with pytest.raises(ValueError, match="the same on every machine"):
        notebooks._is_kept(output)


@pytest.mark.long
@every_guide
def test_script_runs_to_its_end(path, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", f"examples.guides.{path.stem}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.startswith("Keras")

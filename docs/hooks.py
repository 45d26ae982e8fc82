"""What the site makes of the files of the tests: the tables of families."""

import ast
import json
import pathlib
import re

FAMILIES = pathlib.Path(__file__).parents[1] / "tests/families"


def on_page_markdown(markdown, **kwargs):
    """MkDocs calls it with each page; one has the marks."""
    for mark, text in (("families", tables), ("convolutions", convolutions)):
        mark = f"<!-- {mark} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown


def tables():
    """A table of all families, then one of the layers of each."""
    expected = json.loads((FAMILIES / "expected.json").read_text())
    lines = [
        '| family | by default | `"all-linear"` | names by default |',
        "|---|---|---|---|",
    ]
    for name, layers in sorted(expected.items()):
        default = sum(layers["default"].values())
        every = sum(layers["all-linear"].values())
        lines.append(
            f"| [{name}](#{_anchor(name)}) | {default} | {every} "
            f"| {_names(layers['default'])} |"
        )
    for name, layers in sorted(expected.items()):
        lines += ["", f"### {name} {{ #{_anchor(name)} }}", ""]
        lines += ['| layer | by default | `"all-linear"` |', "|---|---|---|"]
        for path, count in layers["all-linear"].items():
            default = layers["default"].get(path, "")
            lines.append(f"| `{path}` | {default} | {count} |")
    return "\n".join(lines)


def convolutions():
    """The families that have nothing to adapt, out of the tests' source."""
    for statement in ast.parse((FAMILIES / "zoo.py").read_text()).body:
        if (
            isinstance(statement, ast.Assign)
            and ast.unparse(statement.targets[0]) == "CONVOLUTIONS"
        ):
            return ", ".join(sorted(ast.literal_eval(statement.value)))
    raise ValueError("tests/families/zoo.py must have CONVOLUTIONS.")


def _anchor(name):
    return "family-" + re.sub(r"\W", "-", name)


def _names(layers):
    """The last parts of paths, each once; or what to do if there is none."""
    found = dict.fromkeys(path.rpartition("/")[2] for path in layers)
    if not found:
        return 'none: name some in `target_layers`, or use `"all-linear"`'
    return ", ".join(f"`{name}`" for name in found)

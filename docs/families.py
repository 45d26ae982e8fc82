"""Writes the tables of the page on families, from the files of the tests.

python docs/families.py
"""

import ast
import json
import pathlib
import re

PAGE = pathlib.Path(__file__).with_suffix(".md")
FAMILIES = pathlib.Path(__file__).parents[1] / "tests/families"


def page(markdown):
    """The page, with the text between its marks made anew."""
    for mark, text in (("families", tables), ("convolutions", convolutions)):
        markdown, found = re.subn(
            f"(<!-- {mark} -->).*?(<!-- end -->)",
            lambda marks, text=text: f"{marks[1]}{text()}{marks[2]}",
            markdown,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"{PAGE} must have the mark {mark} once.")
    return markdown


def tables():
    """A table of all families, then one of the layers of each."""
    expected = json.loads((FAMILIES / "expected.json").read_text())
    lines = [
        "",
        "",
        '| Family | Layers by default | Layers with `"all-linear"` '
        "| Names by default |",
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
        lines += ["", f"### {name}", ""]
        lines += ['| Layer | By default | `"all-linear"` |', "|---|---|---|"]
        for path, count in layers["all-linear"].items():
            default = layers["default"].get(path, "")
            lines.append(f"| `{path}` | {default} | {count} |")
    return "\n".join([*lines, "", ""])


def convolutions():
    """The families of convolutions, out of the tests' source."""
    for statement in ast.parse((FAMILIES / "zoo.py").read_text()).body:
        if (
            isinstance(statement, ast.Assign)
            and ast.unparse(statement.targets[0]) == "CONVOLUTIONS"
        ):
            return ", ".join(sorted(ast.literal_eval(statement.value)))
    raise ValueError("tests/families/zoo.py must have CONVOLUTIONS.")


def _anchor(name):
    """What GitHub and MkDocs make of a heading."""
    return re.sub(r"[^\w-]", "", name)


def _names(layers):
    """The last parts of paths, each once, or what to do if there are none."""
    found = dict.fromkeys(path.rpartition("/")[2] for path in layers)
    if not found:
        return 'none; name layers, or use `"all-linear"`'
    return ", ".join(f"`{name}`" for name in found)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

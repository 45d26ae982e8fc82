"""Tables, as text and for a notebook."""

import io
from html import escape

from rich import box
from rich.console import Console
from rich.table import Table


def table(names, rows, fold=False):
    """A table of text, with numbers on the right; long first cells may fold."""
    found = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(names):
        first = fold and i == 0
        found.add_column(
            name,
            justify="left" if first or not name else "right",
            overflow="fold" if first else "ellipsis",
        )
    for row in rows:
        found.add_row(*row)
    return found


def html(names, rows):
    """The table as HTML, for a notebook."""
    lines = [
        "".join(f"<{tag}>{escape(x)}</{tag}>" for x in cells)
        for tag, cells in [("th", names), *(("td", row) for row in rows)]
    ]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def text(*tables):
    """Returns `rich` tables as plain text."""
    console = Console(
        file=io.StringIO(),
        width=200,
        color_system=None,
        force_jupyter=False,  # otherwise, it would display them
    )
    console.print(*tables, sep="\n")
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())

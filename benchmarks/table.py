"""Medians, ratios, and a result written as Markdown, JSON and a plot."""

import importlib.metadata
import json
import statistics

import numpy as np
from matplotlib.figure import Figure

from benchmarks.competitors import FORWARD
from experiments.markdown import table as markdown


def middle(row, of="seconds"):
    """The median over the rounds of a row."""
    return statistics.median(row[of])


def spread(values):
    """The median and the quartiles of ratios, as cells."""
    low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    return f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def over(row):
    """The ratio of our seconds to those of a row, as one cell."""
    if "ours" not in row:
        return ""
    return "{} ({})".format(*spread(np.divide(row["ours"], row["seconds"])))


def of_rows(columns, rows):
    """A table of rows, by a dict of heading to function of a row."""
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    return markdown(list(columns), lines)


def of_ratios(headings, rows, pairs, keys=("seconds",)):
    """A table of the ratios of two rows in each round.

    Args:
        headings: of the pairs, and of the ratios of each of the keys.
        rows: list of dicts, each with its name as `method`.
        pairs: list of tuples of two names and what the second counts for.
        keys: what of the rows is divided.
    """
    found = {row["method"]: row for row in rows}
    header, lines = [headings[0]], []
    for heading in headings[1:]:
        header += [heading, "quartiles"]
    for a, b, times in pairs:
        line = [f"{a} / {'' if times == 1 else f'{times} × '}{b}"]
        for key in keys:
            ratios = np.divide(found[a][key], found[b][key])
            line += spread(ratios / times)
        lines.append(line)
    return markdown(header, lines)


def write_step_times(args, rows, ratios, memory=False):
    """Writes the times of training steps, and their ratios.

    Args:
        args: what the command was given.
        rows: list of dicts, of `grid.Training` and its like.
        ratios: as the `pairs` of `of_ratios`.
        memory: bool. Whether the rows have `memory` too, in bytes.
    """
    columns = {
        "": lambda row: row["method"],
        "trained parameters": lambda row: (
            ""
            if row["method"].startswith(FORWARD)
            else f"{row['parameters']:,}"
        ),
        "seconds a step": lambda row: f"{middle(row):.3f}",
    }
    headings, keys = ("ratio of step times", "median"), ("seconds",)
    if memory:
        columns["memory, MB"] = lambda row: f"{middle(row, 'memory') / 1e6:.0f}"
        headings = "ratio", "step times", "memory"
        keys = "seconds", "memory"
    write(
        args,
        [of_rows(columns, rows), of_ratios(headings, rows, ratios, keys)],
        {row["method"]: middle(row) for row in rows},
        "seconds a step",
        data=rows,
    )


def write(args, parts, bars=None, unit=None, backends=None, data=None):
    """Prints the parts of a result, and writes them with a plot of its bars.

    Of one backend unless several are named; with data, as JSON too. Returns
    the path of all, without its suffix.
    """
    backends = backends or [args.backend]
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("keras", "keras-hub", *backends)
    )
    title = ", ".join((args.benchmark, args.size, *backends))
    text = "\n\n".join([f"### {title}", versions, *parts]) + "\n"
    print(f"\n{text}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "-".join((args.benchmark, args.size, *backends))
    path.with_suffix(".md").write_text(text)
    if data is not None:
        path.with_suffix(".json").write_text(json.dumps(data, indent=1))
    if bars:
        figure = Figure((7, 0.8 + 0.32 * len(bars)), layout="constrained")
        axes = figure.subplots()
        shown = axes.barh(list(bars), list(bars.values()))
        axes.bar_label(shown, fmt="%.3g", padding=3)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.set_title(title)
        figure.savefig(path.with_suffix(".png"), dpi=150)
    return path

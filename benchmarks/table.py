"""Medians, ratios, and a result written as Markdown and a plot."""

import importlib.metadata
import json
import statistics

import numpy as np
from matplotlib.figure import Figure

median = statistics.median


def spread(values):
    """The median and the quartiles of ratios, as cells."""
    low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    return f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


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

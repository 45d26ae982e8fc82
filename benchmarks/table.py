"""Medians, ratios, and a result written as Markdown and a plot."""

import importlib.metadata
import statistics

import numpy as np

median = statistics.median


def spread(values):
    """The median and the quartiles of ratios, as cells."""
    low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75))
    return f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def write(args, parts, bars, unit):
    """Prints the parts of a result, and writes them with a plot of its bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("keras", "keras-hub", args.backend)
    )
    title = f"{args.benchmark}, {args.size}, {args.backend}"
    text = "\n\n".join([f"### {title}", versions, *parts]) + "\n"
    print(f"\n{text}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.benchmark}-{args.size}-{args.backend}"
    path.with_suffix(".md").write_text(text)
    figure, axes = plt.subplots(
        figsize=(7, 0.8 + 0.32 * len(bars)), layout="constrained"
    )
    shown = axes.barh(list(bars), list(bars.values()))
    axes.bar_label(shown, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)

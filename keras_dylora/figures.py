"""Figures of matplotlib, which is an optional package, and their files."""

import io

import numpy as np

from keras_dylora import files

try:
    from matplotlib import figure, ticker
except ImportError as error:
    raise ImportError(
        "`plot` needs matplotlib: pip install matplotlib"
    ) from error


# How the markers of untrained ranks are filled, by their state.
_HOLLOW = "hollow", {"mfc": "white"}
_UNTRAINED = {
    "base model": _HOLLOW,
    "untrained": _HOLLOW,
    "cut": ("half", {"fillstyle": "bottom", "mfcalt": "white"}),
}


class Figure(figure.Figure):
    """A figure that a notebook shows, as it shows those of pyplot.

    Args:
        size: pair of float. The width and the height in inches.
    """

    def __init__(self, size):
        super().__init__(figsize=size, layout="constrained")

    def _repr_png_(self):
        drawn = io.BytesIO()
        self.savefig(drawn, format="png", bbox_inches="tight")
        return drawn.getvalue()

    def save(self, path):
        """Saves the figure if there is a path, in the format of its ending."""
        if path is not None:
            with files.new_file(path) as beside:
                self.savefig(
                    beside,
                    format=beside.suffix[1:] or "png",
                    bbox_inches="tight",
                )


def curves(reports, metric, rank, label):
    """Plots a metric over the ranks, or over parameters for allocations.

    Args:
        reports: list of pairs of a label and a `RankReport`.
        metric: str.
        rank: the rank of the first report that is marked, or `None`.
        label: str. The name of that rank.

    Raises:
        ValueError: if a report has an allocation and another one has no
            parameters.
    """
    drawn = Figure((6.4, 4.0))
    axes = drawn.subplots()
    by_size = any(report.allocations for _, report in reports)
    for name, report in reports:
        if by_size and report.ranks != list(report.parameters):
            raise ValueError(
                "Beside allocations, every report must have the `parameters` "
                f"of its ranks. Received: {name!r} with "
                f"parameters={report.parameters}"
            )
        mixed = report.allocations
        lines = {
            name: [b for b in report.ranks if b not in mixed],
            f"{name}, a rank for each layer": mixed,
        }
        for title, ranks in lines.items():
            if not ranks:
                continue
            x = [report.parameters[b] if by_size else b for b in ranks]
            y = [report.metrics[b][metric] for b in ranks]
            (line,) = axes.plot(x, y, "o-", label=title)
            for b, *point in zip(ranks, x, y, strict=True):
                if not report.is_trained(b):
                    _, style = _UNTRAINED[report.state(b)]
                    axes.plot(*point, "o", color=line.get_color(), **style)
    _, own = reports[0]
    if rank is not None:
        axes.plot(
            own.parameters[rank] if by_size else rank,
            own.metrics[rank][metric],
            "o",
            ms=14,
            mfc="none",
            mec="black",
            label=f"chosen: rank {label}",
        )
    unit = "trained parameters" if by_size else "rank"
    states = {r.state(b) for _, r in reports for b in r.ranks}
    notes = [f"{how}: {x}" for x, (how, _) in _UNTRAINED.items() if x in states]
    axes.set_xlabel(f"{unit} ({', '.join(notes)})" if notes else unit)
    axes.set_ylabel(metric)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def heat_map(grid, max_rank, title):
    """Plots the ranks of layers by kind and number.

    Args:
        grid: dict of kind to dict of number to rank.
        max_rank: int. The top of the colours.
        title: str.
    """
    drawn = Figure((6.4, 4.0))
    axes = drawn.subplots()
    numbers = sorted(set().union(*grid.values()))
    rows = [[row.get(i, np.nan) for i in numbers] for row in grid.values()]
    image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=max_rank)
    for y, row in enumerate(grid.values()):
        for x, b in ((numbers.index(i), b) for i, b in row.items()):
            color = "white" if b < 0.6 * max_rank else "black"
            axes.text(x, y, b, ha="center", va="center", color=color)
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xlabel("number of the layer")
    axes.set_title(title)
    drawn.colorbar(image, label="rank", shrink=0.6)
    return drawn

"""RankReport: the metrics of one model at many ranks."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keras_dylora import files, tables
from keras_dylora.allocation import Rank, RankAllocation
from keras_dylora.hints import meant
from keras_dylora.reports.directions import direction_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class RankReport:
    """The metrics of one model at many ranks.

    Args:
        metrics: dict of rank to dict of metric name to value. A rank is an
            int or a `RankAllocation`.
        min_rank: int. The lowest rank that was trained. Ranks below it are
            marked as untrained, or as cuts. Defaults to `1`.
        parameters: dict of rank to its number of parameters, including those
            that are trained in full. Defaults to `None`: not known.
        ordered: bool. Whether the columns are ordered, so that a rank below
            `min_rank` is a good cut. Defaults to `False`.
        directions: dict of metric name to `"max"` or `"min"`, whichever is
            better. Defaults to `None`: well-known names decide.
        tuned: list of the ranks whose cut `tune_ranks` tuned. Defaults to `()`.

    Raises:
        ValueError: if there is a `RankAllocation`, and `parameters` lacks a
            rank.

    Example:

    ```python
    report = keras_dylora.evaluate_ranks(clf, val_texts, val_labels)
    print(report)
    report.plot("ranks.png", others={"LoRA 8": lora_report})
    report.metrics[4]["accuracy"]
    ```
    """

    def __init__(
        self,
        # `Any` is a `Rank`, as no `Mapping[int, …]` is a `Mapping[Rank, …]`.
        metrics: Mapping[Any, Mapping[str, float]],
        min_rank: int = 1,
        parameters: Mapping[Any, int] | None = None,
        ordered: bool = False,
        directions: Mapping[str, str] | None = None,
        tuned: Iterable[Any] = (),
    ) -> None:
        by_rank = {_rank(b): values for b, values in metrics.items()}
        known = {_rank(b): size for b, size in (parameters or {}).items()}
        self.allocations = [b for b in by_rank if isinstance(b, RankAllocation)]
        if self.allocations and by_rank.keys() - known.keys():
            raise ValueError(
                "A report with allocations needs the `parameters` of each "
                f"rank. Received: parameters of {list(known)} for ranks "
                f"{list(by_rank)}"
            )
        self.metrics: dict[Rank, dict[str, float]] = {
            b: {name: float(v) for name, v in by_rank[b].items()}
            for b in sorted(
                by_rank, key=known.__getitem__ if self.allocations else None
            )
        }
        self.min_rank = min_rank
        self.ordered = ordered
        self.directions = dict(directions or {})
        self.tuned = [_rank(b) for b in tuned]
        self.parameters: dict[Rank, int] = {
            b: known[b] for b in self.metrics if b in known
        }

    @property
    def ranks(self) -> list[Rank]:
        """list. The evaluated ranks, ascending, with allocations by size."""
        return list(self.metrics)

    @property
    def metric_names(self) -> list[str]:
        """list of str. The names of the metrics, `loss` last."""
        names = list(next(iter(self.metrics.values())))
        return sorted(names, key=lambda name: name == "loss")

    def state(self, rank: Rank) -> str:
        """Returns how a rank came about, as the table says.

        Returns:
            `"trained"`, `"tuned"`, `"cut"`, `"untrained"` or `"base model"`. A
            cut wasn't trained, but the columns are ordered. An allocation that
            isn't tuned has the state of its lowest rank above 0.
        """
        if rank in self.tuned:
            return "tuned"
        ranks: list = [rank]
        if isinstance(rank, RankAllocation):
            ranks = list(rank.values())
        low = min(filter(None, ranks), default=0)
        if low == 0:
            return "base model"
        if low >= self.min_rank:
            return "trained"
        return "cut" if self.ordered else "untrained"

    def is_trained(self, rank: Rank) -> bool:
        """Whether a rank was trained or tuned.

        The base model wasn't, nor was a rank below `min_rank` that isn't tuned.
        """
        return self.state(rank) in ("trained", "tuned")

    def values(self, metric: str) -> list[float]:
        """Returns the values of one metric, in the order of `ranks`.

        Raises:
            ValueError: if there is no such metric.
        """
        if metric not in self.metric_names:
            raise ValueError(
                f"`metric` must be one of {self.metric_names}. "
                f"Received: metric={metric!r}"
                f"{meant(metric, self.metric_names)}"
            )
        return [values[metric] for values in self.metrics.values()]

    def best(
        self,
        metric: str = "loss",
        tolerance: float = 0,
        mode: Literal["auto", "max", "min"] = "auto",
        max_parameters: int | None = None,
    ) -> Rank:
        """Returns the smallest rank within a tolerance of the best one.

        It considers ranks that were trained or tuned, and cuts of ordered
        columns.

        Args:
            metric: str. Name of the metric. Defaults to `"loss"`.
            tolerance: float. How much worse than the best a rank may be, in
                the units of the metric. Defaults to `0`.
            mode: `"max"`, `"min"` or `"auto"`. Whether a high or a low value is
                better. Defaults to `"auto"`: the metric itself decides, or a
                well-known name.
            max_parameters: int. Ranks with more `parameters` are left out.
                Defaults to `None`: none is left out.

        Returns:
            int, or a `RankAllocation` if that is the smallest.

        Raises:
            ValueError: if the metric or the mode is unknown; if the metric
                needs a mode; if the tolerance is negative, or above both 1 and
                all values; or if no trained rank or cut has a finite value and
                few enough parameters.

        Example:

        ```python
        clf.set_rank(report.best("accuracy", tolerance=0.005))
        ```
        """
        if mode not in ("auto", "max", "min"):
            raise ValueError(
                '`mode` must be "auto", "max" or "min". '
                f"Received: mode={mode!r}"
            )
        if not tolerance >= 0:
            raise ValueError(
                "`tolerance` must not be negative. "
                f"Received: tolerance={tolerance!r}"
            )
        values = dict(zip(self.ranks, self.values(metric), strict=True))
        if mode == "auto":
            found = self.directions.get(metric) or direction_of(metric)
            if found is None:
                raise ValueError(
                    'Give `mode="max"` or `mode="min"` for a metric that '
                    f"doesn't say which is better. Received: metric={metric!r}"
                )
            mode = found  # type: ignore[assignment]
        sign = -1 if mode == "min" else 1
        scores = {
            b: sign * value
            for b, value in values.items()
            if self.state(b) in ("trained", "tuned", "cut")
            and math.isfinite(value)
        }
        if not scores:
            found = {b: (self.state(b), value) for b, value in values.items()}
            raise ValueError(
                "A rank that was trained, or cut after `order_ranks`, must "
                f"have a finite {metric!r}. Received: {found}"
            )
        if max_parameters is not None:
            scores = self._within(scores, max_parameters)
        top = max(scores.values())
        if mode == "max" and tolerance > max(top, 1):
            raise ValueError(
                "`tolerance` is in the units of the metric. Received: "
                f"tolerance={tolerance!r}, but no {metric!r} is above {top:.4g}"
            )
        # The slack lets a rank that is exactly the tolerance away pass.
        slack = 1e-9 * max(1.0, abs(top))
        good = [b for b, s in scores.items() if s >= top - tolerance - slack]
        return min(good, key=self.ranks.index)

    def _within(self, scores, max_parameters):
        few = {
            b: score
            for b, score in scores.items()
            if self.parameters.get(b, math.inf) <= max_parameters
        }
        if not few:
            raise ValueError(
                "A rank must have at most `max_parameters`. Received: "
                f"max_parameters={max_parameters!r} for ranks with "
                f"{self.parameters or 'unknown numbers of them'}"
            )
        return few

    def area(self, metric: str) -> float:
        """Returns the mean height of a metric's curve over the ranks.

        It is the area under the curve from rank 1 on, divided by its width, so
        it has the units of the metric. Allocations and rank 0 are left out.

        Raises:
            ValueError: if the metric is unknown or only rank 0 was evaluated.
        """
        points = [
            (b, value)
            for b, value in zip(self.ranks, self.values(metric), strict=True)
            if not isinstance(b, RankAllocation) and b > 0
        ]
        if not points:
            raise ValueError(
                f"The area needs a rank above 0. Received: ranks={self.ranks}"
            )
        b, value = map(np.asarray, zip(*points, strict=True))
        if len(b) == 1:
            return float(value[0])
        return float(np.trapezoid(value, b) / (b[-1] - b[0]))

    def _rows(self):
        """The names of the columns, and the cells of each rank, as shown."""
        names = ["rank", *self.metric_names]
        rows = [
            [_label(b), *(f"{values[n]:.4f}" for n in self.metric_names)]
            for b, values in self.metrics.items()
        ]
        if self.parameters:
            names.append("parameters")
            for b, row in zip(self.ranks, rows, strict=True):
                size = self.parameters.get(b)
                row.append("" if size is None else f"{size:,}")
        states = [self.state(b) for b in self.ranks]
        if set(states) != {"trained"}:
            names.append("")
            for state, row in zip(states, rows, strict=True):
                row.append("" if state == "trained" else state)
        return names, rows

    def __str__(self) -> str:
        return tables.text(tables.table(*self._rows()))

    def _repr_html_(self) -> str:
        return tables.html(*self._rows())

    def to_dataframe(self) -> "pandas.DataFrame":
        """Returns the report as a `pandas.DataFrame`, with a row for each rank.

        Raises:
            ImportError: if pandas isn't installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "`to_dataframe` needs pandas: pip install pandas"
            ) from error
        index = pandas.Index(
            [_label(b) if b in self.allocations else b for b in self.ranks],
            name="rank",
        )
        frame = pandas.DataFrame(list(self.metrics.values()), index=index)
        frame = frame[self.metric_names]
        if self.parameters:
            frame["parameters"] = [self.parameters.get(b) for b in self.ranks]
        frame["trained"] = [self.is_trained(b) for b in self.ranks]
        frame["state"] = [self.state(b) for b in self.ranks]
        return frame

    def __repr__(self) -> str:
        return f"RankReport(ranks={self.ranks}, metrics={self.metric_names})"

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the report as JSON, and writes it to `path` if one is given.

        Returns:
            str: `{"min_rank": 1, "ordered": false, "directions": {"accuracy":
            "max", …}, "tuned": [1], "metrics": {"1": {"accuracy": …}, …},
            "parameters": {"1": …}}`. A value that isn't finite is `null`.
            Allocations are in a list, `{"allocations": [{"ranks": {path: 2,
            …}, "metrics": {…}, "parameters": …, "tuned": false}, …]}`.
        """
        metrics = {
            b: {k: v if math.isfinite(v) else None for k, v in values.items()}
            for b, values in self.metrics.items()
        }
        mixed = {b: metrics.pop(b) for b in self.allocations}
        sizes = self.parameters.items()
        content = {
            "min_rank": self.min_rank,
            "ordered": self.ordered,
            "directions": self.directions,
            "tuned": [b for b in self.tuned if b not in mixed],
            "metrics": metrics,
            "parameters": {b: n for b, n in sizes if b not in mixed},
        }
        if mixed:
            content["allocations"] = [
                {
                    "ranks": b.ranks,
                    "metrics": values,
                    "parameters": self.parameters[b],
                    "tuned": b in self.tuned,
                }
                for b, values in mixed.items()
            ]
        text = json.dumps(content, indent=2)
        if path is not None:
            with files.new_file(path) as beside:
                beside.write_text(text)
        return text

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        metric: str | None = None,
        rank: Rank | None = None,
        others: "Mapping[str, RankReport] | None" = None,
        label: str = "DyLoRA",
    ) -> "Figure":
        """Draws a metric over the ranks and marks the chosen rank.

        Untrained ranks are hollow, and cuts half hollow. With allocations, the
        curve is over the parameters, and the allocations have their own curve.

        Args:
            path: str or path of the picture. Its ending gives the format.
                Defaults to `None`: nothing is written.
            metric: str. Defaults to `None`: the first metric.
            rank: int or `RankAllocation`. The chosen rank. Defaults to `None`:
                `best(metric)`, or none if that raises an error.
            others: dict of label to another `RankReport` to draw, such as that
                of a fixed-rank LoRA. Defaults to `None`.
            label: str. The name of this report. Defaults to `"DyLoRA"`.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ValueError: if the metric is unknown or the rank wasn't evaluated.
            ImportError: if matplotlib isn't installed.
        """
        from keras_dylora import figures

        metric = metric or self.metric_names[0]
        self.values(metric)  # raises if there is no such metric
        if rank is None:
            with contextlib.suppress(ValueError):
                rank = self.best(metric)
        elif rank not in self.metrics:
            raise ValueError(
                f"`rank` must be one of {self.ranks}. Received: rank={rank!r}"
            )
        reports = [(label, self), *(others or {}).items()]
        figure = figures.curves(reports, metric, rank, _label(rank))
        figure.save(path)
        return figure


def _rank(b):
    return b if isinstance(b, RankAllocation) else int(b)


def _label(b):
    return b.label if isinstance(b, RankAllocation) else str(b)

"""Ranks compared: evaluate_ranks and the RankEvaluation callback."""

import collections.abc
from typing import Any

import keras

from keras_dylora import ranks as rank_functions
from keras_dylora import training
from keras_dylora.allocation import Rank, RankAllocation
from keras_dylora.live import sizes
from keras_dylora.live.model import adaptation_of
from keras_dylora.reports.directions import directions_of
from keras_dylora.reports.evaluation_data import EvaluationData
from keras_dylora.reports.report import RankReport


def evaluate_ranks(
    model: keras.Model,
    x: Any,
    y: Any = None,
    ranks: collections.abc.Iterable[Rank] | None = None,
    **evaluate_kwargs: Any,
) -> RankReport:
    """Evaluates a model at every rank, with one compiled function.

    Inputs that the model preprocesses (raw strings) are preprocessed once,
    not once a rank, and as its `fit` does. A metric with several values, such
    as one F1 score for each class, is reported as `f1_score_0`, ….

    Args:
        model: an enabled, compiled model.
        x: inputs, as for `model.evaluate`. An iterator that can be read only
            once isn't enough.
        y: targets, as for `model.evaluate`.
        ranks: ints in `0..config.rank`, and `RankAllocation`s. Ranks below
            `min_rank`, and within `full_rank_steps` those below the maximum,
            are reported as untrained; or as cuts, where the columns are in
            order (`order_ranks`, `from_peft`). Defaults to `None`, all from 1
            to the maximum.
        **evaluate_kwargs: further arguments of `model.evaluate`. `verbose`
            shows a progress bar over the ranks; `steps` is needed for data
            without an end.

    Returns:
        A `RankReport`. The model's rank is what it was.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a rank is out of range, an allocation is of another
            model, the data is empty, has no end or can be read only once,
            targets are missing, or the model isn't enabled or compiled.

    Example:

    ```python
    report = keras_dylora.evaluate_ranks(clf, val_texts, val_labels)
    print(report)
    clf.set_rank(report.best("accuracy", tolerance=0.005))
    ```
    """
    verbose = evaluate_kwargs.pop("verbose", "auto")
    evaluate_kwargs.pop("return_dict", None)
    chosen = _chosen(model, ranks)
    check_compiled(model)
    data = EvaluationData(model, x, y, evaluate_kwargs)
    metrics = data.metrics(model, chosen, verbose)
    training.write_back(model)
    adaptation = adaptation_of(model)
    report = RankReport(
        metrics,
        adaptation.lowest_trained,
        {b: sizes.parameters(model, b) for b in chosen},
        directions=directions_of(model, metrics[chosen[0]]),
        tuned=[b for b in chosen if adaptation.tuned_cut(b) is not None],
    )
    if "untrained" in map(report.state, chosen):
        report.ordered = adaptation.is_ordered
    return report


def check_compiled(model):
    """Raises a `ValueError` where `evaluate` has nothing to tell ranks by."""
    if not model.compiled:
        raise ValueError(
            "The model must be compiled, as its loss is what ranks are chosen "
            f"by. Received: {model.name}, which isn't"
        )


def _chosen(model, ranks):
    """Checked ranks, and allocations of the model, as a report has them."""
    adaptation = adaptation_of(model)
    high = adaptation.max_rank
    if ranks is None:
        return list(range(1, high + 1))
    given = rank_functions.as_list(ranks)
    one_for_all = [b for b in given if not isinstance(b, RankAllocation)]
    allocations = [b for b in given if isinstance(b, RankAllocation)]
    for each in allocations:
        adaptation.by_layer(each)
    chosen = sorted(set(rank_functions.as_ranks(one_for_all, 0, high)))
    chosen += sorted(set(allocations), key=lambda b: b.parameters)
    if not chosen:
        raise ValueError("`ranks` must name a rank. Received: ranks=[]")
    return chosen


class RankEvaluation(keras.callbacks.Callback):
    """Logs the validation metrics of every rank at the end of an epoch.

    They go into the logs as `val_rank4_accuracy`, …, and so into `History`
    and every callback that comes later in the list, such as `CSVLogger`,
    `TensorBoard` or `EarlyStopping`. Callbacks that monitor such a name need
    `mode`, as Keras knows no metric by it. `CSVLogger` has the columns of the
    first epoch, so it needs `every=1`; so does `EarlyStopping`.

    Args:
        data: `(x, y)`, `(x, y, sample_weight)` or a dataset, as
            `validation_data` of `fit`.
        ranks: ints in `0..config.rank`. Defaults to `None`, all from 1 to
            the maximum.
        every: int. Epochs from one evaluation to the next. Defaults to `1`.
        **evaluate_kwargs: further arguments of `model.evaluate`, such as
            `steps` for data without an end, or `batch_size`.

    Raises:
        ValueError: if `every` isn't positive; when training starts, if a
            rank is out of range, the data is empty, or it has no end and
            there are no `steps`.
        TypeError: if `every` or a rank isn't an integer, or the data isn't
            one argument.

    Example:

    ```python
    history = clf.fit(
        texts,
        labels,
        callbacks=[
            keras_dylora.RankEvaluation((val_texts, val_labels)),
            keras.callbacks.EarlyStopping("val_rank2_accuracy", mode="max"),
        ],
    )
    history.history["val_rank1_accuracy"]
    ```
    """

    _ready: Any
    _prepared_for: Any

    def __init__(
        self,
        data: Any,
        ranks: collections.abc.Sequence[int] | None = None,
        every: int = 1,
        **evaluate_kwargs: Any,
    ) -> None:
        super().__init__()
        if hasattr(ranks, "shape"):  # targets
            raise TypeError(
                "The data must be one argument, `(x, y)` or a dataset, and "
                "`ranks` a list of integers. "
                f"Received: ranks={type(ranks)} of shape "
                f"{ranks.shape}"  # type: ignore[union-attr]
            )
        if any(isinstance(b, RankAllocation) for b in ranks or ()):
            raise TypeError(
                "What is logged is named after a rank that is one for all "
                f"layers. Received: ranks={ranks!r}"
            )
        self.data = data
        self.ranks = ranks
        self.evaluate_kwargs = evaluate_kwargs
        self.every = rank_functions.as_rank(every, 1, name="every")
        self._ready = self._prepared_for = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        # On TensorFlow, a subclassed model is built in its first step only.
        if model.built:
            _chosen(model, self.ranks)
        prepared_for = model, getattr(model, "preprocessor", None)
        if self._prepared_for != prepared_for:
            data = self.data
            if not isinstance(data, (tuple, list)):
                data = (data,)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            kwargs = dict(self.evaluate_kwargs)
            if sample_weight is not None:
                kwargs["sample_weight"] = sample_weight
            self._ready = EvaluationData(model, x, y, kwargs)
            self._prepared_for = prepared_for

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if (epoch + 1) % self.every:
            return
        logs = {} if logs is None else logs
        chosen = _chosen(self.model, self.ranks)
        found = self._ready.metrics(self.model, chosen, verbose=0)
        for b, metrics in found.items():
            for name, value in metrics.items():
                logs[f"val_rank{b}_{name}"] = value

"""Comparison of ranks: evaluate_ranks and the RankEvaluation callback."""

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

    Raw strings and other inputs that the model preprocesses are preprocessed
    only once, in the same way as in `fit`. A metric with several values, such
    as one F1 score for each class, is reported as `f1_score_0`, ….

    Args:
        model: an enabled, compiled model.
        x: inputs, as for `model.evaluate`. It can't be an iterator, which can
            be read only once.
        y: targets, as for `model.evaluate`.
        ranks: list of int in `0..config.rank` and `RankAllocation`s. Ranks
            below `min_rank` are reported as untrained. So are those below the
            maximum during `full_rank_steps`. If the columns are ordered
            (`order_ranks`, `from_peft`), they are reported as cuts instead.
            Defaults to `None`: all ranks from 1 to the maximum.
        **evaluate_kwargs: other arguments of `model.evaluate`. `verbose` shows
            a progress bar over the ranks. `steps` is needed for data without an
            end.

    Returns:
        A `RankReport`. The model's rank doesn't change.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a rank is out of range; if an allocation is for another
            model; if the data is empty, has no end or can be read only once; if
            targets are missing; or if the model isn't enabled or compiled.

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
    """Raises a `ValueError` if a model has no loss to compare its ranks by."""
    if not model.compiled:
        raise ValueError(
            "The model must be compiled, as its ranks are compared by its "
            f"loss. Received: {model.name}, which isn't"
        )


def _chosen(model, ranks):
    """The checked ranks and allocations, in the order of a report."""
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

    The metrics go into the logs as `val_rank4_accuracy`, …. So they are in
    `History`, and in every callback that comes later in the list, such as
    `CSVLogger`, `TensorBoard` or `EarlyStopping`. A callback that monitors such
    a name needs `mode`, as Keras knows no metric of this name. `CSVLogger` has
    the columns of the first epoch, so it needs `every=1`. `EarlyStopping` needs
    it too.

    Args:
        data: `(x, y)`, `(x, y, sample_weight)` or a dataset, like
            `validation_data` of `fit`.
        ranks: list of int in `0..config.rank`. Defaults to `None`: all ranks
            from 1 to the maximum.
        every: int. Epochs from one evaluation to the next. Defaults to `1`.
        **evaluate_kwargs: other arguments of `model.evaluate`, such as
            `steps` for data without an end, or `batch_size`.

    Raises:
        ValueError: if `every` isn't positive; or when training starts, if a
            rank is out of range, the data is empty, or it has no end and there
            are no `steps`.
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
                "A logged name has one rank for all layers, so `ranks` can't "
                f"have a `RankAllocation`. Received: ranks={ranks!r}"
            )
        self.data = data
        self.ranks = ranks
        self.evaluate_kwargs = evaluate_kwargs
        self.every = rank_functions.as_rank(every, 1, name="every")
        self._ready = self._prepared_for = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        # On TensorFlow, a subclassed model is built only in its first step.
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

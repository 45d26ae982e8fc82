"""Ranks compared: evaluate_ranks and the RankEvaluation callback."""

import collections.abc
import functools
import importlib.util
import itertools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dylora import ranks as rank_functions
from keras_dylora import summary, training
from keras_dylora.allocation import RankAllocation
from keras_dylora.model import adaptation_of
from keras_dylora.report import RankReport
from keras_dylora.types import Rank


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
            are reported as untrained. Defaults to `None`, all from 1 to the
            maximum.
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
    return data.report(model, chosen, verbose)


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
    high = adaptation.highest
    if ranks is None:
        return list(range(1, high + 1))
    given = rank_functions.as_list(ranks)
    one_for_all = [b for b in given if not isinstance(b, RankAllocation)]
    allocations = [b for b in given if isinstance(b, RankAllocation)]
    for each in allocations:
        rank_functions.by_layer(each, adaptation.layers, high)
    chosen = sorted(set(rank_functions.as_ranks(one_for_all, 0, high)))
    chosen += sorted(set(allocations), key=lambda b: b.parameters)
    if not chosen:
        raise ValueError("`ranks` must name a rank. Received: ranks=[]")
    return chosen


class EvaluationData:
    """Evaluation data that is ready for any number of passes."""

    def __init__(self, model, x, y, evaluate_kwargs):
        self.kwargs = dict(evaluate_kwargs)
        if isinstance(x, collections.abc.Iterator):
            raise ValueError(
                "The data is read once for each rank, so it can't be an "
                f"iterator. Received: x={x!r}"
            )
        if _is_empty(x):
            raise ValueError("The data must not be empty. Received no example")
        steps = self.kwargs.get("steps")
        if steps is None and _is_endless(x):
            raise ValueError(
                "Data without an end needs `steps`, the number of batches to "
                f"evaluate on. Received: {x!r} with steps=None"
            )
        self.preprocessed = getattr(model, "preprocessor", None) is not None
        if self.preprocessed and hasattr(x, "cardinality"):
            x = x if steps is None else x.take(steps)
            x = x.map(model.preprocess_samples).cache()
        elif self.preprocessed:
            sample_weight = self.kwargs.pop("sample_weight", None)
            x, y, self.kwargs["sample_weight"] = _preprocessed(
                model, x, y, sample_weight
            )
        if y is None and _needs_targets(model, x):
            raise ValueError(
                "A model with a loss is evaluated on inputs and targets. "
                "Received: y=None"
            )
        self.x, self.y = x, y

    def batches(self, batch_size):
        """Yields the data once, as `(x, y, sample_weight)` in NumPy.

        Arrays are shuffled, always alike: they may be sorted by class.
        """
        sample_weight = self.kwargs.get("sample_weight")
        if not _is_array(self.x):
            batches = self.x
            if hasattr(self.x, "num_batches"):  # a `keras.utils.PyDataset`
                count = self.x.num_batches
                count = itertools.count() if count is None else range(count)
                batches = (self.x[i] for i in count)
            for batch in batches:
                batch = keras.utils.unpack_x_y_sample_weight(batch)
                yield keras.tree.map_structure(_numpy, batch)
            return
        data = keras.tree.map_structure(_numpy, (self.x, self.y, sample_weight))
        size = len(keras.tree.flatten(self.x)[0])
        order = np.random.default_rng(0).permutation(size)
        for start in range(0, size, batch_size):
            rows = order[start : start + batch_size]
            yield keras.tree.map_structure(
                lambda v, rows=rows: None if v is None else v[rows], data
            )

    def report(self, model, ranks, verbose):
        bar = keras.utils.Progbar(
            len(ranks), verbose=int(verbose != 0), unit_name="rank"
        )
        metrics = {}
        # KerasHub's own `evaluate` would preprocess once more.
        cls = keras.Model if self.preprocessed else type(model)
        for done, b in enumerate(ranks, start=1):
            with model.rank_scope(b):
                found = training.interruptible(
                    model,
                    functools.partial(cls.evaluate, model),
                    (self.x, self.y),
                    {"verbose": 0, "return_dict": True, **self.kwargs},
                )
            metrics[b] = _scalars(found)
            if verbose != 0:
                bar.update(done)
        sizes = {b: summary.parameters(model, b) for b in ranks}
        training.write_back(model)
        return RankReport(metrics, adaptation_of(model).lowest_trained, sizes)


def _needs_targets(model, x):
    """Whether `x` is inputs alone, and the model is compiled for more."""
    return model.compiled and model.loss is not None and _is_array(x)


def _is_array(x):
    """Whether `x` is arrays of examples, and no dataset."""
    arrays = keras.tree.flatten(x)
    return all(isinstance(v, np.ndarray) or ops.is_tensor(v) for v in arrays)


def _is_empty(x):
    if hasattr(x, "cardinality"):  # a `tf.data.Dataset`
        return int(x.cardinality()) == 0
    while isinstance(x, (dict, tuple)) and x:
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return hasattr(x, "__len__") and len(x) == 0


def _is_endless(x):
    if hasattr(x, "cardinality"):  # a `tf.data.Dataset`
        return int(x.cardinality()) == -1
    # A `keras.utils.PyDataset`.
    return hasattr(x, "num_batches") and x.num_batches is None


def _preprocessed(model, x, y, sample_weight):
    """`x, y, sample_weight` as arrays, as KerasHub feeds them to its models.

    That is in a `tf.data` pipeline, or on Python strings where Grain is
    installed. Its tokenizers split some strings otherwise in one than in the
    other.
    """
    # A list is one array, as in `fit`, and not a structure of many.
    y, sample_weight = (
        np.asarray(v) if isinstance(v, list) else v for v in (y, sample_weight)
    )
    if importlib.util.find_spec("grain"):
        x = keras.tree.map_structure(_python_strings, x)
        batches = [model.preprocess_samples(x, y, sample_weight)]
    else:
        import tensorflow as tf

        examples = keras.tree.map_structure(
            lambda v: ops.convert_to_numpy(v) if ops.is_tensor(v) else v,
            keras.utils.pack_x_y_sample_weight(x, y, sample_weight),
        )
        batches = (
            tf.data.Dataset.from_tensor_slices(examples)
            .batch(256)
            .map(model.preprocess_samples)
        )
    batches = [keras.tree.map_structure(_numpy, batch) for batch in batches]
    return keras.utils.unpack_x_y_sample_weight(
        keras.tree.map_structure(lambda *v: np.concatenate(v), *batches)
    )


def _python_strings(x):
    strings = isinstance(x, np.ndarray) and x.dtype.kind in "OSU"
    return x.tolist() if strings else x


def _numpy(x):
    if x is None or isinstance(x, np.ndarray):
        return x
    if ops.is_tensor(x) or not hasattr(x, "numpy"):
        return ops.convert_to_numpy(x)
    return x.numpy()  # a TensorFlow tensor, whatever the backend


def _scalars(metrics):
    """The metrics, with one entry for each value of those that have many."""
    found = {}
    for name, value in metrics.items():
        values = np.ravel(value)
        if np.ndim(value) == 0:
            found[name] = float(value)
        else:
            found |= {f"{name}_{i}": float(v) for i, v in enumerate(values)}
    return found


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
        report = self._ready.report(self.model, chosen, verbose=0)
        for b, metrics in report.metrics.items():
            for name, value in metrics.items():
                logs[f"val_rank{b}_{name}"] = value

"""EvaluationData: the data of `evaluate`, which can be read many times."""

import collections.abc
import functools
import importlib.util
import itertools

import keras
import numpy as np
from keras import ops

from keras_dylora import training
from keras_dylora.live.model import adaptation_of


class EvaluationData:
    """Evaluation data that is ready to be read any number of times."""

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
        """Yields the data once, as batches `(x, y, sample_weight)` in NumPy.

        Arrays are shuffled, as they may be sorted by class; the order is the
        same each time.
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
        size = len(keras.tree.flatten(data)[0])
        order = np.random.default_rng(0).permutation(size)
        for start in range(0, size, batch_size):
            rows = order[start : start + batch_size]
            yield keras.tree.map_structure(
                lambda v, rows=rows: None if v is None else v[rows], data
            )

    def metrics(self, model, ranks, verbose):
        """Dict of rank to dict of metric name to value."""
        bar = keras.utils.Progbar(
            len(ranks), verbose=int(verbose != 0), unit_name="rank"
        )
        metrics = {}
        # KerasHub's own `evaluate` would preprocess the data again.
        cls = keras.Model if self.preprocessed else type(model)
        for done, b in enumerate(ranks, start=1):
            with adaptation_of(model).at(b):
                found = training.interruptible(
                    model,
                    functools.partial(cls.evaluate, model),
                    (self.x, self.y),
                    {"verbose": 0, "return_dict": True, **self.kwargs},
                )
            metrics[b] = _scalars(found)
            if verbose != 0:
                bar.update(done)
        return metrics


def cycled(model, x, y, sample_weight, batch_size, steps):
    """Yields the first `steps` batches in NumPy, over and over.

    Raises what `EvaluationData` raises, at once.
    """
    kwargs = {"steps": steps}
    if sample_weight is not None:
        kwargs["sample_weight"] = sample_weight
    data = EvaluationData(model, x, y, kwargs)
    return itertools.cycle(itertools.islice(data.batches(batch_size), steps))


def _needs_targets(model, x):
    """Whether `x` has no targets, and the model is compiled for some."""
    return model.compiled and model.loss is not None and _is_array(x)


def _is_array(x):
    """Whether `x` is arrays of examples, not a dataset.

    The arrays can be those of NumPy, pandas or SciPy (sparse), or tensors of
    any backend.
    """
    kinds = ("__array__", "tocoo")
    return all(any(hasattr(v, k) for k in kinds) for v in keras.tree.flatten(x))


def _is_empty(x):
    if hasattr(x, "cardinality"):  # a `tf.data.Dataset`
        return int(x.cardinality()) == 0
    if isinstance(x, (dict, tuple)) or _is_array(x):
        x = next(iter(keras.tree.flatten(x)), ())
    if hasattr(x, "shape"):
        return x.shape[:1] == (0,)
    return hasattr(x, "__len__") and len(x) == 0


def _is_endless(x):
    if hasattr(x, "cardinality"):  # a `tf.data.Dataset`
        return int(x.cardinality()) == -1
    # A `keras.utils.PyDataset`.
    return hasattr(x, "num_batches") and x.num_batches is None


def _preprocessed(model, x, y, sample_weight):
    """`x, y, sample_weight` as arrays, as KerasHub feeds them to its models.

    KerasHub uses a `tf.data` pipeline, or Python strings if Grain is installed.
    Its tokenizers split some strings differently in the two.
    """
    # As in `fit`, a list is one array, not a structure of many.
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
    if hasattr(x, "tocoo"):  # a sparse array of SciPy
        return x.toarray()
    return ops.convert_to_numpy(x) if ops.is_tensor(x) else np.asarray(x)


def _scalars(metrics):
    """The metrics, with one entry for each value of a metric with several."""
    found = {}
    for name, value in metrics.items():
        values = np.ravel(value)
        if np.ndim(value) == 0:
            found[name] = float(value)
        else:
            found |= {f"{name}_{i}": float(v) for i, v in enumerate(values)}
    return found

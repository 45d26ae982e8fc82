"""Whether a high or a low metric is better, by the metric or its name."""

import re

from keras_dylora import _keras

# Words in the names of metrics and losses, by what is better.
LOW = {
    "cosh", "crossentropy", "divergence", "entropy", "error", "false", "hinge",
    "logcosh", "loss", "mae", "mape", "mse", "msle", "perplexity", "poisson",
    "rmse",
}  # fmt: skip
HIGH = {
    "acc", "accuracy", "auc", "bleu", "cider", "correlation", "f1", "fbeta",
    "iou", "matthews", "meteor", "nist", "pearson", "precision", "r2",
    "recall", "rouge", "sensitivity", "spearman", "specificity", "true",
}  # fmt: skip


def direction_of(name):
    """`"max"`, `"min"`, or `None` if the name says neither or both."""
    name = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()
    words = set(re.split(r"[\W_]+", name))
    low, high = bool(words & LOW), bool(words & HIGH)
    return None if low == high else "min" if low else "max"


def directions_of(model, names):
    """Dict of metric name to direction, for metrics with a known direction.

    The names are those in `evaluate`, where a metric with several values has a
    number at the end of its name.
    """
    known = {
        name: direction or direction_of(kind)
        for name, kind, direction in _keras.metric_directions(model)
    }
    found = {n: known.get(n, known.get(re.sub(r"_\d+$", "", n))) for n in names}
    return {name: direction for name, direction in found.items() if direction}

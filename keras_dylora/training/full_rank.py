"""Steps at the full rank, and the order of the columns at their end.

The columns `down @ turn` and the rows `inverse(turn) @ up` have the same
product. The optimizer's state for them turns too (`slots.py`).
"""

import dataclasses

import numpy as np
from keras import ops

from keras_dylora.training import slots


def at_full_rank(adaptation):
    """Whether the steps of a model are still at the full rank."""
    if not adaptation.config.full_rank_steps:
        return False
    return bool(ops.convert_to_numpy(adaptation.full_rank))


def order_columns(model, optimizer, scale=None):
    """Orders the columns of a model's adapters, and ends its full-rank steps.

    The variables must be up to date. The optimizer's state turns with the
    columns, unless the optimizer is `None`. With another `Scale`, the rows are
    scaled so that the product at the maximum rank of each layer stays the same.

    Returns whether any adapter has columns to order; an adapter that was never
    trained has none. Raises a `ValueError` if training has diverged.
    """
    adaptation = model._dylora
    layers = adaptation.layers.values()
    whole = {path: x.factors() for path, x in adaptation.layers.items()}
    diverged = [
        path
        for path, x in whole.items()
        if not (np.isfinite(x.down).all() and np.isfinite(x.up).all())
    ]
    if diverged:
        raise ValueError(
            "Adapters must be finite to be ordered. "
            f"Received: NaN or infinity at {diverged}"
        )
    found = [_rescaled(*factors.ordered(), scale) for factors in whole.values()]
    fresh = {} if optimizer is None else slots.unknown(optimizer)
    turns, ordered = {}, {p: x for p, (x, *_) in zip(whole, found, strict=True)}
    cuts = [_turned(cut, whole, ordered) for cut in adaptation.named.cuts]
    for layer, (factors, turn, back, ratio) in zip(layers, found, strict=True):
        layer.down.assign(factors.down)
        layer.up.assign(factors.up)
        turns[id(layer.down)] = turn, back.T, 1
        turns[id(layer.up)] = back.T * ratio, turn / ratio, 0
    if optimizer is not None:
        slots.turn(optimizer, fresh, turns)
    adaptation.set_tuned_cuts(cuts)
    if adaptation.config.full_rank_steps:
        adaptation.full_rank.assign(0)
    return any(np.any(factors.up) for factors, *_ in found)


def _rescaled(factors, turn, back, scale):
    """The result of `Factors.ordered` for a `Scale`, and the scales' ratio."""
    ratio = factors.scale / scale.at(factors.rank) if scale else 1.0
    up = factors.up * np.float32(ratio)
    return dataclasses.replace(factors, up=up), turn, back, ratio


def _turned(cut, before, after):
    """A `TunedCut` of the same mixtures, for columns in another order.

    `before` and `after` are dicts of path to `Factors`. A cut may use a column
    of `down` even if its row of `up` is zero. So columns and rows are matched
    separately.
    """

    def left(path, x):
        down, own = after[path].down, np.zeros_like(x)
        columns = down.shape[1]
        mixed = before[path].down.astype("float64") @ x[:columns]
        own[:columns] = np.linalg.lstsq(down, mixed)[0]
        return own

    def right(path, x):
        up, own = after[path].up, np.zeros_like(x)
        columns = len(up)
        mixed = x[:, :columns] @ before[path].up.astype("float64")
        own[:, :columns] = np.linalg.lstsq(up.T, mixed.T)[0].T
        return own

    return cut.mapped(left, right)

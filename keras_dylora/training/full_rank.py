"""Steps at the full rank first, and the order of the columns at their end.

The columns `down @ turn` and rows `inverse(turn) @ up` have the same product.
What an optimizer keeps for them turns too (`slots.py`).
"""

import numpy as np
from keras import ops

from keras_dylora.training import slots


def at_full_rank(adaptation):
    """Whether the steps of a model are at the full rank still."""
    if not adaptation.config.full_rank_steps:
        return False
    return bool(ops.convert_to_numpy(adaptation.full_rank))


def order_columns(model, optimizer):
    """Orders the columns of the adapters of a model, and ends its full rank.

    The variables must be up to date. What the optimizer keeps turns with them,
    unless it is `None`. Returns whether an adapter has columns to order: one
    that was never trained has none. Raises a `ValueError` if training has
    diverged.
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
    found = [factors.ordered() for factors in whole.values()]
    fresh = {} if optimizer is None else slots.unknown(optimizer)
    turns, ordered = {}, {p: x for p, (x, *_) in zip(whole, found, strict=True)}
    cuts = [_turned(cut, whole, ordered) for cut in adaptation.named.cuts]
    for layer, (factors, turn, back) in zip(layers, found, strict=True):
        layer.down.assign(factors.down)
        layer.up.assign(factors.up)
        turns[id(layer.down)] = turn, back.T, 1
        turns[id(layer.up)] = back.T, turn, 0
    if optimizer is not None:
        slots.turn(optimizer, fresh, turns)
    adaptation.set_tuned_cuts(cuts)
    if adaptation.config.full_rank_steps:
        adaptation.full_rank.assign(0)
    return any(np.any(factors.up) for factors, *_ in found)


def _turned(cut, before, after):
    """A `TunedCut` of the same mixtures, of columns in another order.

    Of what is before and after, a dict of path to `Factors`. A column of
    `down` may be of use to a cut though its row of `up` is zero, so columns
    and rows are matched apart.
    """

    def left(path, x):
        mixed = before[path].down.astype("float64") @ x
        return np.linalg.lstsq(after[path].down, mixed)[0].astype("float32")

    def right(path, x):
        mixed = x @ before[path].up.astype("float64")
        found = np.linalg.lstsq(after[path].up.T, mixed.T)[0].T
        return found.astype("float32")

    return cut.mapped(left, right)

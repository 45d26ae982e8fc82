"""Steps at the full rank first, and the order of the columns at their end.

The columns `down @ turn` and rows `inverse(turn) @ up` have the same product.
What an optimizer keeps for them turns too (`slots.py`).
"""

import math
import warnings

import keras
import numpy as np
from keras import ops

from keras_dylora.cuts import users_line
from keras_dylora.layers.factors import float32_array
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


class OrderAfterFullRank(keras.callbacks.Callback):
    """Ends the full-rank steps of a run at the right one.

    Their number may be a share of all steps, which `fit` knows, as it does
    those of a `ProgressiveDecay`.

    That is after the last batch of them, or of the compiled function that
    `steps_per_execution` makes of several. The place of a model in its
    sequence is read only when it may be there: that waits for the device.
    """

    def __init__(self, write_back, decays):
        super().__init__()
        self._write_back, self._decays = write_back, decays

    def on_train_begin(self, logs=None):
        self._batches = 0  # that can't be the last
        self._unordered = set()  # digests of the columns before the order
        self._order_at = None  # the place in the rank sequence

    def on_epoch_begin(self, epoch, logs=None):
        if self._order_at is None:
            self._order_at = self._found_order(epoch)

    def _found_order(self, epoch):
        """Where the order comes; tells schedules too.

        By the first epoch of a `fit`, after which it may go on.
        """
        wanted = self.model._full_rank_steps
        is_share = isinstance(wanted, float)
        if not self._decays and not is_share:
            return wanted
        steps = (self.params or {}).get("steps")
        if steps is None:
            raise ValueError(
                "`fit` must know how many batches an epoch has, for a share of "
                "the steps and for `ProgressiveDecay`. Give "
                "`steps_per_epoch`, or numbers of steps. Received: "
                f"full_rank_steps={wanted}, and data of unknown length"
            )
        self._write_back(self.model)
        total, done = steps * self.params["epochs"], steps * epoch
        begin = self._drawn() - done
        order = begin + round(wanted * total) if is_share else wanted
        comes = wanted and (epoch or self._at_full_rank())
        self._decays.tell(total, order - begin if comes else None, done)
        return order

    def on_train_batch_end(self, batch, logs=None):
        self._batches -= 1
        if self._batches > 0:
            return
        if self._at_full_rank():
            left = self._left()
            if left > 0:
                self._batches = math.ceil(left / self.model.steps_per_execution)
                return
            order_columns(self.model, self.model.optimizer)
        self._batches = math.inf  # not read again in this run

    def on_epoch_end(self, epoch, logs=None):
        if self._batches < math.inf:
            self._write_back(self.model)
            self._unordered.add(self._digest())

    def order_what_came_back(self):
        """Orders columns of before the order, which a callback put back.

        Once all callbacks have ended. The optimizer keeps what it has: that is
        of the ordered ones already.
        """
        if (
            not self._unordered
            or self._at_full_rank()
            or self._digest() not in self._unordered
        ):
            return
        order_columns(self.model, None)
        warnings.warn(
            "The columns of adapters must be in order after `full_rank_steps`, "
            "so they were put in order again. Received: weights of before the "
            "order, restored by a callback such as `EarlyStopping`",
            stacklevel=users_line(),
        )

    def on_train_end(self, logs=None):
        if self._at_full_rank():
            warnings.warn(
                "Lower ranks are trained after `full_rank_steps`, so this run "
                "has trained the maximum alone. Train longer, or use "
                "`order_ranks`. Received: full_rank_steps="
                f"{self.model._dylora.config.full_rank_steps}, of which "
                f"{self._left()} are left",
                stacklevel=2,
            )

    def _at_full_rank(self):
        if not hasattr(self.model, "_dylora"):
            return True  # on TensorFlow, built in its first step only
        self._write_back(self.model)
        return at_full_rank(self.model._dylora)

    def _digest(self):
        layers = self.model._dylora.layers.values()
        columns = [float32_array(v) for x in layers for v in (x.down, x.up)]
        return hash(b"".join(x.tobytes() for x in columns))

    def _drawn(self):
        if not hasattr(self.model, "_dylora"):
            return 0
        return int(ops.convert_to_numpy(self.model._dylora.ranks_drawn))

    def _left(self):
        return self._order_at - self._drawn()

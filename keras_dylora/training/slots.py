"""The state that optimizers keep for an adapter, when its columns turn.

`columns @ own` are the new columns, and `gradients @ dual` are their gradients.
A mean of squares turns by the squares of the entries.
"""

import warnings

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.layers.factors import float32_array


def _gradients(x, own, dual):
    return x @ dual


def _squares(x, own, dual):
    return x @ dual**2


def _norms(x, own, dual):
    return np.sqrt(x**2 @ dual**2)


def _weights(x, own, dual):
    return x @ own


def _steps(x, own, dual):
    return x @ own**2


def _anew(x, own, dual):
    return np.zeros_like(x)


# How the slots of each optimizer turn. A momentum of steps starts anew, as the
# lengths of steps don't follow those of gradients.
_EVERY = {"average": _weights, _keras.optimizers.ACCUMULATOR: _gradients}
_ADAM = {"momentum": _gradients, "velocity": _squares, "velocity_hat": _squares}
_KINDS = {
    "SGD": _ADAM,
    "Lion": _ADAM,
    "Muon": _ADAM,
    "Adam": _ADAM,
    "Nadam": _ADAM,
    "Lamb": _ADAM,
    "Adafactor": _ADAM,
    "Adamax": {"momentum": _gradients, "norm": _norms},
    "RMSprop": {
        "velocity": _squares,
        "momentum": _anew,
        "average_gradient": _anew,
    },
    "Adagrad": {"accumulator": _squares},
    "Adadelta": {
        "accumulated_grad": _squares,
        "accumulated_delta_var": _steps,
    },
    "Ftrl": {"accumulator": _squares, "linear": _anew},  # see `_linear`
    "ScheduleFreeAdamW": {"momentum": _weights, "velocity": _squares},
}


def unknown(optimizer):
    """The parts of an optimizer whose slots can't be turned.

    Warns about each part. Returns a dict of each to a fresh copy without state.
    The copy is made now, as an optimizer may be unable to make one.
    """
    found = {}
    for part in _keras.optimizers.optimizer_parts(optimizer):
        kinds = {kind for _, _, kind in _slots(part)}
        if not kinds <= _kinds_of(part).keys():
            found[part] = _keras.optimizers.fresh_optimizer(part)
            warnings.warn(
                "The optimizer's state must turn with the columns that are "
                "put in order. For optimizers that aren't Keras's own, it "
                f"starts anew. Received: {part!r}, which keeps {sorted(kinds)}",
                stacklevel=4,
            )
    return found


def turn(optimizer, fresh, turns):
    """Turns the slots of adapters that have turned.

    `fresh` is what `unknown` returned before. `turns` is a dict of the id of an
    adapter to `own`, `dual` and the axis of its columns.
    """
    for part in _keras.optimizers.optimizer_parts(optimizer):
        if part in fresh:
            fresh[part].build(_keras.optimizers.built_for(part))
            pairs = zip(_slots(part), _slots(fresh[part]), strict=True)
            initial = {id(slot): new for (slot, *_), (new, *_) in pairs}
        kinds = _kinds_of(part)
        start = getattr(part, "initial_accumulator_value", 0.0)
        for slot, owner, kind in _slots(part):
            if id(owner) not in turns:
                continue
            own, dual, axis = turns[id(owner)]
            columns = _columns(slot, axis)
            if part in fresh and kind not in _EVERY:
                columns = _columns(initial[id(slot)], axis)
            elif kind == "accumulator":
                columns = start + kinds[kind](columns - start, own, dual)
                accumulator = columns
            elif kind == "linear":
                columns = _linear(part, _columns(owner, axis), accumulator)
            else:
                columns = kinds[kind](columns, own, dual)
            slot.assign(np.moveaxis(columns, -1, axis))
        for owner, *means in _keras.optimizers.factored_slots(part):
            if id(owner) in turns:
                own, dual, axis = turns[id(owner)]
                means[axis].assign(
                    _squares(float32_array(means[axis]), own, dual)
                )


def _slots(optimizer):
    """The slots of an optimizer, each with its owner and its kind in Keras.

    Only slots in the shape of their owner count.
    """
    for slot, owner in _keras.optimizers.optimizer_slots(optimizer, True):
        if slot.shape == owner.shape:
            kind = slot.name.removeprefix(_keras.optimizers.slot_prefix(owner))
            yield slot, owner, kind


def _kinds_of(optimizer):
    for name, kinds in _KINDS.items():
        if isinstance(optimizer, getattr(keras.optimizers, name, ())):
            return kinds | _EVERY
    return _EVERY


def _columns(variable, axis):
    return np.moveaxis(float32_array(variable), axis, -1)


def _linear(optimizer, weights, accumulator):
    """The `Ftrl` slot from which these weights are computed."""
    rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    l1 = optimizer.l1_regularization_strength
    l2 = optimizer.l2_regularization_strength + optimizer.beta / (2 * rate)
    power = -optimizer.learning_rate_power
    quadratic = accumulator**power / rate + 2 * l2
    return -weights * quadratic - np.sign(weights) * l1

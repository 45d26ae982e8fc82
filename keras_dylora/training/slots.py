"""What optimizers keep for an adapter, as its columns turn.

`columns @ own` are the new columns, and `gradients @ dual` their gradients. A
mean of squares turns by the squares of the entries.
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


# How the slots of each optimizer turn. A momentum of steps, whose lengths
# don't follow the gradients', begins anew.
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
    """The optimizers in one whose slots of adapters aren't known to turn.

    Warns of each. Returns a dict of them to the same without its state, which
    an optimizer may not be able to make.
    """
    found = {}
    for part in _keras.optimizers.optimizer_parts(optimizer):
        kinds = {kind for _, _, kind in _slots(part)}
        if not kinds <= _kinds_of(part).keys():
            found[part] = _keras.optimizers.fresh_optimizer(part)
            warnings.warn(
                "What an optimizer keeps turns with the columns that are put "
                "in order. How is known of Keras's own; any other begins "
                f"anew. Received: {part!r}, which keeps {sorted(kinds)}",
                stacklevel=4,
            )
    return found


def turn(optimizer, fresh, turns):
    """Turns the slots of adapters that have turned.

    Takes what `unknown` returned before, and a dict of the ids of adapters to
    `own`, `dual`, and the axis of the columns.
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
    """The slots of an optimizer, each with its owner and what Keras calls it.

    Those in the shape of their owners.
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
    """The slot from which `Ftrl` computes these weights."""
    rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    l1 = optimizer.l1_regularization_strength
    l2 = optimizer.l2_regularization_strength + optimizer.beta / (2 * rate)
    power = -optimizer.learning_rate_power
    quadratic = accumulator**power / rate + 2 * l2
    return -weights * quadratic - np.sign(weights) * l1

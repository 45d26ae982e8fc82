"""NamedAdapters: several adapters on one base, of which one is live."""

import dataclasses
import json

import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.geometry import float32_array
from keras_dylora.trained import head_weights

DEFAULT = "default"
# What a file of weights has of the adapters that aren't live.
STORE = "adapters"


def check_name(name):
    """Raises a `TypeError` or `ValueError` for what names no adapter."""
    if not isinstance(name, str):
        raise TypeError(
            "The name of an adapter must be a string. "
            f"Received: name={name!r} (of type {type(name).__name__})"
        )
    if not name:
        raise ValueError("The name of an adapter mustn't be empty.")


@dataclasses.dataclass
class _Kept:
    """An adapter that isn't live, and where its training stopped.

    Args:
        values: list of tensors, of the adapters and what is trained besides.
        limit: int. Its rank, or `None`, the model's maximum.
        ranks: list of int, at which the layers compute.
        state: list of tensors, of its place in the rank sequence.
        optimizer: the one that trained it, or `None`.
        slots: list of tensors, what that kept.
    """

    values: list
    limit: int | None
    ranks: list
    state: list
    optimizer: object = None
    slots: list | tuple = ()


class NamedAdapters:
    """The adapters of a model by name: one in its variables, others beside.

    To change it is to assign values, so nothing is traced again, and a step
    knows of no other. Each has its own head, rank up to the maximum, place in
    the rank sequence and optimizer state.
    """

    def __init__(self, adaptation):
        self.adaptation = adaptation
        self.active = DEFAULT
        self.limit = None  # the rank of the live one, if below the maximum
        self._kept = {DEFAULT: None}  # `None` is in the variables
        self._variables = []  # what each has of its own, once there are two

    @property
    def names(self):
        return list(self._kept)

    @property
    def highest(self):
        """int. The highest rank of the live one."""
        return self.rank_of(self.active)

    def rank_of(self, name):
        """int. The highest rank of one."""
        kept = self._kept[name]
        limit = self.limit if kept is None else kept.limit
        return limit or self.adaptation.config.rank

    @property
    def is_plain(self):
        """Whether there is but one, as before there were names."""
        return self.names == [DEFAULT] and self.limit is None

    def add(self, name):
        """Makes a fresh one live, with the head of the one that was."""
        self.check_free(name)
        if len(self._kept) == 1:
            self._variables = self._own_variables()
        values = _copies(self._variables)
        for i, layer in enumerate(self.adaptation.layers.values()):
            values[2 * i] = layer.down_initializer(layer.down.shape)
            values[2 * i + 1] = layer.up_initializer(layer.up.shape)
        ranks = [self.adaptation.config.rank] * len(self.adaptation.layers)
        state = [
            np.full(v.shape, name == "full_rank")
            for name, v in self.adaptation.state.items()
        ]
        self._change(name, _Kept(values, None, ranks, state))

    def check_free(self, name):
        """Raises what `check_name` does, or if there is one of the name."""
        check_name(name)
        if name in self._kept:
            raise ValueError(
                "The name of a new adapter must be free; `delete_adapter` "
                f"frees it. Received: name={name!r} beside {self.names}"
            )

    def activate(self, name):
        """Makes another one live."""
        self._check_known(name)
        if name != self.active:
            self._change(name, self._kept[name])

    def delete(self, name):
        """Forgets one that isn't live."""
        self._check_known(name)
        if name == self.active:
            raise ValueError(
                "The active adapter can't be deleted: `set_adapter` another "
                f"one first. Received: name={name!r} of {self.names}"
            )
        del self._kept[name]

    def rename(self, name):
        """Gives the live one another name."""
        self._kept = {
            name if old == self.active else old: kept
            for old, kept in self._kept.items()
        }
        self.active = name

    def check_alone(self, change):
        """Raises a `ValueError` if a change would leave others behind."""
        if len(self._kept) > 1 or self.limit is not None:
            raise ValueError(
                f"{change} needs a model with one adapter, of its maximum "
                f"rank. Received: adapters {self.names}, of which "
                f"{self.active!r} has rank {self.highest} of "
                f"{self.adaptation.config.rank}"
            )

    def _check_known(self, name):
        if name not in self._kept:
            raise ValueError(
                "The name must be that of an adapter of the model. "
                f"Received: name={name!r}, which isn't one of {self.names}"
            )

    def _change(self, name, kept):
        before = self._live()
        try:
            self._put(kept)
        except BaseException:
            self._put(before)
            raise
        self._kept |= {self.active: before, name: None}
        self.active = name

    def _live(self):
        optimizer = self._optimizer()
        return _Kept(
            _values(self._variables),
            self.limit,
            list(self.adaptation.ranks.values()),
            _values(self.adaptation.state.values()),
            optimizer,
            _values(_slots(optimizer)),
        )

    def _put(self, kept):
        _replace(self._variables, kept.values)
        self.limit = None  # the ranks are within the new one
        layers = self.adaptation.layers
        self.adaptation.set_ranks(dict(zip(layers, kept.ranks, strict=True)))
        self.limit = kept.limit
        _replace(self.adaptation.state.values(), kept.state)
        optimizer, slots = self._optimizer(), kept.slots
        if optimizer is not None and kept.optimizer is not optimizer:
            fresh = _keras.fresh_optimizer(optimizer)
            fresh.build(self.adaptation.model.trainable_variables)
            slots = _values(_slots(fresh))
        if optimizer is not None:
            _replace(_slots(optimizer), slots)

    def _own_variables(self):
        model, layers = self.adaptation.model, self.adaptation.layers.values()
        adapters = [v for x in layers for v in (x.down, x.up)]
        return [*adapters, *head_weights(model).values()]

    def _optimizer(self):
        """The optimizer, once it has a state."""
        optimizer = getattr(self.adaptation.model, "optimizer", None)
        return optimizer if optimizer is not None and optimizer.built else None

    # In a file, with the model's own weights. An optimizer's state is that of
    # the live one alone.

    def save(self, store):
        """Puts what isn't in the variables into a store of arrays."""
        if self.is_plain:
            return
        kept = [(name, x) for name, x in self._kept.items() if x is not None]
        content = {
            "names": self.names,
            "active": self.active,
            "limit": self.limit,
            "kept": [
                {"name": name, "limit": x.limit, "ranks": x.ranks}
                for name, x in kept
            ],
        }
        encoded = json.dumps(content).encode()
        store[STORE] = np.frombuffer(encoded, "uint8")
        for i, (_, x) in enumerate(kept):
            for j, value in enumerate([*x.values, *x.state]):
                store[f"{STORE}_{i}_{j}"] = float32_array(value)

    def load(self, stored):
        """Takes what `save` put there out of a dict of arrays."""
        if STORE not in stored:
            return
        content = json.loads(bytes(np.asarray(stored.pop(STORE))))
        variables, kept = self._own_variables(), dict.fromkeys(content["names"])
        own = [*variables, *self.adaptation.state.values()]
        for i, x in enumerate(content["kept"]):
            names = [f"{STORE}_{i}_{j}" for j in range(len(own))]
            values = [stored.pop(name, None) for name in names]
            shapes = [None if v is None else tuple(v.shape) for v in values]
            wanted = [tuple(v.shape) for v in own]
            if shapes != wanted:
                raise ValueError(
                    "The adapters of a file must fit the model. Received: "
                    f"adapter {x['name']!r} of shapes {shapes}, must be "
                    f"{wanted}"
                )
            values = [ops.convert_to_tensor(np.asarray(v)) for v in values]
            size = len(variables)
            kept[x["name"]] = _Kept(
                values[:size], x["limit"], x["ranks"], values[size:]
            )
        self._variables = variables
        self._kept, self.active = kept, content["active"]
        self.limit = content["limit"]


def _slots(optimizer):
    return [] if optimizer is None else _keras.optimizer_state(optimizer)


def _copies(variables):
    return [ops.copy(ops.convert_to_tensor(v)) for v in variables]


def _values(variables):
    return [_keras.own_value(v) for v in variables]


def _replace(variables, values):
    for variable, value in zip(variables, values, strict=True):
        _keras.replace_value(variable, value)

"""NamedAdapters: several adapters on one base, one of which is live."""

import dataclasses
import json

import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.hints import meant
from keras_dylora.layers.factors import float32_array
from keras_dylora.layers.tuned import TunedCut

DEFAULT = "default"
# Keys in a file of weights: the adapters that aren't live, the tuned cuts of
# all adapters, and a tuning that was interrupted.
STORE = "adapters"
TUNED = "tuned"
TUNING = "tuning"


def check_name(name):
    """Raises a `TypeError` or `ValueError` if a name isn't valid."""
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
        values: dict of path to tensor. Everything that belongs to the adapter.
        limit: int or `None`. The maximum rank; `None` is that of the model.
        ranks: list of int. The ranks that the layers compute at.
        cuts: list of `TunedCut`.
        state: list of tensors. The place in the rank sequence.
        optimizer: the optimizer that trained the adapter, or `None`.
        slots: list of tensors. The state of that optimizer.
    """

    values: dict
    limit: int | None
    ranks: list
    cuts: list
    state: list
    optimizer: object = None
    slots: list | tuple = ()


class NamedAdapters:
    """The adapters of a model by name: one in its variables, others beside.

    To make another one live, its values are assigned to the variables. So
    nothing is traced again, and a step sees only one adapter. Each adapter has
    its own head, maximum rank, place in the rank sequence and optimizer state.
    """

    def __init__(self, adaptation):
        self.adaptation = adaptation
        self.active = DEFAULT
        self.limit = None  # the live adapter's maximum rank, if it is lower
        self.cuts = []  # the `TunedCut`s of the live adapter
        self.tuning = ()  # where a `fit` was interrupted that tuned them
        self._kept = {DEFAULT: None}  # `None` is the live adapter

    @property
    def names(self):
        return list(self._kept)

    @property
    def max_rank(self):
        """int. The maximum rank of the live adapter."""
        return self.max_rank_of(self.active)

    def max_rank_of(self, name):
        """int. The maximum rank of an adapter."""
        kept = self._kept[name]
        limit = self.limit if kept is None else kept.limit
        return limit or self.adaptation.config.rank

    def cuts_of(self, name):
        """The list of `TunedCut`s of an adapter."""
        kept = self._kept[name]
        return self.cuts if kept is None else kept.cuts

    def ranks_of(self, name):
        """Dict of layer path to the rank that an adapter computes at."""
        kept = self._kept[name]
        if kept is None:
            return self.adaptation.ranks
        return dict(zip(self.adaptation.layers, kept.ranks, strict=True))

    def values_of(self, name, tree):
        """Dict of path to the value of everything that an adapter has."""
        kept = self._kept[name]
        return self._own(tree) if kept is None else kept.values

    @property
    def is_plain(self):
        """Whether there is one adapter, without a name or a lower maximum."""
        return self.names == [DEFAULT] and self.limit is None

    @property
    def are_tuned(self):
        """Whether any adapter has tuned cuts."""
        return any(map(self.cuts_of, self._kept))

    def add(self, name, tree):
        """Adds a fresh adapter with the live one's head, and makes it live."""
        self.check_free(name)
        self.adaptation.settle(tree)
        self.adaptation.open = False
        values = {p: _copy(v) for p, v in self._own(tree).items()}
        for path, layer in self.adaptation.layers.items():
            for side in ("down", "up"):
                shape = values[f"{path}/{side}"].shape
                initializer = getattr(layer, f"{side}_initializer")
                values[f"{path}/{side}"] = initializer(shape)
        ranks = [x.rank for x in self.adaptation.layers.values()]
        state = [
            np.full(v.shape, name == "full_rank")
            for name, v in self.adaptation.state.items()
        ]
        self._change(name, _Kept(values, None, ranks, [], state), tree)

    def check_free(self, name):
        """Raises what `check_name` raises, and also if the name is taken."""
        check_name(name)
        if name in self._kept:
            raise ValueError(
                "The name of a new adapter must be free; `delete_adapter` "
                f"frees it. Received: name={name!r} beside {self.names}"
            )

    def activate(self, name, tree):
        """Makes another adapter live."""
        self._check_known(name)
        if name != self.active:
            self.adaptation.settle(tree)
            self._change(name, self._kept[name], tree)

    def delete(self, name):
        """Deletes an adapter that isn't live."""
        self._check_known(name)
        if name == self.active:
            raise ValueError(
                "The active adapter can't be deleted: `set_adapter` another "
                f"one first. Received: name={name!r} of {self.names}"
            )
        del self._kept[name]

    def rename(self, name):
        """Gives the live adapter another name."""
        self._kept = {
            name if old == self.active else old: kept
            for old, kept in self._kept.items()
        }
        self.active = name

    def join(self, tree):
        """Gives the other adapters their own copies of what was added."""
        own = self._own(tree)
        for kept in filter(None, self._kept.values()):
            more = {p: _copy(v) for p, v in own.items() if p not in kept.values}
            kept.values |= more

    def check_alone(self, change):
        """Raises a `ValueError` if a change would leave adapters behind."""
        if len(self._kept) > 1 or self.limit is not None:
            raise ValueError(
                f"{change} needs a model with one adapter, of its maximum "
                f"rank. Received: adapters {self.names}, of which "
                f"{self.active!r} has rank {self.max_rank} of "
                f"{self.adaptation.config.rank}"
            )

    def _check_known(self, name):
        if name not in self._kept:
            raise ValueError(
                "The name must be that of an adapter of the model. "
                f"Received: name={name!r}{meant(name, self.names)}, which "
                f"isn't one of {self.names}"
            )

    def _change(self, name, kept, tree):
        own = self._own(tree)
        before = self._live(own)
        try:
            self._put(kept, own)
        except BaseException:
            self._put(before, own)
            raise
        self._kept |= {self.active: before, name: None}
        self.active = name

    def _live(self, own):
        optimizer = self._optimizer()
        return _Kept(
            {path: _keras.own_value(v) for path, v in own.items()},
            self.limit,
            list(self.adaptation.ranks.values()),
            self.cuts,
            _values(self.adaptation.state.values()),
            optimizer,
            _values(_slots(optimizer)),
        )

    def _put(self, kept, own):
        _replace([*own.values()], [kept.values[path] for path in own])
        self.limit = None  # the new ranks may be above the old limit
        layers = self.adaptation.layers
        self.adaptation.set_tuned_cuts(kept.cuts)
        self.adaptation.set_ranks(dict(zip(layers, kept.ranks, strict=True)))
        self.limit = kept.limit
        _replace(self.adaptation.state.values(), kept.state)
        optimizer, slots = self._optimizer(), kept.slots
        if optimizer is not None and kept.optimizer is not optimizer:
            slots = _values(_slots(_keras.optimizers.built_anew(optimizer)))
        if optimizer is not None:
            _replace(_slots(optimizer), slots)

    def _own(self, tree):
        return self.adaptation.spec.own(tree)

    def _optimizer(self):
        """The optimizer, once it has a state."""
        optimizer = getattr(self.adaptation.model, "optimizer", None)
        return optimizer if optimizer is not None and optimizer.built else None

    # In a file, the adapters are among the model's own weights. Only the
    # optimizer state of the live adapter is saved.

    def save(self, store, tree):
        """Puts everything that isn't in variables into a store of arrays."""
        self._save_cuts(store)
        if self.is_plain:
            return
        own = self._own(tree)
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
        store[STORE] = _encoded(content)
        for i, (_, x) in enumerate(kept):
            values = [x.values[path] for path in own]
            for j, value in enumerate([*values, *x.state]):
                store[f"{STORE}_{i}_{j}"] = float32_array(value)

    def load(self, stored, tree):
        """Takes what `save` stored out of a dict of arrays.

        A file without names has one adapter, at the maximum rank. It becomes
        the live one.
        """
        self._load_adapters(stored, tree)
        self._load_cuts(stored)

    def _load_adapters(self, stored, tree):
        if STORE not in stored:
            self.limit = None
            return
        content = _decoded(stored.pop(STORE))
        own, kept = self._own(tree), dict.fromkeys(content["names"])
        wanted = [
            tuple(v.shape)
            for v in [*own.values(), *self.adaptation.state.values()]
        ]
        for i, x in enumerate(content["kept"]):
            names = [f"{STORE}_{i}_{j}" for j in range(len(wanted))]
            values = [stored.pop(name, None) for name in names]
            shapes = [None if v is None else tuple(v.shape) for v in values]
            if shapes != wanted:
                raise ValueError(
                    "The adapters of a file must fit the model. Received: "
                    f"adapter {x['name']!r} of shapes {shapes}, must be "
                    f"{wanted}"
                )
            values = [ops.convert_to_tensor(np.asarray(v)) for v in values]
            kept[x["name"]] = _Kept(
                dict(zip(own, values, strict=False)),
                x["limit"],
                x["ranks"],
                [],
                values[len(own) :],
            )
        self._kept, self.active = kept, content["active"]
        self.limit = content["limit"]

    def _save_cuts(self, store):
        if not self.are_tuned:
            return
        content = {}
        for i, name in enumerate(self._kept):
            cuts = self.cuts_of(name)
            content[name] = [list(cut.ranks.values()) for cut in cuts]
            for j, cut in enumerate(cuts):
                store[f"{TUNED}_{i}_{j}"] = cut.flat()
        store[TUNED] = _encoded(content)
        for i, value in enumerate(self.tuning):
            store[f"{TUNING}_{i}"] = value

    def _load_cuts(self, stored):
        content = _decoded(stored.pop(TUNED)) if TUNED in stored else {}
        paths, columns = self.adaptation.layers, self.adaptation.config.rank
        for i, (name, kept) in enumerate(self._kept.items()):
            cuts = [
                TunedCut.of_flat(
                    stored.pop(f"{TUNED}_{i}_{j}"),
                    dict(zip(paths, ranks, strict=True)),
                    columns,
                )
                for j, ranks in enumerate(content.get(name, ()))
            ]
            if kept is None:
                self.adaptation.set_tuned_cuts(cuts)
            else:
                kept.cuts = cuts
        names = [x for x in stored if x.startswith(f"{TUNING}_")]
        self.tuning = [
            np.asarray(stored.pop(f"{TUNING}_{i}")) for i in range(len(names))
        ]


def _encoded(content):
    return np.frombuffer(json.dumps(content).encode(), "uint8")


def _decoded(array):
    return json.loads(bytes(np.asarray(array)))


def _slots(optimizer):
    if optimizer is None:
        return []
    return _keras.optimizers.optimizer_state(optimizer)


def _copy(variable):
    return ops.copy(ops.convert_to_tensor(variable))


def _values(variables):
    return [_keras.own_value(v) for v in variables]


def _replace(variables, values):
    for variable, value in zip(variables, values, strict=True):
        _keras.replace_value(variable, value)

"""Adaptation: all that was done to a model, how it is seen without, undone."""

import contextlib
import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras, paths
from keras_dylora import ranks as rank_functions
from keras_dylora.config import AdapterArguments, DyLoRAConfig
from keras_dylora.distributions import RankDraw
from keras_dylora.layers import ADAPTED_CLASSES
from keras_dylora.named import NamedAdapters
from keras_dylora.rank_gate import GateRow, RankGate
from keras_dylora.recompile import uncompiled
from keras_dylora.training.full_rank import at_full_rank
from keras_dylora.training.objectives import OBJECTIVES


class Adaptation:
    """All that was done to a model, so that it can be trained and undone.

    A model that is built from adapted layers has one with nothing to undo.

    Args:
        model: the model, before the change.
        config: `DyLoRAConfig`.
        layers: dict of path to the layers to adapt, in forward order. Adapted
            ones, as in a hand-built model, stay as they are.
        trained_layers: dict of path to the layers that are trained in full,
            each with the list of its variables that are.
    """

    def __init__(self, model, config, layers, trained_layers=None):
        self.model = model
        self.layers = layers
        self.upgraded = [
            x for x in layers.values() if type(x) in ADAPTED_CLASSES
        ]
        trained_layers = trained_layers or {}
        self.trained_layers = list(trained_layers)
        # What is trained besides the adapters, even if it is frozen by now.
        self.trained = [
            v for variables in trained_layers.values() for v in variables
        ]
        # What `undo` and `as_plain` make trainable again. None of a hand-built
        # model's business.
        self.flags = trainable_flags(model) if self.upgraded else []
        self.config = config
        self.named = NamedAdapters(self)

    @classmethod
    def of_hand_built(cls, model, options):
        """That of a model which is built from adapted layers.

        Raises a `ValueError` if they disagree or aren't built, or if there is
        none. `options` are fields of the config beside theirs.
        """
        layers = paths.adapted_layers(model)
        if not layers or not all(layer.built for layer in layers.values()):
            raise ValueError(
                "A `DyLoRAModel` needs built `DyLoRADense` or "
                "`DyLoRAEinsumDense` layers. Received: "
                f"{[layer.name for layer in layers.values()]} in {model.name}"
            )
        shared = {}
        for name in ("rank", "min_rank", "alpha", "frozen", "scaling"):
            values = {getattr(layer, name) for layer in layers.values()}
            if len(values) > 1:
                raise ValueError(
                    f"All layers of a `DyLoRAModel` must have the same "
                    f"`{name}`. Received: {sorted(values)}"
                )
            shared[name] = values.pop()
        return cls(model, DyLoRAConfig(**shared, **options), layers)

    def apply(self):
        """Gives the layers their adapters, and freezes all but those."""
        if not self.upgraded:
            return
        config = self.config
        gate = RankGate(len(self.upgraded), config.scale)
        for i, layer in enumerate(self.upgraded):
            ADAPTED_CLASSES[type(layer)].upgrade(
                layer,
                AdapterArguments.of(config),
                GateRow(gate, i),
                seed=(config.seed + i) % 2**31,  # all that JAX and torch take
            )
        adapters = [v for x in self.upgraded for v in (x.down, x.up)]
        self.train([*self.trained, *adapters])

    def undo(self):
        """Gives every layer back as it was."""
        for layer in self.upgraded:
            if type(layer) not in ADAPTED_CLASSES:
                layer.downgrade()
        _keras.track_for_torch(self.model)
        restore(self.flags)

    def configure(self, config, ranks_drawn=0, full_rank=1):
        """Starts the training of a config, at a place of its rank sequence."""
        self.config = config
        self.training = False  # whether a step is being traced or run
        self.masked = None, []  # of the optimizer, see `step.masked`
        self.objective = OBJECTIVES[config.objective](config)
        self.draw = RankDraw(
            config.distribution, config.min_rank, config.rank, config.seed
        )
        # Positions in the rank sequence: how many ranks were drawn.
        state = {"ranks_drawn": (ranks_drawn, "int")}
        if config.frozen:
            # Columns of the ranks drawn since the last weight update.
            columns = np.zeros((config.rank,), dtype="float32")
            state["open_columns"] = columns, "float32"
        if config.full_rank_steps:
            # 1 while steps are at the maximum rank, before the columns are
            # put in order.
            state["full_rank"] = full_rank, "int"
        with keras.name_scope(self.model.name, caller=self.model):
            self.state = {
                name: keras.Variable(
                    value,
                    dtype=dtype,
                    name=name,
                    trainable=False,
                    autocast=False,
                    aggregation="only_first_replica",
                )
                for name, (value, dtype) in state.items()
            }
        self.ranks_drawn = self.state["ranks_drawn"]
        self.open_columns = self.state.get("open_columns")
        self.full_rank = self.state.get("full_rank")

    @property
    def highest(self):
        """int. The highest rank of the live adapter."""
        return self.named.highest

    @property
    def lowest_trained(self):
        """int. Of training so far, which within `full_rank_steps` is of one."""
        begun = int(ops.convert_to_numpy(self.ranks_drawn)) > 0
        pending = begun and at_full_rank(self)
        return self.config.rank if pending else self.config.min_rank

    @property
    def gates(self):
        """The `RankGate` of the layers, or that of each hand-built one."""
        gates = [layer._gate.gate for layer in self.layers.values()]
        return list({id(gate): gate for gate in gates}.values())

    @property
    def ranks(self):
        """The rank that each layer computes at, a dict of path to int."""
        gates = {id(gate): gate.active_ranks for gate in self.gates}
        rows = {path: layer._gate for path, layer in self.layers.items()}
        return {p: gates[id(x.gate)][x.index] for p, x in rows.items()}

    def set_ranks(self, ranks):
        """Sets them, from a dict of path to int or one for all."""
        ranks = rank_functions.by_layer(ranks, self.layers, self.highest)
        for gate, rows in self._by_gate(ranks).items():
            gate.set_ranks([rows[i] for i in range(len(rows))])

    def overridden(self, value):
        """Within it, the layers read a tensor in place of their gates.

        It is `(rank,)`, or `(batch, rank)` with a gate for each example; or a
        dict of path to such tensors.
        """
        if not isinstance(value, dict):
            value = dict.fromkeys(self.layers, value)
        return self._gates_with("override", self._by_gate(value))

    def rank_chosen(self):
        """Within it, the layers know that their rank is meant."""
        return self._gates_with("chosen", dict.fromkeys(self.gates, True))

    def warn_of_idle(self):
        """Warns once of layers that training never called.

        `enable_dylora` leaves out those of a functional model; what it can't
        trace shows here.
        """
        idle = [
            path
            for path, layer in self.layers.items()
            if layer._gate.index not in layer._gate.gate.read
        ]
        if idle and len(idle) < len(self.layers):
            warnings.warn(
                "Adapted layers that the model never calls aren't trained, "
                "and their updates would count in `merge` alone: leave them "
                f"out of `target_layers`. Received: {idle}",
                stacklevel=3,
            )
            for path in idle:
                row = self.layers[path]._gate
                row.gate.read.add(row.index)

    def _by_gate(self, values):
        """Dict of gate to dict of row to the value of its layer."""
        found = {}
        for path, layer in self.layers.items():
            row = layer._gate
            found.setdefault(row.gate, {})[row.index] = values[path]
        return found

    @contextlib.contextmanager
    def _gates_with(self, attribute, values):
        before = [(gate, getattr(gate, attribute)) for gate in values]
        for gate, value in values.items():
            setattr(gate, attribute, value)
        try:
            yield
        finally:
            for gate, previous in before:
                setattr(gate, attribute, previous)

    def train(self, variables):
        """Leaves these variables trainable, and nothing else."""
        self.trained = variables if self.upgraded else []
        keep = {id(v) for v in variables}
        for item, _ in self.flags:
            if item is self.model:
                # Past its own setter, which calls this.
                keras.Layer.trainable.fset(item, True)
            elif isinstance(item, keras.Layer):
                item.trainable = any(id(v) in keep for v in item.variables)
        for variable in self.model.variables:
            variable.trainable = id(variable) in keep

    def forget_replaced(self):
        """Lets go of the variables that the model no longer has."""
        current = {id(v) for v in self.model.variables}
        self.flags = [
            (item, trainable)
            for item, trainable in self.flags
            if isinstance(item, keras.Layer) or id(item) in current
        ]

    @property
    def named_config(self):
        """The `DyLoRAConfig`, with paths of layers in place of callables."""
        return dataclasses.replace(
            self.config,
            **{
                name: named
                for name, named in (
                    ("target_layers", list(self.layers)),
                    ("trainable_layers", self.trained_layers),
                )
                if callable(getattr(self.config, name))
            },
        )

    def get_config(self):
        # Positions, since Keras numbers unnamed layers anew in each process.
        order = [id(x) for x in paths.layer_paths(self.model).values()]
        return {
            "config": self.named_config.get_config(),
            "layers": [order.index(id(x)) for x in self.upgraded] or None,
        }

    @classmethod
    def from_config(cls, model, config):
        """The same change of a fresh model, not applied yet."""
        positions = config["layers"]
        layers = paths.adapted_layers(model)
        if positions is not None:
            every = list(paths.layer_paths(model).items())
            layers = dict(every[i] for i in positions)
        return cls(model, DyLoRAConfig.from_config(config["config"]), layers)


def trainable_flags(layer):
    """A layer, those below it and their variables, with their `trainable`."""
    tree = [layer, *paths.layer_paths(layer).values()]
    # Layers first: setting theirs sets their variables' too.
    return [(x, x.trainable) for x in [*tree, *layer.variables]]


def restore(flags):
    """Sets what `trainable_flags` gave."""
    for item, trainable in flags:
        item.trainable = trainable


@contextlib.contextmanager
def as_original(instances):
    """Within it, upgraded layers and models are of their original classes.

    The variables of the adapters stay where they are.
    """
    classes = [(instance, type(instance)) for instance in instances]
    try:
        for instance, cls in classes:
            _keras.set_class(instance, cls.original_class)
        yield
    finally:
        for instance, cls in classes:
            _keras.set_class(instance, cls)


@contextlib.contextmanager
def _as_float(layers):
    """Within it, configs describe quantized layers as what they were."""
    changed = []
    try:
        for layer in layers:
            if layer.quantization_mode is None:
                continue
            policy = layer.dtype_policy
            changed.append((layer, policy, layer.quantization_config))
            computes, stores = policy.compute_dtype, policy.variable_dtype
            layer.dtype_policy = (
                stores if computes == stores else f"mixed_{computes}"
            )
            layer.quantization_config = None
        yield
    finally:
        for layer, policy, config in changed:
            layer.dtype_policy = policy
            layer.quantization_config = config


@contextlib.contextmanager
def as_plain(model, whole=False):
    """Within it, Keras describes the model as one without DyLoRA.

    As it was before `enable_dylora`: the classes, what was trainable,
    uncompiled.

    Args:
        model: the `DyLoRAModel`.
        whole: bool. Whether what was built by hand is plain too: layers, and
            models within; and quantized layers are the float ones they were.
            Defaults to `False`.
    """
    adaptation = model._dylora
    instances, layers = [model, *adaptation.upgraded], []
    if whole:
        layers = list(adaptation.layers.values())
        models = _keras.submodels(model)
        instances = [x for x in models if hasattr(x, "original_class")]
        instances += layers
    flags = trainable_flags(model) if adaptation.flags else []
    try:
        with (
            _as_float(layers),
            uncompiled(model),
            as_original(instances),
        ):
            restore(adaptation.flags)
            yield
    finally:
        restore(flags)

"""Adaptation: everything that was done to a model, so that it can be undone."""

import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.config import AdapterArguments, DyLoRAConfig
from keras_dylora.cuts import users_line
from keras_dylora.distributions import RankDraw
from keras_dylora.layers.gate import GateRow, RankGate
from keras_dylora.layers.kinds import adapted_class
from keras_dylora.layers.low_rank import LowRankAdapter
from keras_dylora.layers.tokens import NAME
from keras_dylora.layers.tree import Tree
from keras_dylora.live.active_ranks import ActiveRanks
from keras_dylora.live.named import NamedAdapters
from keras_dylora.live.plain import flags, restore
from keras_dylora.live.recompile import reset_compiled
from keras_dylora.live.spec import Spec
from keras_dylora.live.tokens import TokenRows
from keras_dylora.training.objectives import OBJECTIVES


class Adaptation(ActiveRanks):
    """Everything that was done to a model, to train it and to undo it.

    For a model that is built from adapted layers, there is nothing to undo.

    Args:
        tree: `Tree` of the model, before the change.
        config: `DyLoRAConfig`.
        spec: `Spec`. Layers that are already adapted, as in a hand-built model,
            stay as they are.
        tokens: `TokenRows` or `None`.
    """

    def __init__(self, tree, config, spec, tokens=None):
        self.model = tree.model
        self.config = config
        self.spec = spec
        self.layers = {path: tree.layers[path] for path in spec.adapted}
        self.upgraded = [x for x in self.layers.values() if adapted_class(x)]
        self.tokens = tokens
        self.table = tokens and tree.layers[tokens.path]
        # The flags that `undo` and `as_plain` restore. Those of a hand-built
        # model aren't touched.
        self.before = flags(tree) if self.upgraded else []
        # Whether flags may still remove something from the spec.
        self.open = not self.upgraded
        # By path, the values from before training of what is trained in full.
        self.head = None
        self.named = NamedAdapters(self)

    @classmethod
    def of_hand_built(cls, model, options):
        """The adaptation of a model that is built from adapted layers.

        Raises a `ValueError` if the layers disagree, aren't built, or if there
        are none. `options` are the fields of the config that layers don't have.
        """
        tree = Tree(model)
        layers = tree.adapted.values()
        if not layers or not all(layer.built for layer in layers):
            raise ValueError(
                "A `DyLoRAModel` needs built `DyLoRADense` or "
                "`DyLoRAEinsumDense` layers. Received: "
                f"{[layer.name for layer in layers]} in {model.name}"
            )
        shared = {}
        for name in ("rank", "min_rank", "alpha", "frozen", "scaling"):
            values = {getattr(layer, name) for layer in layers}
            if len(values) > 1:
                raise ValueError(
                    f"All layers of a `DyLoRAModel` must have the same "
                    f"`{name}`. Received: {sorted(values)}"
                )
            shared[name] = values.pop()
        dropouts = {layer.dropout for layer in layers}
        if len(dropouts) == 1:  # each layer may have its own
            shared["dropout"] = dropouts.pop()
        config = DyLoRAConfig(**shared, **options)
        return cls(tree, config, Spec.of_flags(tree))

    def apply(self, tree):
        """Gives the layers their adapters, and freezes what isn't trained."""
        each = [self.spec.adapted[tree.paths[id(x)]] for x in self.upgraded]
        gate = RankGate([x.rank for x in each], self.config.scale)
        for i, layer in enumerate(self.upgraded):
            adapted_class(layer).upgrade(
                layer,
                each[i],
                GateRow(gate, i),
                # JAX and torch take no larger seed.
                seed=(self.config.seed + i) % 2**31,
            )
        if self.tokens:
            self.tokens.apply(tree)
        if self.upgraded:
            self.spec.apply(tree)

    def undo(self):
        """Restores every layer as it was before `apply`."""
        if self.tokens and hasattr(self.table, NAME):
            self.tokens.undo(self.model, self.table)
        for layer in self.upgraded:
            if isinstance(layer, LowRankAdapter):
                layer.downgrade()
        _keras.track_for_torch(self.model)
        restore(self.before)

    def keep_head(self, tree):
        """Copies the values of weights trained in full, if there is no copy."""
        self.head = self.head or {}
        for path, variable in self.spec.head(tree).items():
            if path not in self.head:
                value = ops.convert_to_tensor(variable)
                self.head[path] = ops.copy(value)

    def restore_head(self, tree):
        """Restores the values that the trained layers had before training."""
        if self.head is None:
            raise ValueError(
                "`restore_head` needs the values from before enabling, which "
                "a file doesn't hold. Load the pretrained model again. "
                f"Received: {self.model.name}, which comes from a file"
            )
        for path, variable in self.spec.head(tree).items():
            variable.assign(self.head[path])

    def settle(self, tree):
        """Adds to the `Spec` what the user has made trainable since.

        In a hand-built model that isn't trained yet, the flags alone say what
        will be trained. If there are several adapters, each gets its own copy
        of what is added.
        """
        if not self.model.trainable:  # then the flags don't say what is meant
            return
        spec = Spec.of_flags(tree) if self.open else self.spec.joined(tree)
        if spec == self.spec:
            return
        known = self.spec.full(tree)
        more = [path for path in spec.full(tree) if path not in known]
        self.spec = spec
        self.named.join(tree)
        if self.upgraded:
            if self.head is not None:
                self.keep_head(tree)
            warnings.warn(
                "Weights that are made trainable after enabling belong to "
                "every adapter from then on. Received: "
                f"{len(more)} weights, such as "
                f"{more[:1]}",
                stacklevel=users_line(),
            )

    def configure(self, config, ranks_drawn=0, full_rank=1):
        """Prepares training with a config, at a place of its rank sequence."""
        self.config = config
        self.spec = self.spec.with_config(config)
        self.training = False  # whether a step is being traced or run
        self.masked = None, []  # the optimizer's; see `step.masked`
        self.objective = OBJECTIVES[config.objective](config)
        self.draw = RankDraw(
            config.distribution, config.min_rank, config.rank, config.seed
        )
        # The position in the rank sequence: how many ranks were drawn.
        state = {"ranks_drawn": (ranks_drawn, "int")}
        if config.frozen:
            # Columns of the ranks drawn since the last weight update.
            columns = np.zeros((config.rank,), dtype="float32")
            state["open_columns"] = columns, "float32"
        if config.full_rank_steps:
            # 1 while steps are at the maximum rank, until the columns are
            # ordered.
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

    def reconfigure(self, config, optimizer=None):
        """Takes another config, at the same place of the rank sequence.

        If variables were replaced, `optimizer` is the one that `new_optimizer`
        made before the change.
        """
        place = {
            name: int(ops.convert_to_numpy(self.state[name]))
            for name in ("ranks_drawn", "full_rank")
            if name in self.state
        }
        self.configure(config, **place)
        _keras.track_for_torch(self.model)
        reset_compiled(self.model, optimizer)

    def forget_replaced(self):
        """Drops the variables that the model no longer has."""
        current = {id(v) for v in self.model.variables}
        self.before = [
            (item, trainable)
            for item, trainable in self.before
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
                    ("trainable_layers", list(self.spec.trained)),
                )
                if callable(getattr(self.config, name))
            },
        )

    def get_config(self, tree):
        places = {id(x): i for i, x in enumerate(tree.layers.values())}
        return {
            "config": self.named_config.get_config(),
            # By place, as Keras numbers unnamed layers anew in each process.
            "layers": [places[id(x)] for x in self.upgraded] or None,
            "spec": self.spec.get_config(tree),
            **self._tokens_config(places),
            "flags": [x.trainable for x in tree.every.values()],
        }

    def _tokens_config(self, places):
        return {"table": places[id(self.table)]} if self.tokens else {}

    @classmethod
    def from_config(cls, tree, config, trainable):
        """The adaptation that `get_config` describes, applied to a fresh model.

        `trainable` has the flags of the weights.
        """
        dylora = DyLoRAConfig.from_config(config["config"])
        if "spec" in config:
            spec = Spec.from_config(config["spec"], tree)
        else:
            places, every = config["layers"], list(tree.layers)
            paths = [every[i] for i in places] if places else tree.adapted
            spec = Spec(dict.fromkeys(paths, AdapterArguments.of(dylora)), {})
        tokens = None
        if "table" in config:
            path = list(tree.layers)[config["table"]]
            layer, ids = tree.layers[path], dylora.trainable_tokens
            tokens = TokenRows.of(path, layer, ids, layer.input_dim)
        adaptation = cls(tree, dylora, spec, tokens)
        adaptation.open = False
        adaptation.apply(tree)
        weights = list(zip(tree.model.weights, trainable, strict=True))
        if "spec" not in config:  # an old file: the flags say what is trained
            chosen = {id(weight) for weight, flag in weights if flag}
            base = tree.base_weights.values()
            adaptation.spec = Spec.of(
                tree, spec.adapted, [v for v in base if id(v) in chosen]
            )
            if adaptation.upgraded:
                adaptation.spec.apply(tree)
        layers = zip(tree.every.values(), config.get("flags", ()), strict=False)
        restore([*layers, *weights])
        return adaptation

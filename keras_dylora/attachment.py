"""What enable_dylora does to a model, and how it is undone."""

import contextlib
import dataclasses

import keras

from keras_dylora._keras import forget
from keras_dylora._keras import set_class
from keras_dylora._keras import sublayers
from keras_dylora._keras import track_for_torch
from keras_dylora.config import DyLoRAConfig
from keras_dylora.layers import ADAPTERS
from keras_dylora.low_rank import LowRankAdapter
from keras_dylora.low_rank import RankGate


def layer_paths(model):
    """All layers below `model`, parents first, by a unique path.

    The path is Keras's own `layer.path` less the model's name, with `_1`,
    `_2`, … where Keras gives two layers the same one. The preprocessor of a
    task is left out: it isn't trained, has more layers once it has run, and
    isn't tracked by Keras on every backend.
    """
    paths, seen = {}, {id(model), id(getattr(model, "preprocessor", None))}

    def visit(parent, prefix):
        # Other layers may have a `layers` that is something else.
        ordered = parent.layers if isinstance(parent, keras.Model) else ()
        for layer in [*ordered, *sublayers(parent)]:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = layer.path or f"{prefix}{layer.name}"
            path = path.removeprefix(f"{model.name}/")
            unique, count = path, 0
            while unique in paths:
                count += 1
                unique = f"{path}_{count}"
            paths[unique] = layer
            visit(layer, f"{path}/")

    visit(model, "")
    return paths


def if_trainable(layer):
    """The variables of a layer that are trained if it isn't frozen."""
    flags = _flags(layer)
    layer.trainable = True
    try:
        return list(layer.trainable_variables)
    finally:
        _restore(flags)


def _flags(layer):
    """A layer, those below it and their variables, with their `trainable`."""
    tree = [layer, *layer_paths(layer).values()]
    # Layers first: setting theirs sets their variables' too.
    return [(x, x.trainable) for x in [*tree, *layer.variables]]


def _restore(flags):
    for item, trainable in flags:
        item.trainable = trainable


class Attachment:
    """What `enable_dylora` did to a model, so that it can be undone.

    Args:
        model: the model, before the change.
        layers: dict of path to the layers to adapt.
        head: dict of path to the layers that are trained in full, each with
            the list of its variables that are.
        config: `DyLoRAConfig`.
    """

    def __init__(self, model, layers, head, config):
        self.model = model
        self.layers = layers
        self.head_paths = list(head)
        self.trained = [v for group in head.values() for v in group]
        self.config = config
        self._original_flags = _flags(model)

    def attach(self):
        config = self.config
        gate = RankGate(config.rank, float(config.alpha))
        for i, layer in enumerate(self.layers.values()):
            ADAPTERS[type(layer)].attach(
                layer,
                gate,
                seed=(config.seed + i) % 2**31,  # all that JAX and torch take
                rank=config.rank,
                min_rank=config.min_rank,
                alpha=config.alpha,
                frozen=config.frozen,
                dropout=config.dropout,
            )
        adapters = [v for x in self.layers.values() for v in (x.down, x.up)]
        self.train([*self.trained, *adapters])

    def train(self, variables):
        """Leaves these variables trainable, and nothing else."""
        self.trained = variables
        keep = {id(v) for v in variables}
        self.model.trainable = True
        for layer in layer_paths(self.model).values():
            layer.trainable = any(id(v) in keep for v in layer.variables)
        for variable in self.model.variables:
            variable.trainable = id(variable) in keep

    def detach(self):
        """Gives every layer back as it was."""
        for layer in self.layers.values():
            if isinstance(layer, LowRankAdapter):
                forget(layer, "down", "up", "_gate_variable", "_dropout_seed")
                for name in ADAPTER_ATTRIBUTES:
                    layer.__dict__.pop(name, None)
                set_class(layer, layer.base_class)
        track_for_torch(self.model)
        self.restore_flags()

    def forget_replaced(self):
        """Lets go of the variables that the model no longer has."""
        current = {id(v) for v in self.model.variables}
        self._original_flags = [
            (item, trainable)
            for item, trainable in self._original_flags
            if isinstance(item, keras.Layer) or id(item) in current
        ]

    def restore_flags(self):
        """Makes trainable again what was before."""
        _restore(self._original_flags)

    @property
    def named_config(self):
        """The `DyLoRAConfig`, with paths of layers in place of callables."""
        return dataclasses.replace(
            self.config,
            **{
                name: paths
                for name, paths in (
                    ("target_layers", list(self.layers)),
                    ("trainable_layers", self.head_paths),
                )
                if callable(getattr(self.config, name))
            },
        )

    def get_config(self):
        # Positions, since Keras numbers unnamed layers anew in each process.
        order = [id(x) for x in layer_paths(self.model).values()]
        return {
            "config": self.named_config.get_config(),
            "layers": [order.index(id(x)) for x in self.layers.values()],
        }

    @classmethod
    def from_config(cls, model, config):
        """Plans the same change of a fresh model; `None` if there is none."""
        if config["layers"] is None:
            return None
        paths = list(layer_paths(model).items())
        return cls(
            model,
            dict(paths[i] for i in config["layers"]),
            {},
            DyLoRAConfig.from_config(config["config"]),
        )


@contextlib.contextmanager
def base_layers(layers):
    """Within it, adapted layers are of the classes that they were made from.

    The variables of the adapters stay where they are.
    """
    classes = [(layer, type(layer)) for layer in layers]
    try:
        for layer, cls in classes:
            set_class(layer, cls.base_class)
        yield
    finally:
        for layer, cls in classes:
            set_class(layer, cls)


@contextlib.contextmanager
def plain(model, layers, attachment=None):
    """The model without DyLoRA, for the time of a `with` block.

    The classes of the model and of the given adapted layers are the original
    ones, and so are the trainable flags of an attachment. The variables of
    the adapters stay where they are.
    """
    cls = type(model)
    flags = _flags(model) if attachment else []
    try:
        with base_layers(layers):
            set_class(model, cls.original_class)
            if attachment:
                attachment.restore_flags()
            yield model
    finally:
        set_class(model, cls)
        _restore(flags)


ADAPTER_ATTRIBUTES = (
    "rank",
    "min_rank",
    "alpha",
    "frozen",
    "dropout",
    "down_initializer",
    "up_initializer",
    "_gate",
    "_adapter_dims",
    "_kernel_axes",
    "_input_order",
    "_output_order",
)

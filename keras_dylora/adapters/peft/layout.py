"""Layout: the names of one model class in Keras and in transformers."""

import dataclasses
import itertools
import math
import re
import warnings

import numpy as np

from keras_dylora.cuts import users_line
from keras_dylora.layers.kinds import geometry


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Layers of a model that are alike, one after another.

    A linear layer of transformers stands for one Keras layer, or for several,
    whose outputs it has side by side, such as GPT-2's `c_attn`.

    Args:
        name: str. The path of a block in transformers, with `{}` for its
            number.
        keras: str. The path of a block in KerasHub, with `{}` for its number.
        linear: dict of the name of each linear layer in the block to a tuple of
            the paths of its Keras layers within theirs. A path that begins with
            a slash is that of a layer at the top, which Keras numbers.
        first: int. The number of the first block in KerasHub. Defaults to `0`.
        ungated: dict to use instead of `linear` for a model without gates,
            which lacks some layers. Defaults to `None`: there is no such model.
        optional: tuple of the names of layers that not every block has.
            Defaults to none.
        separator: str. The text in Keras between the names of a block and of a
            layer in it. Defaults to a slash.
    """

    name: str
    keras: str
    linear: dict
    first: int = 0
    ungated: dict | None = None
    optional: tuple = ()
    separator: str = "/"

    def modules(self, paths):
        """The linear layers of a model's blocks, with their Keras paths."""
        found = {}
        for i in itertools.count():
            block = self.keras.format(i + self.first) + self.separator
            if not any(path.startswith(block) for path in paths):
                return found
            linear = self.linear
            if self.ungated and not any(
                path.startswith(block) and "gate" in path for path in paths
            ):
                linear = self.ungated
            for name, layers in linear.items():
                ours = tuple(
                    f"{layer[1:]}_{i}".removesuffix("_0")
                    if layer.startswith("/")
                    else f"{block}{layer}"
                    for layer in layers
                )
                if name not in self.optional or set(ours) <= set(paths):
                    found[f"{self.name.format(i)}.{name}"] = ours


# The name in transformers of a language model's output.
OUTPUT = "lm_head"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one model class in Keras and in transformers.

    Args:
        backbone: str. The class of the KerasHub backbone.
        blocks: tuple of `Blocks`.
        outside: dict like `Blocks.linear`, for layers outside of the blocks.
        optional: dict like `outside`, for layers that not every model has.
            Defaults to none.
        embedding: str. The embedding of tokens. Defaults to `""`: none that can
            have an adapter.
        transposed: bool. Whether transformers stores the weights as
            `(inputs, outputs)`, in `Conv1D` layers.
        interleaved: bool. Whether a linear layer that stands for several has
            their outputs side by side within each head, not as a whole.
        prefix: str. The attribute of the transformers model that is its base.
        task_type: str. PEFT's name of the task, or `None` if it has none.
        head: dict of the weights of the head to the paths of their Keras
            variables.
        only: dict of an attribute of the KerasHub model or its backbone to a
            tuple of the values that transformers supports. Defaults to every
            value.
        architectures: dict of the classes of transformers that may hold the
            model to the prefix in each. Defaults to none but the model's own.
        held_from: int. The width of the backbone from which published models
            have the last of `architectures`. Defaults to `0`, without them.
        alone: bool. Whether the class of transformers holds nothing but the
            model. Defaults to `True`.
    """

    backbone: str
    blocks: tuple
    outside: dict = dataclasses.field(default_factory=dict)
    optional: dict = dataclasses.field(default_factory=dict)
    embedding: str = ""
    transposed: bool = False
    interleaved: bool = False
    prefix: str = ""
    task_type: str | None = "FEATURE_EXTRACTION"
    head: dict = dataclasses.field(default_factory=dict)
    only: dict = dataclasses.field(default_factory=dict)
    architectures: dict = dataclasses.field(default_factory=dict)
    held_from: int = 0
    alone: bool = True

    def of_architecture(self, model, architecture):
        """The layout in a class of transformers, by the name of the class.

        A model that takes images is in the class that does, if none is named.
        Raises a `ValueError` if the class isn't known. Warns if none is named
        for a model of text, and the published models of this size have another
        class.
        """
        if architecture is None:
            if not self.architectures:
                return self
            own, holder = self.architectures
            body = getattr(model, "backbone", model)
            if takes_more_than_text(body):
                return self.of_architecture(model, holder)
            if body.hidden_dim >= self.held_from:
                warnings.warn(
                    "transformers and vLLM load the published models of this "
                    f"size as a {holder}, whose layers are called "
                    f"`{self.architectures[holder]}…`. There, an adapter with "
                    "other names has no effect, and no error says so. Name "
                    "the class that is in `config.json` of the base: "
                    f"architecture={holder!r} or {own!r}. Received: none, so "
                    f"the adapter is for a {own}",
                    stacklevel=users_line(),
                )
            return self
        if architecture not in self.architectures:
            raise ValueError(
                "`architecture` must be a class of transformers whose names "
                "are known here, one of "
                f"{list(self.architectures)}; if there is none, leave it "
                f"out. Received: architecture={architecture!r} for a "
                f"{type(model).__name__}"
            )
        prefix = self.architectures[architecture]
        return dataclasses.replace(
            self, prefix=prefix, alone=prefix == self.prefix
        )

    def check_variant(self, model):
        """Raises a `ValueError` if transformers has no such model."""
        for owner in (model, getattr(model, "backbone", model)):
            for name, values in self.only.items():
                value = getattr(owner, name, values[0])
                if value not in values:
                    raise ValueError(
                        "PEFT adapters can be exchanged for models that "
                        f"transformers has, with `{name}` one of {values}. "
                        f"Received: a {type(owner).__name__} of "
                        f"{name}={value!r}"
                    )

    @property
    def linear(self):
        """The names of the linear layers within a block, for all kinds."""
        return [name for blocks in self.blocks for name in blocks.linear]

    def modules(self, tree):
        """The linear layers in transformers, with the paths of Keras layers.

        Raises a `ValueError` if the model has no such layer.
        """
        paths, found = tree.layers, {}
        for blocks in self.blocks:
            found |= blocks.modules(paths)
        found |= self.outside
        for name, layers in self.optional.items():
            if set(layers) <= set(paths):
                found[name] = layers
        wanted = {path for layers in found.values() for path in layers}
        missing = sorted(wanted - set(paths))
        if missing or not found:
            raise ValueError(
                "The layers of the model must have the names that KerasHub "
                f"gives them. Received: a {type(tree.model).__name__} without "
                f"{missing or [blocks.keras for blocks in self.blocks]}"
            )
        if self.embedding:
            found[self.embedding] = (
                tree.paths[id(self.token_embedding(tree))],
            )
        return {f"{self.prefix}{name}": x for name, x in found.items()}

    def token_embedding(self, tree):
        """The embedding layer for the tokens of a KerasHub model."""
        return getattr(tree.model, "backbone", tree.model).token_embedding

    def tied(self, tree):
        """The name of an embedding that is tied to the output, or `None`."""
        if not self.embedding or not hasattr(tree.model, "generate"):
            return None
        tied = getattr(self.token_embedding(tree), "tie_weights", False)
        return f"{self.prefix}{self.embedding}" if tied else None

    def tensor_names(self, module):
        """The names of the two tensors of a layer's adapter."""
        if module == f"{self.prefix}{self.embedding}":
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def prefix_of(self, name):
        """The part of a tensor's name before that of its block, or `None`."""
        blocks = "|".join(
            re.escape(x.name).replace(r"\{\}", r"\d+") for x in self.blocks
        )
        found = re.search(rf"(?:^|\.)({blocks})\.", name)
        return found and name[: found.start(1)]

    def columns(self, layers):
        """The places of our outputs in a linear layer of transformers.

        `layers` are the Keras layers that it stands for. Returns an array of
        places for each of them.
        """
        shapes = [geometry(layer).outputs for layer in layers]
        if self.interleaved and len(layers) > 1:
            heads, size = shapes[0]
            places = np.arange(heads * len(layers) * size)
            parts = places.reshape(heads, len(layers), size)
            return [parts[:, i].ravel() for i in range(len(layers))]
        widths = [math.prod(shape) for shape in shapes]
        return np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])

    def columns_by_module(self, tree, modules):
        """Dict of the name of each of the `modules` to its `columns`."""
        return {
            module: self.columns([tree.layers[path] for path in paths])
            for module, paths in modules.items()
        }


def takes_more_than_text(backbone):
    encoders = ("vision_encoder", "audio_encoder")
    return any(getattr(backbone, x, None) is not None for x in encoders)


# The parts of the rows of families.


def attention(keras, names, ours="query key value attention_output"):
    """The four projections by name; ours are in the Keras layer `keras`."""
    pairs = zip(names.split(), ours.split(), strict=True)
    return {name: (f"{keras}/{x}",) for name, x in pairs}


def feedforward(up, down):
    return {
        up: ("feedforward_intermediate_dense",),
        down: ("feedforward_output_dense",),
    }


def fused(keras, query, key, value):
    """Three projections that are one layer; ours are in the layer `keras`."""
    return tuple(f"{keras}/{x}" for x in (query, key, value))


def head(names, ours):
    """The weights of a head, by the names of its layers and of our layers."""
    return {
        f"{name}.{theirs}": f"{layer}/{weight}"
        for name, layer in zip(names.split(), ours.split(), strict=True)
        for theirs, weight in (("weight", "kernel"), ("bias", "bias"))
    }


LAYER = "transformer_layer_{}"


def stack(backbone, linear, keras=LAYER, name="encoder.layer.{}", **rest):
    """The layout of a backbone with blocks of one kind."""
    return Layout(backbone, (Blocks(name, keras, linear),), **rest)


def rows(bare, task, prefix, task_type, head=None, **changes):
    """The rows of a backbone and of a task with it."""
    changes |= {"prefix": prefix, "task_type": task_type, "head": head or {}}
    return {bare.backbone: bare, task: dataclasses.replace(bare, **changes)}

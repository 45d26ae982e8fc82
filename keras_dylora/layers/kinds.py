"""The kinds of layers that can be adapted: a class for each."""

from typing import Any

import keras

from keras_dylora.layers.conv import DyLoRAConv1D, DyLoRAConv2D, DyLoRAConv3D
from keras_dylora.layers.dense import DyLoRADense
from keras_dylora.layers.einsum_dense import DyLoRAEinsumDense
from keras_dylora.layers.embedding import DyLoRAEmbedding, reversible_class
from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter

ADAPTED_CLASSES: dict[type, type[LowRankAdapter]] = {
    cls.original_class: cls
    for cls in (
        DyLoRADense,
        DyLoRAEinsumDense,
        DyLoRAEmbedding,
        DyLoRAConv1D,
        DyLoRAConv2D,
        DyLoRAConv3D,
    )
}
# The classes that `"all-linear"` and `"all-conv"` stand for.
LINEAR = keras.layers.Dense, keras.layers.EinsumDense
CONVOLUTIONS = keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D


def adapted_class(layer: keras.Layer) -> type[LowRankAdapter] | None:
    """The class that adapts a layer, or `None` if there is none.

    For a layer that is adapted already, there is none.
    """
    return _class_for(type(layer))


def _class_for(cls: Any) -> type[LowRankAdapter] | None:
    return ADAPTED_CLASSES.get(cls) or reversible_class(cls)


def geometry(layer: keras.Layer) -> Geometry:
    """The `Geometry` of a layer that is adapted or can be adapted."""
    cls: Any = type(layer)
    if not issubclass(cls, LowRankAdapter):  # its tokens may be trained
        cls = _class_for(getattr(cls, "original_class", cls))
    return cls.geometry_of(layer)


def matrix_shape(layer: keras.Layer) -> tuple[int, int]:
    """`(inputs, outputs)` of a layer that is adapted or can be adapted."""
    return geometry(layer).shape

"""The kinds of layers that can be adapted: a class for each."""

import keras

from keras_dylora.layers.dense import DyLoRADense
from keras_dylora.layers.einsum_dense import DyLoRAEinsumDense
from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter

ADAPTED_CLASSES: dict[type, type[LowRankAdapter]] = {
    cls.original_class: cls for cls in (DyLoRADense, DyLoRAEinsumDense)
}


def geometry(layer: keras.Layer) -> Geometry:
    """The `Geometry` of a layer that is adapted or can be."""
    cls = ADAPTED_CLASSES.get(type(layer), type(layer))
    return cls.geometry_of(layer)


def matrix_shape(layer: keras.Layer) -> tuple[int, int]:
    """`(inputs, outputs)` of a layer that is adapted or can be."""
    return geometry(layer).shape

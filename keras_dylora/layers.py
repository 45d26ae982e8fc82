"""DyLoRADense and DyLoRAEinsumDense: linear layers with a nested adapter."""

import keras

from keras_dylora.geometry import Geometry
from keras_dylora.low_rank import LowRankAdapter


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRADense(LowRankAdapter, keras.layers.Dense):
    """A `Dense` layer with a low-rank adapter that works at every rank.

    Computes, at rank `b` (Eq. 7),

    `activation(x @ kernel + bias + (alpha / b) * x @ down[:, :b] @ up[:b, :])`

    The kernel and the bias are frozen. In a plain `keras.Model` the layer
    trains at its active rank, the full one unless `set_rank` changed it; in a
    `DyLoRAModel` it trains at the rank that the model draws for each step.

    Args:
        units: int. As in `keras.layers.Dense`, like every argument that isn't
            listed here.
        rank: int. Maximum rank; the one that the layer computes at is
            `active_rank`. Defaults to `8`.
        min_rank: int. Lowest rank that a `DyLoRAModel` draws. Defaults to
            `1`.
        alpha: float. Scale: rank `b` is multiplied by `alpha / b`. Defaults
            to `16`.
        frozen: bool. Whether only column and row `b` get a gradient at rank
            `b` (Eq. 10). Defaults to `False`.
        dropout: float in `[0, 1)`. Dropout on the adapter's input. Defaults
            to `0`.
        scaling: as in `DyLoRAConfig`. Defaults to `"rank"`, `alpha / b`.
        down_initializer: initializer of `down`. Defaults to `None`, uniform
            within `1 / sqrt(fan_in)`.
        up_initializer: initializer of `up`. Defaults to `"zeros"`.

    Input shape: `(batch, ..., inputs)`. Output shape: `(batch, ..., units)`.
    Weights: `kernel` `(inputs, units)`, `bias` `(units,)`, `down`
    `(inputs, rank)` and `up` `(rank, units)`, the last two in float32.

    Raises:
        ValueError: if a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    inputs = keras.Input((32,))
    x = keras_dylora.DyLoRADense(64, "relu", rank=4, alpha=8)(inputs)
    outputs = keras_dylora.DyLoRADense(1, rank=4, alpha=8)(x)
    model = keras_dylora.DyLoRAModel(inputs, outputs)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.layers.Dense

    @staticmethod
    def geometry_of(layer: keras.Layer) -> Geometry:
        inputs, units = layer.kernel.shape
        return Geometry((inputs,), (units,))


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAEinsumDense(LowRankAdapter, keras.layers.EinsumDense):
    """An `EinsumDense` layer with a low-rank adapter for every rank.

    All input axes of the kernel are flattened to one side and all output axes
    to the other, so that rank means the rank of a matrix: an attention query
    `"abc,cde->abde"` with a kernel of `(768, 12, 64)` is adapted as the
    768×768 matrix it is.

    Args:
        equation: str. As in `keras.layers.EinsumDense`, like every argument
            that isn't listed here. No axis may be in the input, the kernel
            and the output at once.
        output_shape: int or tuple, as in `keras.layers.EinsumDense`.
        rank: int. Maximum rank, like what follows as in `DyLoRADense`.
            Defaults to `8`.
        min_rank: int. Defaults to `1`.
        alpha: float. Defaults to `16`.
        frozen: bool. Defaults to `False`.
        dropout: float. Defaults to `0`.
        scaling: str. Defaults to `"rank"`.
        down_initializer: initializer. Defaults to `None`.
        up_initializer: initializer. Defaults to `"zeros"`.

    Weights: `kernel`, `bias`, `down` (product of the input axes, rank), `up`
    (rank, product of the output axes), the last two in float32.

    Raises:
        ValueError: if the equation can't be split into an input and an output
            side, or a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    query = keras_dylora.DyLoRAEinsumDense(
        "abc,cde->abde", output_shape=(None, 12, 64), bias_axes="de", rank=8
    )
    query(x).shape  # x: (2, 10, 768) -> (2, 10, 12, 64)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.layers.EinsumDense

    @staticmethod
    def geometry_of(layer: keras.Layer) -> Geometry:
        return Geometry.of_equation(layer.equation, layer.kernel.shape)


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

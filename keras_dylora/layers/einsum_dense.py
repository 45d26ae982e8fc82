"""DyLoRAEinsumDense: an `EinsumDense` layer with a nested adapter."""

import keras

from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAEinsumDense(LowRankAdapter, keras.layers.EinsumDense):
    """An `EinsumDense` layer with a low-rank adapter for every rank.

    The kernel is adapted as a matrix: all of its input axes are flattened to
    one side, and all of its output axes to the other. For example, an attention
    query `"abc,cde->abde"` has a kernel of `(768, 12, 64)`, which is adapted as
    a matrix of 768×768.

    Args:
        equation: str. As in `keras.layers.EinsumDense`, like every argument
            that isn't listed here. No axis may be in the input, the kernel
            and the output at once.
        output_shape: int or tuple, as in `keras.layers.EinsumDense`.
        rank: int. Maximum rank. It and all arguments below are as in
            `DyLoRADense`. Defaults to `8`.
        min_rank: int. Defaults to `1`.
        alpha: float. Defaults to `16`.
        frozen: bool. Defaults to `False`.
        dropout: float. Defaults to `0`.
        scaling: str. Defaults to `"rank"`.
        down_initializer: initializer. Defaults to `None`.
        up_initializer: initializer. Defaults to `"zeros"`.

    Weights: `kernel`, `bias`, `down` `(product of the input axes, rank)` and
    `up` `(rank, product of the output axes)`. `down` and `up` are in float32.

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

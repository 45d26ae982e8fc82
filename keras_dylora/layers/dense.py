"""DyLoRADense: a `Dense` layer with a nested adapter."""

import keras

from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRADense(LowRankAdapter, keras.layers.Dense):
    """A `Dense` layer with a low-rank adapter that works at every rank.

    At rank `b`, the layer computes (Eq. 7)

    `activation(x @ kernel + bias + (alpha / b) * x @ down[:, :b] @ up[:b, :])`

    The kernel and the bias are frozen. In a `DyLoRAModel`, the layer trains at
    the rank that the model draws for each step. In a plain `keras.Model`, it
    trains at its active rank, which is the maximum unless `set_rank` changed
    it.

    Args:
        units: int. As in `keras.layers.Dense`, like every argument that isn't
            listed here.
        rank: int. The maximum rank. The layer computes at `active_rank`.
            Defaults to `8`.
        min_rank: int. The lowest rank that a `DyLoRAModel` draws. Defaults to
            `1`.
        alpha: float. The scale: the adapter is multiplied by `alpha / b` at
            rank `b`. Defaults to `16`.
        frozen: bool. Whether only column and row `b` get a gradient at rank
            `b` (Eq. 10). Defaults to `False`.
        dropout: float in `[0, 1)`. Dropout on the adapter's input. Defaults
            to `0`.
        scaling: str. As in `DyLoRAConfig`. Defaults to `"rank"`, which is
            `alpha / b`.
        down_initializer: initializer of `down`. Defaults to `None`: uniform
            between `-1 / sqrt(fan_in)` and `1 / sqrt(fan_in)`.
        up_initializer: initializer of `up`. Defaults to `"zeros"`.

    Input shape: `(batch, ..., inputs)`. Output shape: `(batch, ..., units)`.
    Weights: `kernel` `(inputs, units)`, `bias` `(units,)`, `down`
    `(inputs, rank)` and `up` `(rank, units)`. `down` and `up` are in float32.

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

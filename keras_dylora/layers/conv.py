"""DyLoRAConv1D, 2D, 3D: convolutions with a nested adapter."""

from typing import Any

import keras
from keras import ops

from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter


class ConvAdapter(LowRankAdapter):
    """The part that all adapters of convolutions share.

    `down` is a kernel of the layer's size with `rank` filters, and `up` is a
    kernel of size 1. So the update of the kernel, as a matrix of
    `(size * channels, filters)`, has a low rank. If the kernel has groups of
    channels, all groups share one `down`.
    """

    filters: int
    groups: int
    data_format: str
    kernel_size: tuple[int, ...]

    @staticmethod
    def geometry_of(layer: keras.Layer) -> Geometry:
        *inputs, filters = layer.kernel.shape
        return Geometry(
            tuple(inputs), (filters,), tuple(range(len(layer.kernel.shape)))
        )

    # A convolution of Keras stores its number of axes as `rank`, and its own
    # methods read that, also while the layer has its original class for a call.
    # So the adapter's rank is stored under another name.

    @property
    def rank(self) -> int:
        """int. The maximum rank of the adapter."""
        for name in ("_max_rank", "rank"):
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError("A layer has a rank once it is initialized.")

    @rank.setter
    def rank(self, value: int) -> None:
        known = "rank" in self.__dict__
        self.__dict__["_max_rank" if known else "rank"] = value

    def _build_base(self, input_shape):
        rank = self.rank
        self.__dict__.pop("_max_rank", None)
        super()._build_base(input_shape)
        self.rank = rank

    def downgrade(self) -> None:
        axes = self.__dict__["rank"]
        super().downgrade()
        self.__dict__.pop("_max_rank", None)
        self.__dict__["rank"] = axes

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._call_adapted("call", inputs, training)

    def _project(self, inputs, down, training):
        inputs = ops.cast(inputs, self.compute_dtype)
        kernel = ops.reshape(down, (*self._geometry.inputs, -1))
        x = self.convolution_op(
            self._dropped(inputs, training),
            ops.tile(kernel, (*[1] * (len(kernel.shape) - 1), self.groups)),
        )
        if self.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        kept = *ops.shape(x)[:-1], self.groups
        return ops.reshape(x, (-1, down.shape[1])), kept

    def _expand(self, bottleneck, up, kept):
        *kept, groups = kept
        if groups > 1:
            parts = ops.reshape(bottleneck, (-1, groups, up.shape[0]))
            up = ops.reshape(up, (up.shape[0], groups, -1))
            x = ops.einsum("ngr,rgf->ngf", parts, up)
        else:
            x = bottleneck @ up
        x = ops.reshape(x, (*kept, self.filters))
        if self.data_format == "channels_first":
            x = ops.moveaxis(x, -1, 1)
        return x


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAConv1D(ConvAdapter, keras.layers.Conv1D):
    """A `Conv1D` layer with an adapter, as `DyLoRAConv2D` on one axis.

    Args:
        *args: as in `keras.layers.Conv1D`.
        **kwargs: as in `keras.layers.Conv1D` and `DyLoRAConv2D`.

    Raises:
        ValueError: if a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    layer = keras_dylora.DyLoRAConv1D(16, 5, padding="causal", rank=4)
    layer(x).shape  # x: (2, 100, 8) -> (2, 100, 16)
    ```
    """

    original_class = keras.layers.Conv1D

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        if self.padding != "causal":
            return super().convolution_op(inputs, kernel)
        before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
        pad = [[0, 0], [before, 0], [0, 0]]
        if self.data_format == "channels_first":
            pad[1:] = pad[:0:-1]
        return ops.conv(
            ops.pad(inputs, pad),
            kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAConv2D(ConvAdapter, keras.layers.Conv2D):
    """A `Conv2D` layer with a low-rank adapter that works at every rank.

    At rank `b`, the layer convolves with the kernel (Eq. 7)

    `kernel + (alpha / b) * down[:, :b] @ up[:b, :]`

    where each kernel is a matrix of `(size * channels, filters)`. It computes
    the adapter as two convolutions: one with `b` filters, then one of size 1.

    Args:
        filters: int. As in `keras.layers.Conv2D`, like every argument that
            isn't listed here.
        kernel_size: int or tuple of two ints.
        rank: int. Maximum rank. It and all arguments below are as in
            `DyLoRADense`. Defaults to `8`.
        min_rank: int. Defaults to `1`.
        alpha: float. Defaults to `16`.
        frozen: bool. Defaults to `False`.
        dropout: float. Defaults to `0`.
        scaling: str. Defaults to `"rank"`.
        down_initializer: initializer. Defaults to `None`, as in
            `DyLoRADense`.
        up_initializer: initializer. Defaults to `"zeros"`.

    Weights: `kernel` `(*kernel_size, channels / groups, filters)`, `bias`
    `(filters,)`, `down` `(size of the kernel * channels / groups, rank)` and
    `up` `(rank, filters)`. `down` and `up` are in float32.

    Raises:
        ValueError: if a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    layer = keras_dylora.DyLoRAConv2D(64, 3, strides=2, rank=4)
    layer(x).shape  # x: (2, 33, 33, 8) -> (2, 16, 16, 64)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAConv3D(ConvAdapter, keras.layers.Conv3D):
    """A `Conv3D` layer with an adapter, as `DyLoRAConv2D` on three axes.

    Args:
        *args: as in `keras.layers.Conv3D`.
        **kwargs: as in `keras.layers.Conv3D` and `DyLoRAConv2D`.

    Raises:
        ValueError: if a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    layer = keras_dylora.DyLoRAConv3D(16, 3, padding="same", rank=4)
    layer(x).shape  # x: (2, 9, 32, 32, 8) -> (2, 9, 32, 32, 16)
    ```
    """

    original_class = keras.layers.Conv3D

"""The two tensors of a layer's adapter in PEFT, and its `Factors`.

`lora_A` is `(rank, inputs)` and `lora_B` is `(outputs, rank)`. For a
convolution, they are kernels of torch: `(rank, channels, *size)` and
`(outputs, rank, 1, …)`.
"""

import math

import numpy as np

from keras_dylora.layers.factors import Factors
from keras_dylora.layers.kinds import CONVOLUTIONS, matrix_shape


def kernel_size(layer):
    """The size of the kernel of a convolution; `()` for any other layer."""
    return layer.kernel_size if isinstance(layer, CONVOLUTIONS) else ()


def shapes(layer, rank, outputs):
    """The shapes of both tensors, at a rank and for a number of outputs."""
    inputs, size = matrix_shape(layer)[0], kernel_size(layer)
    down = rank, inputs // math.prod(size), *size
    return down, (outputs, rank, *(1 for _ in size))


def of_factors(factors, size):
    """Both tensors of `Factors`, for a kernel of a size."""
    down = factors.down.reshape(*size, -1, factors.rank)
    down = np.moveaxis(down, (-1, -2), (0, 1))
    return down, factors.up.T.reshape(-1, factors.rank, *(1 for _ in size))


def to_factors(down, up, scale):
    """Undoes `of_factors`."""
    rank = len(down)
    down = np.moveaxis(down, (0, 1), (-1, -2))
    return Factors(down.reshape(-1, rank), up.reshape(-1, rank).T, scale)

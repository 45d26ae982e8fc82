"""A model of one adapted linear layer, and what it must compute."""

import keras
import numpy as np

import keras_dylora as kd
from tests import backend
from tests.models import randomize

RANK, ALPHA = 4, 8.0


def linear(**options):
    """A model of one adapted linear layer."""
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA, **options)
    model = kd.DyLoRAModel(inputs, layer(inputs), seed=3, draw="example")
    return randomize(model), layer


def gates_of(ranks, scales):
    """A row for each example, of its rank and scale."""
    first = np.arange(RANK) < np.array(ranks)[:, None]
    return first * np.broadcast_to(scales, len(ranks))[:, None]


def outputs_at(layer, x, rank):
    kernel, bias = backend.snapshot([layer.kernel, layer.bias])
    return x @ (kernel + layer.delta_kernel(rank)) + bias


def batches(size, seed=3):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(size, 5)), rng.normal(size=(size, 3))
    return x.astype("float32"), y.astype("float32")

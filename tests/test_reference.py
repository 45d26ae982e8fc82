"""The numbers of the authors' code for one adapted linear layer."""

import pathlib

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend

REFERENCE = np.load(pathlib.Path(__file__).parent / "data/linear_rank8.npz")
RANKS = range(1, 9)


def close(actual, expected):
    actual = backend.to_numpy(actual)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, error


def reference_layer(frozen):
    layer = kd.DyLoRADense(16, rank=8, alpha=16, frozen=frozen)
    layer.build((None, 24))
    for name in ("kernel", "bias", "down", "up"):
        getattr(layer, name).assign(REFERENCE[name].astype("float32"))
    return layer


def loss_of(layer, x):
    upstream = REFERENCE["upstream"].astype("float32")
    return lambda: keras.ops.sum(keras.ops.multiply(layer(x), upstream))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize("rank", RANKS)
def test_forward_and_gradients(rank, frozen):
    layer = reference_layer(frozen)
    layer.set_rank(rank)
    x = keras.Variable(REFERENCE["x"].astype("float32"))
    prefix = "frozen_" if frozen else ""
    close(layer(x), REFERENCE[f"{prefix}y"][rank - 1])
    found = backend.gradients(loss_of(layer, x), [layer.down, layer.up, x])
    for gradient, name in zip(found, ("down", "up", "x"), strict=True):
        close(gradient, REFERENCE[f"{prefix}grad_{name}"][rank - 1])


SEQUENCE = REFERENCE["rank_sequence"]
OPTIMIZERS = {
    "sgd": lambda lr: keras.optimizers.SGD(lr),
    "momentum": lambda lr: keras.optimizers.SGD(lr, momentum=0.9),
    "adamw": lambda lr: keras.optimizers.AdamW(
        lr, weight_decay=0.1, epsilon=1e-12
    ),
}


def oracle(momentum, frozen, learning_rate):
    """The authors' SGD trajectory restated in float64 NumPy."""
    kernel, bias, down, up, x, upstream = (
        REFERENCE[name].copy()
        for name in ("kernel", "bias", "down", "up", "x", "upstream")
    )
    velocity = [0.0, 0.0]
    for b in SEQUENCE:
        gate = np.where(np.arange(8) < b, 16 / b, 0)
        y = x @ kernel + bias + (x @ down * gate) @ up
        dy = 2 * (y - upstream) / y.size
        grads = [x.T @ (dy @ up.T * gate), (x @ down * gate).T @ dy]
        if frozen:
            newest = np.arange(8) == b - 1
            grads[0] = np.where(newest, grads[0], 0)
            grads[1] = np.where(newest[:, None], grads[1], 0)
        velocity = [
            momentum * v + g for v, g in zip(velocity, grads, strict=True)
        ]
        down -= learning_rate * velocity[0]
        up -= learning_rate * velocity[1]
    return down, up


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "momentum", "frozen"),
    [("sgd", 0.0, False), ("momentum", 0.9, False), ("frozen_sgd", 0.0, True)],
)
def test_oracle_is_the_reference(name, momentum, frozen):
    # At the reference's learning rate of 0.01 these runs diverge: most of the
    # numbers are NaN, in the reference and here, and the rest must agree.
    down, up = oracle(momentum, frozen, 0.01)
    np.testing.assert_allclose(down, REFERENCE[f"{name}_down"], rtol=1e-6)
    np.testing.assert_allclose(up, REFERENCE[f"{name}_up"], rtol=1e-6)


def trajectory(optimizer, frozen, learning_rate):
    inputs = keras.Input((24,))
    layer = reference_layer(frozen)
    model = kd.DyLoRAModel(inputs, layer(inputs))
    model.compile(OPTIMIZERS[optimizer](learning_rate), "mse")
    model._dylora.draw = lambda position: keras.ops.take(
        keras.ops.convert_to_tensor(SEQUENCE.astype("int32")),
        keras.ops.cast(position, "int32"),
    )
    x, y = (REFERENCE[k].astype("float32") for k in ("x", "upstream"))
    drawn = [
        int(model.train_on_batch(x, y, return_dict=True)["rank"])
        for _ in SEQUENCE
    ]
    assert drawn == list(SEQUENCE)
    return layer


def test_adamw_trajectory():
    layer = trajectory("adamw", False, 0.01)
    close(layer.down, REFERENCE["adamw_down"])
    close(layer.up, REFERENCE["adamw_up"])


@pytest.mark.parametrize(
    ("optimizer", "momentum", "frozen"),
    [("sgd", 0.0, False), ("momentum", 0.9, False), ("sgd", 0.0, True)],
    ids=["sgd", "momentum", "sgd-frozen"],
)
def test_sgd_trajectory_at_a_stable_learning_rate(optimizer, momentum, frozen):
    layer = trajectory(optimizer, frozen, 1e-3)
    down, up = oracle(momentum, frozen, 1e-3)
    close(layer.down, down)
    close(layer.up, up)

"""Ranks in steps of one's own: `rank_scope` and `draw_ranks`."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from examples import own_loop
from tests import backend
from tests.linear import ALPHA, RANK, batches, gates_of, linear, outputs_at
from tests.models import randomize, roberta_classifier, tokens
from tests.test_ranks import oracle_for_examples


def test_rank_scope_in_a_loss():
    """The gradient is that of the rank of the scope, on every backend."""
    model, layer = linear()
    x, _ = batches(6)
    down, up = backend.snapshot([layer.down, layer.up])

    def loss():
        with model.rank_scope(3), model.rank_scope(2):
            outputs = model(x)
        return keras.ops.sum(outputs) + 0 * keras.ops.sum(model(x))

    found = backend.gradients(loss, [layer.down, layer.up])
    dy = np.ones((6, 3))
    gate = np.where(np.arange(RANK) < 2, ALPHA / 2, 0)
    np.testing.assert_allclose(found[0], x.T @ (dy @ up.T * gate), rtol=1e-4)
    np.testing.assert_allclose(found[1], (x @ down * gate).T @ dy, rtol=1e-4)
    assert model.rank == RANK
    np.testing.assert_allclose(
        model.predict(x, verbose=0), outputs_at(layer, x, RANK), atol=1e-5
    )


def test_rank_scope_in_a_step():
    """A teacher within the step: the student trains at the drawn rank still."""

    class Distilled(kd.DyLoRAModel):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            with self.rank_scope(0):
                targets = keras.ops.stop_gradient(self(x))
            return keras.ops.mean((y_pred - targets) ** 2)

    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA)
    model = randomize(Distilled(inputs, layer(inputs), seed=1))
    down, up = backend.snapshot([layer.down, layer.up])
    x, y = batches(16)
    model.compile(keras.optimizers.SGD(1.0))
    logs = model.train_on_batch(x, y, return_dict=True)
    rank = int(logs["rank"])
    assert rank < RANK
    gate = np.where(np.arange(RANK) < rank, ALPHA / rank, 0)
    error = (x @ down * gate) @ up
    np.testing.assert_allclose(
        float(logs["loss"]), np.mean(error**2), rtol=1e-5
    )
    moved = down - x.T @ (2 * error / error.size @ up.T * gate)
    np.testing.assert_allclose(backend.to_numpy(layer.down), moved, atol=1e-5)
    assert model.rank == RANK


def test_a_loop_of_your_own():
    before, after = own_loop.main([])
    x, y = own_loop.data()
    kernel, *_ = np.linalg.lstsq(x, y, rcond=None)
    singular = np.linalg.svd(kernel, compute_uv=False)
    for b in range(1, 5):
        # The best that rank b can do; inputs are white noise.
        best = np.sum(singular[b:] ** 2) / y.shape[1]
        assert (
            after.metrics[b]["loss"] < best + 0.05 * before.metrics[b]["loss"]
        )


def test_drawn_ranks_are_those_of_fit():
    model, layer = linear()
    down, up = backend.snapshot([layer.down, layer.up])
    x, y = batches(16)
    losses = []

    def loss():
        with model.draw_ranks(x):
            outputs = model(x, training=True)
        return keras.ops.mean((outputs - keras.ops.convert_to_tensor(y)) ** 2)

    if backend.NAME == "jax":
        with pytest.raises(ValueError, match="needs the state"):
            backend.gradients(loss, [layer.down])
    for _ in range(3):
        losses.append(float(backend.to_numpy(loss())))
    probabilities = kd.Uniform().probabilities(1, RANK)
    kernel, bias = backend.snapshot([layer.kernel, layer.bias])
    for position, found in enumerate(losses):
        drawn = oracle_for_examples(probabilities, 1, 3, position, 16)
        gates = gates_of(drawn, ALPHA / np.array(drawn))
        error = x @ kernel + bias + (x @ down * gates) @ up - y
        assert found == pytest.approx(np.mean(error**2), rel=1e-5)
    assert model.rank == RANK


@pytest.mark.parametrize("fields", [{"frozen": True}, {"objective": "summed"}])
def test_what_takes_more_than_a_call(fields):
    model = kd.enable_dylora(roberta_classifier(), rank=2, **fields)
    with pytest.raises(ValueError, match="train with `fit`"):
        with model.draw_ranks(tokens()):
            pass


@pytest.mark.skipif(backend.NAME == "torch", reason="torch traces it")
def test_only_torch_needs_a_traced_step():
    model, _ = linear()
    with pytest.raises(ValueError, match=f"Received: {backend.NAME}"):
        model.traced(lambda x, y: None)

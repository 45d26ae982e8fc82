"""The order of the columns: what is kept, what turns, what is refused."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.factors import Factors
from tests import backend
from tests.linear import RANK, batches, linear
from tests.models import (
    classification_loss,
    labels,
    mlp,
    progressive_mlp,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)


def factors(rank=RANK, inputs=7, outputs=5, seed=0):
    rng = np.random.default_rng(seed)
    return Factors(
        rng.normal(size=(inputs, rank)).astype("float32"),
        rng.normal(size=(rank, outputs)).astype("float32"),
        2.0,
    )


def test_ordered_factors():
    old = factors()
    new, turn, back = old.ordered()
    np.testing.assert_allclose(new.product(), old.product(), atol=1e-5)
    singular = np.linalg.svd(old.down @ old.up, compute_uv=False)[:RANK]
    for gram in (new.down.T @ new.down, new.up @ new.up.T):
        np.testing.assert_allclose(gram, np.diag(singular), atol=1e-5)
    np.testing.assert_allclose(old.down @ turn, new.down, atol=1e-5)
    np.testing.assert_allclose(back @ old.up, new.up, atol=1e-5)
    np.testing.assert_allclose(turn @ back, np.eye(RANK), atol=1e-9)


@pytest.mark.parametrize("inputs", [3, 7])
def test_columns_without_a_share_can_still_be_trained(inputs):
    old = factors(inputs=inputs)
    old.up[2] = old.up[1]
    old.down[:, 2] = old.down[:, 1]
    new, turn, back = old.ordered()
    np.testing.assert_allclose(new.product(), old.product(), atol=1e-5)
    used = new.up.any(axis=1)
    turned = (old.down @ turn)[:, used]
    np.testing.assert_allclose(turned, new.down[:, used], atol=1e-5)
    np.testing.assert_allclose(back @ old.up, new.up, atol=1e-5)
    assert (np.linalg.norm(new.down, axis=0) > 0.1).all()
    assert not new.up[-1].any()


def test_an_adapter_that_was_not_trained_stays():
    old = Factors(factors().down, np.zeros((RANK, 5), "float32"), 2.0)
    new, *turns = old.ordered()
    np.testing.assert_array_equal(new.down, old.down)
    np.testing.assert_array_equal(turns, [np.eye(RANK)] * 2)


def test_what_the_optimizer_keeps_turns_with_the_columns():
    """Momentum is as if the gradients had been of the turned columns."""
    model, layer = linear(scaling="constant", min_rank=RANK)
    old = layer.factors()
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    model.train_on_batch(*batches(16))
    kd.order_ranks(model)
    new = backend.snapshot(model.optimizer.variables)
    other, _ = linear(scaling="constant", min_rank=RANK)
    (twin,) = other.dylora_layers
    ordered, *_ = old.ordered()
    twin.down.assign(ordered.down)
    twin.up.assign(ordered.up)
    other.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    other.train_on_batch(*batches(16))
    for a, b in zip(new, other.optimizer.variables, strict=True):
        np.testing.assert_allclose(a, backend.to_numpy(b), atol=1e-6)


@pytest.mark.once
def test_a_lora_can_be_cut_once_it_is_ordered():
    model = kd.enable_dylora(
        randomize(roberta_classifier()),
        rank=RANK,
        min_rank=RANK,
        scaling="sqrt",
    )
    randomize_adapters(model)
    model.compile(keras.optimizers.Adam(0.01), classification_loss())
    x = tokens()
    model.fit(x, labels(), verbose=0)
    whole = model.predict(x, verbose=0)
    assert kd.order_ranks(model) is model
    config = model.dylora_config
    assert (config.scaling, config.alpha) == ("constant", 16 * RANK**0.5)
    np.testing.assert_allclose(model.predict(x, verbose=0), whole, atol=1e-5)
    (layer, *_) = model.dylora_layers
    product = layer.factors().product().astype("float64")
    singular = np.linalg.svd(product, compute_uv=False)
    for b in range(1, RANK):
        rest = product - layer.factors(b).product()
        np.testing.assert_allclose(
            np.linalg.norm(rest, 2), singular[b], rtol=1e-4
        )
    plain = kd.merge(model, 2).predict(x, verbose=0)
    with warnings.catch_warnings(action="error", category=UserWarning):
        kd.truncate(model, 2)
    cut = model.predict(x, verbose=0)
    np.testing.assert_allclose(cut, plain, atol=1e-5)
    assert np.abs(cut - whole).max() > 1e-4


def test_ordering_what_was_trained_nested_says_what_is_lost():
    model = randomize_adapters(mlp())
    with pytest.warns(UserWarning, match=r"ranks 1\.\.3.*is lost"):
        kd.order_ranks(model)
    assert model.dylora_config.scaling == "constant"


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_order_that_loses_nothing_warns_of_nothing():
    for model in (
        mlp(),  # never trained
        randomize_adapters(mlp(scaling="constant")),
        randomize_adapters(mlp(min_rank=4)),
        randomize_adapters(progressive_mlp(3)),
    ):
        kd.order_ranks(model)


def test_an_adapter_that_diverged_is_not_ordered():
    model = randomize_adapters(mlp())
    layer = model.dylora_layers[1]
    layer.up.assign(np.full(layer.up.shape, np.nan, "float32"))
    before = backend.snapshot(model.dylora_layers[0].weights)
    with pytest.raises(ValueError, match="finite.*Received: NaN.*second"):
        kd.order_ranks(model)
    for a, b in zip(before, model.dylora_layers[0].weights, strict=True):
        np.testing.assert_array_equal(a, backend.to_numpy(b))

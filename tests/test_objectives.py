"""The objectives that draw no rank: summed and matryoshka."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import (
    classification_loss,
    labels,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

RANK, ALPHA = 4, 8.0
DISTRIBUTION = kd.Categorical({1: 1, 2: 3, 4: 4})
PROBABILITIES = {1: 1 / 8, 2: 3 / 8, 4: 4 / 8}


def model_of(objective, min_rank=1, distribution=DISTRIBUTION):
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, min_rank=min_rank, alpha=ALPHA)
    model = kd.DyLoRAModel(
        inputs,
        layer(inputs),
        objective=objective,
        rank_distribution=distribution,
    )
    return randomize(model)


def data():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 3))
    return x.astype("float32"), y.astype("float32")


def gate_at(rank):
    return np.where(np.arange(RANK) < rank, ALPHA / rank, 0)


def gradients(weights, gate):
    """Loss and gradients of the mean squared error, in NumPy."""
    kernel, bias, down, up = weights
    x, y = data()
    error = x @ kernel + bias + (x @ down * gate) @ up - y
    dy = 2 * error / error.size
    return (
        np.mean(error**2),
        x.T @ (dy @ up.T * gate),
        (x @ down * gate).T @ dy,
    )


def expected(objective, weights):
    if objective == "matryoshka":
        gate = sum(gate_at(b) for b in PROBABILITIES)
        return gradients(weights, gate)
    parts = {b: gradients(weights, gate_at(b)) for b in PROBABILITIES}
    return [
        sum(p * parts[b][i] for b, p in PROBABILITIES.items()) for i in range(3)
    ]


@pytest.mark.parametrize("objective", ["summed", "matryoshka"])
def test_step_against_numpy(objective):
    model = model_of(objective)
    (layer,) = model.dylora_layers
    weights = backend.snapshot([layer.kernel, layer.bias, layer.down, layer.up])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    logs = model.train_on_batch(*data(), return_dict=True)
    loss, down, up = expected(objective, weights)
    np.testing.assert_allclose(float(logs["loss"]), loss, rtol=1e-5)
    for variable, old, gradient in (
        (layer.down, weights[2], down),
        (layer.up, weights[3], up),
    ):
        np.testing.assert_allclose(
            backend.to_numpy(variable), old - 0.1 * gradient, atol=1e-5
        )


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_summed_activity_regularization_is_of_the_same_rank(run_eagerly):
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA, activity_regularizer="l2")
    model = kd.DyLoRAModel(
        inputs,
        keras.layers.Dropout(0.0)(layer(inputs)),
        objective="summed",
        rank_distribution=DISTRIBUTION,
    )
    randomize(model)
    kernel, bias, down, up = backend.snapshot(
        [layer.kernel, layer.bias, layer.down, layer.up]
    )
    x, y = data()
    total, moved = 0, 0
    for b, p in PROBABILITIES.items():
        gate = gate_at(b)
        z = x @ kernel + bias + (x @ down * gate) @ up
        total += p * (np.mean((z - y) ** 2) + 0.01 * np.sum(z**2) / len(x))
        dz = 2 * (z - y) / z.size + 0.02 * z / len(x)
        moved = moved + p * (x @ down * gate).T @ dz
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=run_eagerly)
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(float(logs["loss"]), total, rtol=1e-5)
    np.testing.assert_allclose(
        backend.to_numpy(layer.up), up - 0.1 * moved, atol=1e-5
    )
    evaluated = model.evaluate(x, y, verbose=0)
    assert np.isfinite(evaluated)


def test_summed_metrics_are_of_the_highest_rank_that_is_trained():
    model = model_of("summed", distribution=kd.Categorical({1: 1, 2: 1}))
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    x, y = data()
    logs = model.train_on_batch(x, y, return_dict=True)
    with model.rank_scope(2):
        expected = model.test_on_batch(x, y, return_dict=True)
    assert logs["mae"] == pytest.approx(float(expected["mae"]), rel=1e-5)


def test_matryoshka_gate_of_the_paper():
    """Algorithm 1: g_i is the sum over trained ranks r >= i of 1 / sqrt(r)."""
    model = kd.enable_dylora(
        roberta_classifier(num_layers=1),
        rank=4,
        alpha=1.0,
        scaling="sqrt",
        objective="matryoshka",
        rank_distribution=kd.Categorical({1: 5, 2: 1, 4: 1}),
    )
    adaptation = model._dylora
    gates, _ = adaptation.objective.gate(adaptation, 1)
    paper = [1 + 0.5**0.5 + 0.5, 0.5**0.5 + 0.5, 0.5, 0.5]
    assert gates.keys() == adaptation.layers.keys()
    for gate in gates.values():
        np.testing.assert_allclose(backend.to_numpy(gate), paper, rtol=1e-6)


@pytest.mark.parametrize(
    "objective", once(["summed", "matryoshka"], but=["summed"])
)
def test_every_rank_learns_and_inference_is_unchanged(objective):
    model = kd.enable_dylora(
        roberta_classifier(dropout=0.1, num_layers=1),
        rank=3,
        objective=objective,
    )
    randomize(model)
    model.compile(
        keras.optimizers.AdamW(0.01),
        classification_loss(),
        metrics=["accuracy"],
    )
    x, y = tokens(), labels()
    before = kd.evaluate_ranks(model, x, y, verbose=0).values("loss")
    with backend.count_compilations(model) as counts:
        history = model.fit(x, y, epochs=8, batch_size=8, verbose=0).history
    assert "rank" not in history, "no rank is drawn"
    assert model.rank == 3
    if backend.NAME != "torch":  # which compiles nothing
        # TensorFlow traces the first step twice, to make its metrics.
        assert all(count <= 2 for count in counts.values()), counts
    after = kd.evaluate_ranks(model, x, y, verbose=0).values("loss")
    assert (np.array(after) < np.array(before)).all()
    with model.rank_scope(2):
        (first, *_) = model.dylora_layers
        np.testing.assert_allclose(
            backend.to_numpy(first._gate.value("float32")), [8.0, 8.0, 0.0]
        )


@pytest.mark.once
def test_summed_in_mixed_precision_with_a_head_of_its_own():
    """Loss scaling and a model whose `call` takes no `training`."""

    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.query = keras.layers.Dense(6, name="query")
            self.head = keras.layers.Dense(3, dtype="float32", name="head")

        def call(self, x):
            return self.head(self.query(x))

    keras.config.set_dtype_policy("mixed_float16")
    model = Plain()
    x, y = data()
    model(x)
    kd.enable_dylora(
        model,
        rank=2,
        objective="summed",
        target_layers="query",
        trainable_layers="head",
    )
    randomize_adapters(model)
    model.compile("adam", "mse")
    losses = model.fit(x, y, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("objective", ["summed", "matryoshka"])
def test_saved_with_the_model(objective, tmp_path):
    model = model_of(objective)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.dylora_config == model.dylora_config
    assert loaded.dylora_config.objective == objective


@pytest.mark.parametrize("objective", ["summed", "matryoshka"])
def test_frozen_needs_a_drawn_rank(objective):
    with pytest.raises(ValueError, match="objective='sampled'.*Received"):
        kd.DyLoRAConfig(objective=objective, frozen=True)


def test_summed_losses_of_outputs_are_of_the_highest_rank():
    inputs = keras.Input((5,))
    common = {"rank": RANK, "alpha": ALPHA}
    outputs = {
        "a": kd.DyLoRADense(3, name="a", **common)(inputs),
        "b": kd.DyLoRADense(3, name="b", **common)(inputs),
    }
    model = randomize(kd.DyLoRAModel(inputs, outputs, objective="summed"))
    model.compile(keras.optimizers.SGD(0.0), {"a": "mse", "b": "mse"})
    x, y = data()
    logs = model.train_on_batch(x, {"a": y, "b": y}, return_dict=True)
    expected = model.test_on_batch(x, {"a": y, "b": y}, return_dict=True)
    for name in ("a_loss", "b_loss"):
        assert logs[name] == pytest.approx(float(expected[name]), rel=1e-5)
    assert logs["loss"] != pytest.approx(float(expected["loss"]), rel=1e-3)

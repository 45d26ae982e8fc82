"""What optimizers keep turns with the columns of the adapters."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import mlp, randomize

optimizers = keras.optimizers


def of_each_side():
    other = optimizers.Adamax(0.01)
    rest = optimizers.OptimizerMap(optimizers.Ftrl(0.1))
    rest[".*down"] = other
    return optimizers.MultiOptimizer(rest)


OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.01),
    "momentum": lambda: optimizers.SGD(0.002, momentum=0.9),
    "nesterov": lambda: optimizers.SGD(0.002, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optimizers.RMSprop(0.003),
    "rmsprop-centered": lambda: optimizers.RMSprop(
        0.003, momentum=0.5, centered=True
    ),
    "adam": lambda: optimizers.Adam(0.01),
    "amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.01, weight_decay=0.01),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "adamax": lambda: optimizers.Adamax(0.01),
    "adafactor": lambda: optimizers.Adafactor(0.05),
    "nadam": lambda: optimizers.Nadam(0.01),
    "ftrl": lambda: optimizers.Ftrl(0.1),
    "ftrl-regularized": lambda: optimizers.Ftrl(
        0.1,
        l1_regularization_strength=1e-4,
        l2_regularization_strength=1e-3,
        beta=0.1,
    ),
    "lion": lambda: optimizers.Lion(0.002),
    "lamb": lambda: optimizers.Lamb(0.01),
    "muon": lambda: optimizers.Muon(0.01),
    "loss-scale": lambda: optimizers.LossScaleOptimizer(
        optimizers.Adamax(0.01), initial_scale=16.0
    ),
    "ema": lambda: optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "accumulation": lambda: optimizers.Adam(
        0.01, gradient_accumulation_steps=3
    ),
}
if hasattr(optimizers, "MultiOptimizer"):  # Keras 3.15
    OPTIMIZERS["several"] = of_each_side
if hasattr(optimizers, "ScheduleFreeAdamW"):
    OPTIMIZERS["schedule-free"] = lambda: optimizers.ScheduleFreeAdamW(0.01)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 10)).astype("float32")
    y = x @ rng.normal(size=(10, 3)) + np.sin(2 * x[:, :3])
    return x, y.astype("float32")


def trained(optimizer, epochs=12, **fields):
    """A model, trained at its full rank, and a function that goes on."""
    fields = {"min_rank": 4, "scaling": "constant", **fields}
    model = randomize(mlp(**fields))
    model.compile(optimizer, "mse")

    def losses(epochs):
        x, y = data()
        history = model.fit(
            x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0
        )
        return history.history["loss"]

    return model, losses, losses(epochs)


COMPILED = ["adam", "adafactor", "accumulation"]


@pytest.mark.parametrize("name", once(OPTIMIZERS, but=COMPILED))
def test_training_goes_on_behind_the_order(name):
    if name == "ema" and backend.NAME == "jax":
        pytest.skip("Keras can't call fit twice with `use_ema` there (3.15)")
    model, losses, before = trained(OPTIMIZERS[name]())
    x, y = data()
    whole = model.predict(x, verbose=0)
    with warnings.catch_warnings(action="error", category=UserWarning):
        kd.order_ranks(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), whole, atol=1e-4)
    after = losses(4)
    assert np.isfinite(after).all()
    assert max(after) < 1.15 * before[-1]
    assert after[-1] < before[-1]


@pytest.mark.parametrize(
    "name", once(["adam", "adagrad", "adafactor", "ftrl"], but=["adam"])
)
def test_columns_that_depend_on_each_other(name):
    """A layer of six outputs has no more than six columns of its own."""
    model, losses, before = trained(OPTIMIZERS[name](), rank=8)
    kd.order_ranks(model)
    after = losses(4)
    assert np.isfinite(after).all()
    assert after[-1] < before[-1]


class Own(keras.optimizers.Optimizer):
    """An optimizer with a slot of its own, which begins at 0.5."""

    def build(self, variables):
        super().build(variables)
        half = keras.initializers.Constant(0.5)
        self.kept = self.add_optimizer_variables(
            variables, "memory", initializer=half
        )

    def update_step(self, gradient, variable, learning_rate):
        kept = self.kept[self._get_variable_index(variable)]
        self.assign(kept, 0.9 * kept + gradient**2)
        rate = keras.ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, rate * gradient / (kept + 1) ** 0.5)


def test_an_optimizer_that_is_not_known_begins_anew():
    model, losses, _ = trained(Own(0.01), epochs=1)
    kept = [v for v in model.optimizer.variables if v.name.endswith("_memory")]
    head = backend.snapshot([v for v in kept if "head" in v.name])
    with pytest.warns(UserWarning, match="Received: .*Own.*keeps.*memory"):
        kd.order_ranks(model)
    adapters = [v for v in kept if "head" not in v.name]
    assert len(adapters) == 4
    for value in backend.snapshot(adapters):
        np.testing.assert_array_equal(value, 0.5)
    after = backend.snapshot([v for v in kept if "head" in v.name])
    for a, b in zip(head, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(losses(1)).all()

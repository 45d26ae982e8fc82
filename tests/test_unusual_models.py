"""Models of an unusual make: partly built, or with their own `compile`."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests.models import (
    mlp_data,
    randomize_adapters,
)


class Half(keras.Layer):
    """A layer of two layers that calls one; the other is never built."""

    def __init__(self):
        super().__init__()
        self.query = keras.layers.Dense(3, name="query")
        self.value = keras.layers.Dense(3, name="value")

    def call(self, inputs):
        return self.query(inputs)


def test_what_a_functional_model_never_builds_is_left_out():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Half()(inputs))
    with pytest.warns(UserWarning, match="left out"):
        kd.enable_dylora(model, rank=2, verbose=0)
    assert [x.name for x in model.dylora_layers] == ["query"]


@keras.saving.register_keras_serializable(package="tests")
class OwnCompile(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(3, name="query")

    def build(self, input_shape):
        self.query.build(input_shape)

    def call(self, x):
        return self.query(x)

    def compile(self, temperature, **kwargs):
        super().compile(**kwargs)
        self.temperature = temperature


def test_a_model_with_a_compile_of_its_own_is_loaded_uncompiled(tmp_path):
    x, y = mlp_data()
    model = OwnCompile()
    model.build(x.shape)
    kd.enable_dylora(model, rank=2, trainable_layers=())
    model.compile(2.0, optimizer="sgd", loss="mse")
    model.fit(x, y, verbose=0)
    randomize_adapters(model)
    model.save(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    with pytest.warns(UserWarning, match="`compile\\(\\)` method is custom"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, kd.DyLoRAModel)
    for other in (loaded, kd.merge(model)):
        found = other.predict(x, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Scaled(keras.layers.Layer):
    def build(self, input_shape):
        self.factor = self.add_weight(
            shape=(), initializer="ones", name="factor"
        )

    def call(self, x):
        return x * self.factor


def test_a_weight_without_axes_keeps_its_shape(tmp_path):
    def make():
        inputs = keras.Input((10,))
        x = keras.layers.Dense(3, name="query")(Scaled(name="scaled")(inputs))
        model = keras.Model(inputs, x)
        return kd.enable_dylora(model, rank=2, trainable_layers=["scaled"])

    model, other = make(), make()
    for each in (model, other):
        for weight in each.weights:
            weight.assign(np.full(weight.shape, 0.5))
    model.get_layer("scaled").factor.assign(3.0)
    kd.save_adapter(model, tmp_path / "adapter")
    kd.load_adapter(other, tmp_path / "adapter")
    factor = other.get_layer("scaled").factor
    assert factor.shape == () and float(factor) == 3.0


class Unbuilt(kd.DyLoRAModel):
    def __init__(self):
        super().__init__()
        self.hidden = kd.DyLoRADense(3, rank=2)

    def call(self, x):
        return self.hidden(x)


def test_fit_without_a_step():
    """A `fit` without a step, as where `BackupAndRestore` has all epochs."""
    model = Unbuilt()
    model.compile("sgd", "mse")
    assert model.fit(*mlp_data(), epochs=0, verbose=0).history == {}

"""The tests of a wheel with one backend alone; `make test-wheel` runs them.

A script and not a test: it must find no package but the wheel's own.
"""

import importlib.util
import os
import pathlib
import sys
import tempfile

import keras
import numpy as np

import keras_dylora as kd


def main():
    backend = keras.backend.backend()
    installed = {
        name
        for name in ("tensorflow", "jax", "torch")
        if importlib.util.find_spec(name)
    }
    assert installed == {backend}, installed
    assert pathlib.Path(kd.__file__).is_relative_to(sys.prefix), kd.__file__
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(16, "tanh", name="query")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))
    kd.enable_dylora(model, rank=4, alpha=4, trainable_layers=["head"])
    model.compile("adam", "mse")
    model.fit(x, y, epochs=2, verbose=0)
    print(kd.evaluate_ranks(model, x, y, verbose=0))
    model.add_adapter("other")
    model.fit(x, y, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        file, adapter = f"{folder}/model.keras", f"{folder}/adapter"
        model.save(file)
        loaded = keras.saving.load_model(file)
        np.testing.assert_allclose(
            loaded.predict(x, verbose=0),
            model.predict(x, verbose=0),
            atol=1e-6,
        )
        kd.save_adapter(model, adapter, rank=2)
        assert sorted(os.listdir(adapter)) == [
            "adapter.safetensors",
            "adapter_config.json",
        ]
    plain = kd.merge(model, rank=2)
    with model.rank_scope(2):
        np.testing.assert_allclose(
            plain.predict(x, verbose=0),
            model.predict(x, verbose=0),
            atol=1e-5,
        )
    print(f"keras_dylora {kd.__version__} works on {backend}")


main()

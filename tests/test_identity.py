"""An adapter finds its layers, and only the model that it is of."""

import json

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

UNNAMED = """
import keras, numpy as np, keras_dylora as kd, sys

def unnamed():
    inputs = keras.Input((8,))
    x = inputs
    for _ in range(4):
        x = keras.layers.Dense(8, "tanh")(x)
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    return model

x = np.random.default_rng(1).normal(size=(5, 8)).astype("float32")
"""
SAVES = (
    UNNAMED
    + """
model = unnamed()
wanted = [model.layers[3], model.layers[4]]
kd.enable_dylora(model, rank=2, trainable_layers=(),
                 target_layers=lambda path, layer: layer in wanted, verbose=0)
rng = np.random.default_rng(2)
for layer in model.dylora_layers:
    layer.up.assign(rng.normal(size=layer.up.shape))
kd.save_adapter(model, sys.argv[1])
print(model.predict(x, verbose=0).tolist())
"""
)
LOADS = (
    UNNAMED
    + """
keras.layers.Dense(1), keras.layers.Dense(1)  # which takes two numbers
model = unnamed()
kd.load_adapter(model, sys.argv[1])
print(model.predict(x, verbose=0).tolist())
"""
)


@pytest.mark.long
def test_layers_without_names_in_another_process(tmp_path):
    folder = tmp_path / "adapter"
    saved, loaded = (
        json.loads(backend.run_python(code, folder).splitlines()[-1])
        for code in (SAVES, LOADS)
    )
    np.testing.assert_allclose(saved, loaded, atol=1e-6)


def enabled(seed=0, **arguments):
    model = randomize(roberta_classifier(**arguments), seed, scale=0.1)
    return randomize_adapters(kd.enable_dylora(model, rank=2, verbose=0))


def saved(tmp_path, **arguments):
    kd.save_adapter(enabled(**arguments), tmp_path / "adapter")
    return tmp_path / "adapter"


def peft(tmp_path, **arguments):
    kd.to_peft(enabled(**arguments), tmp_path / "peft")
    return tmp_path / "peft"


DOORS = {
    "native": (saved, kd.load_adapter),
    "peft": (peft, kd.from_peft),
}


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


def refuses(load, model, folder, message):
    before = backend.snapshot(model.variables)
    with pytest.raises(ValueError, match=message):
        load(model, folder)
    assert not isinstance(model, kd.DyLoRAModel)
    for a, b in zip(before, backend.snapshot(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_deeper_model_is_refused(door, tmp_path):
    save, load = door
    model = randomize(roberta_classifier(num_layers=3), scale=0.1)
    refuses(load, model, save(tmp_path), "as many layers.*for a model of")


def test_another_base_is_refused(door, tmp_path):
    save, load = door
    folder = save(tmp_path)
    model = randomize(roberta_classifier(), seed=7, scale=0.1)
    refuses(load, model, folder, "`strict=False` loads it onto any")
    load(model, folder, strict=False)
    assert model.dylora_config.rank == 2


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("int8", marks=pytest.mark.long)]
)
@pytest.mark.once
def test_the_base_in_another_dtype_is_the_same(door, dtype, tmp_path):
    save, load = door
    folder = save(tmp_path)
    model = randomize(roberta_classifier(), scale=0.1)
    if dtype == "int8":
        model.backbone.quantize("int8")
    else:
        lower = roberta_classifier(dtype=dtype)
        for a, b in zip(lower.weights, model.weights, strict=True):
            a.assign(keras.ops.cast(b, a.dtype))
        model = lower
    load(model, folder)
    low, high = model.predict(tokens(), verbose=0), enabled()
    np.testing.assert_allclose(
        np.asarray(low, "float32"), high.predict(tokens(), verbose=0), atol=0.2
    )


def other_order(name):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="query")(inputs)
    x = keras.layers.LayerNormalization(name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="value")(x))


def test_other_layers_are_refused(tmp_path):
    model = other_order("norm")
    kd.enable_dylora(model, rank=2, trainable_layers=(), verbose=0)
    kd.save_adapter(model, tmp_path / "adapter")
    message = "'norm', a LayerNormalization, in the place of 'scale'"
    refuses(
        kd.load_adapter, other_order("scale"), tmp_path / "adapter", message
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["config"].update(alpha=32.0),
        lambda x: x["model"]["layers"].pop(),
        lambda x: x.pop("model"),
        lambda x: x.pop("sha256_of_this"),
    ],
    ids=["alpha", "layers", "no-model", "no-checksum"],
)
def test_a_changed_configuration_is_refused(change, tmp_path):
    folder = saved(tmp_path)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    model = randomize(roberta_classifier(), scale=0.1)
    refuses(kd.load_adapter, model, folder, "adapter_config.json must be")

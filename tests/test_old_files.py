"""Files that earlier versions wrote, as each `write.py` in `data/` says."""

import json
import pathlib

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.data.before_spec import write as before_spec
from tests.marks import once
from tests.models import (
    gpt2,
    labels,
    mlp_data,
    randomize,
    roberta_classifier,
    tokens,
)

FOLDER = pathlib.Path(__file__).parent / "data" / "v0_1_0"
CLASSIFIERS = ("sampled", "frozen", "summed", "quantized")
HAND_BUILT = ("hand_built", "hand_built_jax", "hand_built_torch", "nested")
# XLA and torch may round a float that is then rounded to eight bits.
ATOL = {"quantized": 1e-2}


def inputs(name):
    if name in HAND_BUILT:
        return mlp_data(4)
    x = tokens(4)
    return x, x["token_ids"] if name == "accumulating" else labels(4)


def assert_outputs(model, name, x, ranks, atol=1e-6):
    with np.load(FOLDER / f"{name}.npz") as expected:
        for rank in ranks:
            with model.rank_scope(rank):
                found = model.predict(x, verbose=0)
            np.testing.assert_allclose(
                found, expected[f"rank_{rank}"], atol=atol, rtol=0
            )


def fit_on(model, name):
    """Trains on; the ranks drawn, and the weights of the adapters then."""
    drawn = []
    for _ in range(6):
        logs = model.train_on_batch(*inputs(name), return_dict=True)
        drawn.append(int(logs.get("rank", 0)))
    weights = [v for x in model.dylora_layers for v in (x.down, x.up)]
    return drawn, np.concatenate(
        [np.ravel(backend.to_numpy(v)) for v in weights]
    )


@pytest.mark.parametrize(
    "name",
    once(
        [*CLASSIFIERS, "accumulating", *HAND_BUILT],
        but=["hand_built_jax"],
    ),
)
def test_model_file(name):
    model = keras.saving.load_model(FOLDER / f"{name}.keras")
    with np.load(FOLDER / f"{name}.npz") as file:
        expected = dict(file)
    assert model.rank == 3
    assert_outputs(model, name, inputs(name)[0], range(5), ATOL.get(name, 1e-6))
    assert int(backend.to_numpy(model._ranks_drawn)) == expected["drawn"]
    drawn, adapters = fit_on(model, name)
    assert drawn == expected["next_ranks"].tolist()
    # Each backend draws dropout of its own.
    if name in ("sampled", "frozen", "summed", "accumulating"):
        np.testing.assert_allclose(
            adapters, expected["adapters_after"], atol=1e-5
        )


def test_distribution_of_a_hand_built_model():
    model = keras.saving.load_model(FOLDER / "hand_built.keras")
    assert model.dylora_config == kd.DyLoRAConfig(
        rank=4,
        alpha=8,
        min_rank=2,
        frozen=True,
        rank_distribution=kd.Categorical({2: 1, 3: 2, 4: 1}),
        seed=3,
    )
    assert [layer.dropout for layer in model.dylora_layers] == [0.5, 0.0]


def test_weights_file():
    model = randomize(roberta_classifier(num_layers=1), seed=9)
    kd.enable_dylora(model, rank=4, frozen=True)
    model.load_weights(FOLDER / "frozen.weights.h5")
    assert model.rank == 3
    assert int(backend.to_numpy(model._ranks_drawn)) == 5
    assert_outputs(model, "frozen", tokens(4), range(5))


def plain_hand_built():
    """The layers of the hand-built model without adapters."""
    inputs = keras.Input((10,))
    x = keras.layers.Dense(12, "tanh", name="first")(inputs)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = keras.layers.Dense(6, name="second")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def test_adapter_folder():
    model = randomize(roberta_classifier(num_layers=1))
    kd.load_adapter(model, FOLDER / "sampled_adapter")
    assert model.dylora_config.rank == 2
    assert_outputs(model, "sampled_adapter", tokens(4), (1, 2))


def test_adapter_folder_of_a_hand_built_model():
    source = keras.saving.load_model(FOLDER / "hand_built.keras")
    model = plain_hand_built()
    base = kd.merge(source, rank=0)
    for a, b in zip(model.weights, base.weights, strict=True):
        a.assign(backend.to_numpy(b))
    kd.load_adapter(model, FOLDER / "hand_built_adapter")
    assert_outputs(model, "hand_built_adapter", mlp_data(4)[0], (1, 2))


@pytest.mark.parametrize("name", ["sampled_peft", "accumulating_peft"])
def test_peft_folder(name, recwarn):
    model = gpt2() if name == "accumulating_peft" else None
    model = randomize(model or roberta_classifier(num_layers=1))
    kd.from_peft(model, FOLDER / name)
    assert not any("no order" in str(w.message) for w in recwarn)
    assert_outputs(model, name, tokens(4), (1, 2))


@pytest.mark.parametrize("name", ["sampled_peft", "accumulating_peft"])
def test_peft_folder_comes_out_as_it_was(name, tmp_path):
    """A folder that is read and written again is the same to the last bit."""
    model = gpt2() if name == "accumulating_peft" else None
    model = kd.from_peft(
        randomize(model or roberta_classifier(num_layers=1)), FOLDER / name
    )
    kd.to_peft(model, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        before, after = (f / file for f in (FOLDER / name, tmp_path / "again"))
        if file.endswith("json"):
            assert json.loads(after.read_text()) == json.loads(
                before.read_text()
            )
        else:
            assert after.read_bytes() == before.read_bytes()


def saved_before_spec(name):
    with np.load(before_spec.FOLDER / f"{name}.npz") as file:
        return dict(file)


def assert_as_saved(model, name):
    expected, x = saved_before_spec(name), before_spec.MODELS[name][1]
    found = before_spec.outputs(model, x)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", before_spec.MODELS)
@pytest.mark.once
def test_model_file_before_spec(name):
    path = before_spec.FOLDER / f"{name}.keras"
    assert_as_saved(keras.saving.load_model(path), name)


@pytest.mark.parametrize("name", before_spec.MODELS)
@pytest.mark.once
def test_weights_file_before_spec(name):
    model = keras.saving.load_model(before_spec.FOLDER / f"{name}.keras")
    randomize(model, seed=11)
    model.load_weights(before_spec.FOLDER / f"{name}.weights.h5")
    assert_as_saved(model, name)


def test_adapter_of_an_allocation_before_spec():
    model = before_spec.network()
    kd.load_adapter(model, before_spec.FOLDER / "allocated_adapter")
    found = model.predict(mlp_data(4)[0], verbose=0)
    expected = saved_before_spec("allocated_adapter")["expected"]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_peft_adapter_of_an_allocation_before_spec():
    model = kd.from_peft(
        randomize(gpt2()), before_spec.FOLDER / "allocated_peft"
    )
    found = model.predict(tokens(4), verbose=0)
    expected = saved_before_spec("allocated_peft")["expected"]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)

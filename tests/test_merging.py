"""merge and truncate."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import classification_loss
from tests.models import gpt2
from tests.models import labels
from tests.models import mlp
from tests.models import mlp_data
from tests.models import randomize
from tests.models import randomize_adapters
from tests.models import roberta_classifier
from tests.models import tokens

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def enabled(make):
    model = randomize(make(), scale=0.1)
    kd.enable_dylora(model, rank=4)
    return randomize_adapters(model, scale=0.05)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize(
    "make", [roberta_classifier, gpt2], ids=["roberta", "gpt2"]
)
def test_merged_equals_adapted(make, rank, dtype):
    keras.config.set_dtype_policy(dtype)
    model = enabled(make)
    cls = type(model).original_class
    before = backend.snapshot(model.weights)
    merged = kd.merge(model, rank=rank)
    assert type(merged) is cls
    assert not any(
        type(layer).__module__.startswith("keras_dylora")
        for layer in merged._flatten_layers()
    )
    with model.rank_scope(rank):
        expected = model.predict(tokens(), verbose=0)
    found = merged.predict(tokens(), verbose=0)
    np.testing.assert_allclose(
        np.asarray(found, "float32"),
        np.asarray(expected, "float32"),
        atol=TOLERANCE[dtype],
    )
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_merging_leaves_the_model_enabled_and_trainable():
    model = enabled(roberta_classifier)
    model.compile("adam", classification_loss(), metrics=["accuracy"])
    merged = kd.merge(model)
    merged.fit(tokens(), labels(), verbose=0)
    model.fit(tokens(), labels(), verbose=0)
    assert isinstance(model, kd.DyLoRAModel)
    names = merged.evaluate(tokens(), labels(), verbose=0, return_dict=True)
    assert len(names) == 2


def test_merged_functional_model_needs_no_library(tmp_path):
    model = randomize_adapters(mlp())
    x, _ = mlp_data()
    merged = kd.merge(model, rank=3)
    merged.save(tmp_path / "plain.keras")
    np.savez(tmp_path / "x.npz", x=x)
    with model.rank_scope(3):
        expected = model.predict(x, verbose=0)
    backend.run_python(
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "found = model.predict(np.load(sys.argv[2])['x'], verbose=0)\n"
        "np.save(sys.argv[3], found)\n"
        "assert 'keras_dylora' not in sys.modules",
        tmp_path / "plain.keras",
        tmp_path / "x.npz",
        tmp_path / "found.npy",
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "rank", "error", "message"),
    [
        (lambda: enabled(roberta_classifier), 5, ValueError, "rank=5"),
        (lambda: enabled(roberta_classifier), 1.0, TypeError, "integer"),
        (roberta_classifier, 1, ValueError, "enable_dylora"),
    ],
    ids=["above", "float", "plain"],
)
def test_bad_merges(model, rank, error, message):
    with pytest.raises(error, match=message):
        kd.merge(model(), rank=rank)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize("kind", ["enabled", "by-hand"])
def test_truncate_keeps_the_ranks_that_are_left(kind, frozen):
    if kind == "enabled":
        model = randomize(roberta_classifier())
        kd.enable_dylora(model, rank=4, frozen=frozen)
        x, y, loss = tokens(), labels(), classification_loss()
    else:
        model = mlp(frozen=frozen)
        (x, y), loss = mlp_data(), "mse"
    randomize_adapters(model)
    model.compile("adam", loss)
    model.fit(x, y, verbose=0)
    drawn = int(backend.to_numpy(model._ranks_drawn))
    expected = {}
    for rank in (1, 2):
        model.set_rank(rank)
        expected[rank] = model.predict(x, verbose=0)
    assert kd.truncate(model, 2) is model
    assert model.dylora_config.rank == 2
    assert {layer.down.shape[1] for layer in model.dylora_layers} == {2}
    for rank, outputs in expected.items():
        model.set_rank(rank)
        np.testing.assert_allclose(
            model.predict(x, verbose=0), outputs, rtol=1e-5, atol=1e-6
        )
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert max(history.history["rank"]) <= 2
    assert int(backend.to_numpy(model._ranks_drawn)) > drawn


def test_truncate_out_of_range():
    model = enabled(roberta_classifier)
    with pytest.raises(ValueError, match="Received: rank=0"):
        kd.truncate(model, 0)
    assert model.dylora_config.rank == 4

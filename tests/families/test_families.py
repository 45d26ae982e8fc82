"""Every family of KerasHub: what is adapted, and that it does all the rest."""

import collections
import json
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.tree import Tree
from tests import backend
from tests.families.zoo import CONVOLUTIONS, FAMILIES
from tests.models import randomize_adapters

pytestmark = pytest.mark.families

# By family: the layers that are adapted by default and as "all-linear", with
# the numbers of blocks left out, and how many of each.
EXPECTED = pathlib.Path(__file__).parent / "expected.json"
ADAPTABLE = sorted(set(FAMILIES) - CONVOLUTIONS)


def adapted(model):
    paths = [path for path, x in Tree(model).layers.items()
             if x in model.dylora_layers]  # fmt: skip
    shown = [re.sub(r"\d+", "N", re.sub(r"_\d+(?=/|$)", "", p)) for p in paths]
    return dict(collections.Counter(shown))


def run(model, x):
    outputs = model(x, training=False)
    return [backend.to_numpy(y) for y in keras.tree.flatten(outputs)]


def assert_close(first, second, tolerance):
    for a, b in zip(first, second, strict=True):
        scale = max(float(np.abs(a).max()), 1.0)
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


def targets(name):
    """The layers that `enable_dylora` adapts, by default and if all linear."""
    found = {}
    for kind, wanted in (("default", None), ("all-linear", "all-linear")):
        model = FAMILIES[name].build()
        try:
            kd.enable_dylora(model, rank=2, verbose=0, target_layers=wanted)
        except ValueError as error:
            assert "`target_layers` must match" in str(error)
            found[kind] = {}
        else:
            found[kind] = adapted(model)
    return found


@pytest.mark.parametrize("name", ADAPTABLE)
def test_targets(name):
    assert targets(name) == json.loads(EXPECTED.read_text())[name]


# They compute for more than ten seconds each.
LONG = "basnet", "blip2-t5", "d-fine"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in LONG else name
        for name in sorted(FAMILIES)
    ],
)
def test_family(name, tmp_path):
    family = FAMILIES[name]
    wanted = "all-conv" if name in CONVOLUTIONS else "all-linear"
    if name == "sam3" and backend.NAME == "torch":
        pytest.importorskip("torchvision", reason="KerasHub's SAM 3 needs it")
    model, x = family.build(), family.inputs()
    base = run(model, x)
    weights = [backend.to_numpy(w) for w in model.weights]
    kd.enable_dylora(model, rank=2, verbose=0, target_layers=wanted)
    randomize_adapters(model, scale=0.1)
    model.set_rank(0)
    assert_close(run(model, x), base, 1e-5)
    model.set_rank(2)
    live = run(model, x)
    assert any((a != b).any() for a, b in zip(live, base, strict=True))
    if name == "gemma3n" and backend.NAME != "torch":
        # KerasHub 0.32 keeps values of its embeddings in its graph.
        with pytest.raises(ValueError, match="keeps values in their place"):
            kd.merge(model)
        return
    assert_close(run(kd.merge(model), x), live, 1e-4)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(run(loaded, x), live, 1e-5)

    # Its layers without a name have other numbers than those of the first.
    other = family.build()
    for weight, value in zip(other.weights, weights, strict=True):
        weight.assign(value)
    kd.save_adapter(model, tmp_path / "adapter")
    kd.load_adapter(other, tmp_path / "adapter")
    assert_close(run(other, x), live, 1e-5)

    if family.generate:
        model.compile(sampler="greedy")
        generated = model.generate(x, stop_token_ids=None)
        found = keras.tree.flatten(generated)
        assert all(np.isfinite(np.asarray(y)).all() for y in found)
    if name == "sam":  # an output has no batch, so that Keras can't fit it
        return
    before = [backend.to_numpy(layer.up) for layer in model.dylora_layers]
    loss = family.loss
    model.compile(
        "sgd", **({} if loss == "auto" else {"loss": loss}),
        run_eagerly=backend.NAME != "jax",
    )  # fmt: skip
    logs = model.fit(x, family.targets(model), verbose=0).history
    assert 1 <= logs["rank"][0] <= 2 and np.isfinite(logs["loss"][0])
    assert any(
        (backend.to_numpy(layer.up) != b).any()
        for layer, b in zip(model.dylora_layers, before, strict=True)
    )

"""AdapterWeights: cut, checked and put on, whatever the file."""

import dataclasses

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.layers.tree import Tree
from tests import backend
from tests.models import (
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)


def enabled(**arguments):
    model = randomize(roberta_classifier(), scale=0.1)
    return randomize_adapters(kd.enable_dylora(model, rank=4, **arguments))


@pytest.mark.parametrize("ranks", [3, [2, 1, 3, 1]], ids=["one", "by-layer"])
@pytest.mark.parametrize("alpha", [16, 5], ids=["same-alpha", "other-alpha"])
@pytest.mark.once
def test_cut_and_put_on(ranks, alpha):
    model = enabled()
    weights = AdapterWeights.of(Tree(model))
    if isinstance(ranks, list):
        ranks = dict(zip(weights.layers, ranks, strict=True))
    weights = weights.cut(ranks)
    assert weights.config.rank == 3
    other = kd.enable_dylora(
        randomize(roberta_classifier(), seed=5), rank=3, alpha=alpha
    )
    weights.put_on(Tree(other), strict=False)  # the base is another one
    by_layer = ranks if isinstance(ranks, dict) else {}
    for (path, factors), a, b in zip(
        weights.layers.items(),
        model.dylora_layers,
        other.dylora_layers,
        strict=True,
    ):
        rank = by_layer.get(path, 3)
        assert factors.rank == rank
        # NumPy's own product, at the scale of that rank.
        down, up = backend.to_numpy(a.down), backend.to_numpy(a.up)
        expected = 16 / rank * down[:, :rank] @ up[:rank]
        found = np.reshape(b.delta_kernel(rank), expected.shape)
        assert b.active_rank == rank
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_tensors_and_back():
    weights = AdapterWeights.of(Tree(enabled()))
    again = AdapterWeights.of_tensors(weights.tensors(), weights.config)
    assert again.layers.keys() == weights.layers.keys()
    assert again.trained.keys() == weights.trained.keys()
    for path, factors in weights.layers.items():
        for field in dataclasses.fields(factors):
            np.testing.assert_array_equal(
                getattr(again.layers[path], field.name),
                getattr(factors, field.name),
            )


WRONG = {
    "rank-0": (lambda paths: 0, ValueError, "rank=0"),
    "rank-5": (lambda paths: dict.fromkeys(paths, 5), ValueError, "=5"),
    "float": (lambda paths: 2.0, TypeError, "integer.*2.0"),
    "a-layer-less": (
        lambda paths: dict.fromkeys(paths[1:], 2),
        ValueError,
        "without .*layer_0.*query",
    ),
    "another-layer": (
        lambda paths: {**dict.fromkeys(paths, 2), "other": 1},
        ValueError,
        r"with \['other'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_ranks_that_are_none(case):
    ranks, error, message = WRONG[case]
    weights = AdapterWeights.of(Tree(enabled()))
    with pytest.raises(error, match=message):
        weights.cut(ranks(list(weights.layers)))


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


DAMAGED = {
    "no-up": (without("query/up"), "missing: adapter/.*query/up"),
    "a-vector": (
        lambda t: {k: v[0] if k.endswith("down") else v for k, v in t.items()},
        "mis-shaped: .*down",
    ),
    "of-rank-3": (
        lambda t: {
            k: v[:, :3] if k.endswith("down") else v for k, v in t.items()
        },
        "mis-shaped: .*down",
    ),
    "no-head": (without("logits/bias"), "missing: head/logits/bias"),
    "no-layer": (without("value"), "without .*value.*missing: adapter/.*value"),
    "other-name": (lambda t: {**t, "x": np.zeros(1)}, "extra: x"),
    "narrow": (
        lambda t: {
            k: v[:-1] if k.endswith("down") else v for k, v in t.items()
        },
        "mis-shaped: .*down is .*must be",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_an_enabled_model_refuses(case):
    change, message = DAMAGED[case]
    model = enabled()
    weights = AdapterWeights.of(Tree(model))
    before = backend.snapshot(model.weights)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AdapterWeights.of_tensors(
            change(weights.tensors()), weights.config
        ).put_on(Tree(model))
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_peft_adapter_without_the_head_of_an_enabled_model(tmp_path):
    source, model = enabled(trainable_layers=()), enabled()
    head = backend.snapshot(model.get_layer("logits").weights)
    weights = AdapterWeights.of(Tree(source))
    assert not weights.trained
    with pytest.raises(ValueError, match="missing: head/logits/kernel"):
        weights.put_on(Tree(model))
    weights.put_on(Tree(model), whole=False)
    for a, b in zip(
        head, backend.snapshot(model.get_layer("logits").weights), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        model.predict(tokens(), verbose=0),
        source.predict(tokens(), verbose=0),
        atol=1e-6,
    )


def test_of_a_hand_built_model():
    model = randomize_adapters(randomize(mlp()))
    other = randomize(mlp(), seed=3)
    for a, b in zip(other.weights, model.weights, strict=True):
        if a.name in ("kernel", "bias"):
            a.assign(backend.to_numpy(b))
    AdapterWeights.of(Tree(model)).put_on(Tree(other))
    x, _ = mlp_data()
    np.testing.assert_allclose(
        other.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )


def test_only_the_layers_of_the_file_are_enabled():
    """The path of the file's layer is the name of another layer too."""

    def two_of_a_name():
        inputs = keras.Input((4,), name="inputs")
        x = keras.layers.Dense(4, name="query")(inputs)
        inner = keras.Sequential(
            [keras.layers.Dense(4, name="query")], name="inner"
        )
        return keras.Model(inputs, inner(x))

    source = randomize(two_of_a_name())
    base = backend.snapshot(source.weights)
    kd.enable_dylora(
        source, rank=2, target_layers=lambda path, layer: "/" not in path
    )
    randomize_adapters(source)
    model = two_of_a_name()
    for weight, value in zip(model.weights, base, strict=True):
        weight.assign(value)
    AdapterWeights.of(Tree(source)).put_on(Tree(model))
    assert [layer.path for layer in model.dylora_layers] == ["query"]
    assert model.dylora_config.target_layers == ["query"]
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(
        model.predict(x, verbose=0), source.predict(x, verbose=0), atol=1e-6
    )

"""Several adapters in one SavedModel, served without Keras."""

import json

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.tree import Tree
from tests import backend
from tests.models import allocation, randomize, randomize_adapters
from tests.test_export import (
    LENGTH,
    TEXTS,
    batch,
    gpt2,
    live,
    prompts,
    roberta,
    serve,
)
from tests.test_export import enabled as text_enabled
from tests.text import text_classifier

pytestmark = pytest.mark.long


def with_adapters(model, tmp_path):
    """Three adapters: two of the same rank and one of rank 2, unlike heads."""
    kd.save_adapter(model, tmp_path / "small", rank=2)
    model.add_adapter("other")
    randomize_adapters(model, seed=3)
    _move_head(model, 0.5)
    kd.load_adapter(model, tmp_path / "small", name="small")
    randomize_adapters(model, seed=4)
    for layer in model.dylora_layers:
        layer.up.assign(
            backend.to_numpy(layer.up) * (np.arange(4) < 2)[:, None]
        )
    _move_head(model, -0.5)
    return model


def head(model):
    return [v for v in Tree(model).base_weights.values() if v.trainable]


def _move_head(model, by):
    for weight in head(model):
        weight.assign(backend.to_numpy(weight) + by)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = with_adapters(roberta(), folder)
    small = allocation(model, [2, 0, 1])
    ranks = {"one": 1, "two": 2, "all": 4, "small": small}
    path = folder / "artifact"
    kd.export_ranks(model, path, ranks, adapters="all", verbose=False)
    inputs = batch(7, LENGTH)
    mixed = {
        "adapter": np.array(
            "default other small other small default other".split()
        ),
        "rank": np.array([4, 1, 2, 4, 1, 5, 5], "int32"),
    }
    calls = {
        "mixed": ("serve", mixed),
        "default": ("serving_default", {"adapter": mixed["adapter"]}),
        "named": ("two", {"adapter": np.array("small")}),
        "above": ("serve", {"adapter": np.array("small"), "rank": np.int32(4)}),
        "unknown": ("serve", {"adapter": np.array("no"), "rank": np.int32(1)}),
        "few": ("two", {"adapter": np.array(["small", "other"])}),
    }
    outputs, stored = serve(
        folder / "server",
        [(path, name, {**inputs, **more}) for name, more in calls.values()],
    )
    found = dict(zip(calls, outputs, strict=True))
    manifest = json.loads((path / "manifest.json").read_text())
    return model, inputs, mixed, small, found, manifest, stored[str(path)]


def expected(model, inputs, adapters, ranks):
    rows = []
    for i, (name, rank) in enumerate(zip(adapters, ranks, strict=True)):
        model.set_adapter(str(name))
        rows.append(live(model, rank, inputs)[i])
    return np.stack(rows)


def test_a_batch_may_mix_adapters_and_ranks(served):
    model, inputs, mixed, small, found, *_ = served
    ranks = [small if b == 5 else int(b) for b in mixed["rank"]]
    wanted = expected(model, inputs, mixed["adapter"], ranks)
    np.testing.assert_allclose(found["mixed"]["output_0"], wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).min() > 1e-2


def test_default_is_the_highest_rank_of_each(served):
    model, inputs, mixed, _, found, *_ = served
    highest = [2 if x == "small" else 4 for x in mixed["adapter"]]
    wanted = expected(model, inputs, mixed["adapter"], highest)
    np.testing.assert_allclose(found["default"]["output_0"], wanted, atol=1e-5)
    wanted = expected(model, inputs, ["small"] * 7, [2] * 7)
    np.testing.assert_allclose(found["named"]["output_0"], wanted, atol=1e-5)


def test_server_is_told_what_is_wrong(served):
    *_, found, _, _ = served
    for name, rule in (
        ("above", "not above the rank of its adapter"),
        ("unknown", "`adapter` must be one of"),
        ("few", "`adapter` must be a scalar or one for each example"),
    ):
        assert rule in str(found[name]["error"])


def test_the_base_is_stored_once(served):
    model, *_, manifest, stored = served
    layers = model.dylora_layers
    columns = sum(x.down.shape[0] + x.up.shape[1] for x in layers)
    adapters = columns * (4 + 4 + 2)
    of_head = sum(int(np.prod(v.shape)) for v in head(model))
    base = sum(int(np.prod(v.shape)) for v in model.weights) - 4 * columns
    assert stored == base + adapters + 2 * of_head  # one is in the base
    assert manifest["adapters"] == {"default": 4, "other": 4, "small": 2}
    assert manifest["signatures"]["serve"]["adapter"] == ["string", None]
    assert manifest["largest_difference"]["serve"] < 1e-5


def test_the_model_is_left_as_it_was(tmp_path):
    model = with_adapters(roberta(), tmp_path)
    model.set_adapter("other")
    model.set_rank(3)
    before = backend.snapshot(model.weights)
    kd.export_ranks(
        model, tmp_path / "a", [1], adapters=["small", "other"], verbose=False
    )
    assert (model.active_adapter, model.rank) == ("other", 3)
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_generated_text_of_several(tmp_path):
    model = with_adapters(gpt2(), tmp_path)
    path = tmp_path / "artifact"
    kd.export_ranks(
        model,
        path,
        [2, 4],
        adapters=["default", "small"],
        generate_signature=True,
        verbose=False,
    )
    inputs = {**prompts(), "end_token_id": np.int32(-1)}
    chosen = {"adapter": np.array(["small", "default", "small"])}
    [outputs], _ = serve(
        tmp_path / "server",
        [(path, "generate", {**inputs, **chosen, "rank": np.int32(2)})],
    )
    for i, name in enumerate(chosen["adapter"]):
        model.set_adapter(str(name))
        model.set_rank(2)
        wanted = model.generate(prompts(), stop_token_ids=None)
        np.testing.assert_array_equal(
            outputs["token_ids"][i], wanted["token_ids"][i]
        )


def test_text_in_a_short_format_on_a_quantized_base(tmp_path):
    model = text_enabled(text_classifier())
    model.quantize("int8")
    with_adapters(model, tmp_path)
    path = tmp_path / "artifact"
    kd.export_ranks(
        model,
        path,
        [1, 2],
        adapters="all",
        preprocessing=True,
        dtype="float16",
        verbose=False,
    )
    names = ["small", "other", "default", "other"]
    [outputs], _ = serve(
        tmp_path / "server",
        [
            (
                path,
                "serve_text",
                {
                    "text": np.array(TEXTS),
                    "adapter": np.array(names),
                    "rank": np.int32(2),
                },
            )
        ],
        text=True,
    )
    for i, name in enumerate(names):
        model.set_adapter(name)
        model.set_rank(2)
        wanted = model.predict(TEXTS, verbose=0)[i]
        np.testing.assert_allclose(
            outputs["output_0"][i], wanted, atol=5e-2, rtol=5e-2
        )


@pytest.mark.parametrize(
    ("arguments", "error", "rule"),
    [
        ({"adapters": "other"}, TypeError, 'a list of names, or "all"'),
        ({"adapters": ["no"]}, ValueError, "at least one adapter"),
        ({"adapters": []}, ValueError, "at least one adapter"),
        ({"adapters": ["default"] * 2}, ValueError, "each once"),
        (
            {"adapters": "all", "layout": "merged"},
            ValueError,
            "needs `layout='shared'`",
        ),
        (
            {"adapters": "all", "ranks": [3, 4]},
            ValueError,
            "one for every adapter",
        ),
        (
            {"adapters": ["small"], "ranks": [3]},
            ValueError,
            "between 1 and 2",
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, rule):
    model = with_adapters(roberta(), tmp_path)
    with pytest.raises(error, match=rule):
        kd.export_ranks(model, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_an_input_of_the_name_is_refused(tmp_path):
    inputs = keras.Input((4,), name="adapter")
    outputs = keras.layers.Dense(2, name="head")(
        keras.layers.Dense(3, name="query")(inputs)
    )
    model = randomize(keras.Model({"adapter": inputs}, outputs))
    kd.enable_dylora(model, rank=2, verbose=0)
    kd.export_ranks(model, tmp_path / "one", verify=False, verbose=False)
    with pytest.raises(ValueError, match=r"has inputs \['adapter'\]"):
        kd.export_ranks(model, tmp_path / "a", adapters="all")

"""Embeddings: their formula, and every door of a model that has adapted one."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.embedding import reversible_class
from tests import backend
from tests.doors import assert_doors_agree
from tests.marks import once
from tests.models import (
    allocation,
    classification_loss,
    gpt2,
    labels,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

IDS = np.array([[3, 1, 3], [0, 4, 2]], "int32")


def layer_of(**arguments):
    layer = kd.DyLoRAEmbedding(5, 6, rank=4, alpha=6, **arguments)
    layer.build((None, 3))
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    return layer


def table(layer, rank):
    """What the layer looks up at a rank, by its formula."""
    names = "embeddings", "down", "up"
    base, down, up = (backend.to_numpy(getattr(layer, n)) for n in names)
    return base + 6 / max(rank, 1) * down[:, :rank] @ up[:rank]


@pytest.mark.parametrize("rank", range(5))
def test_formula(rank):
    layer = layer_of()
    layer.set_rank(rank)
    found = backend.to_numpy(layer(IDS))
    np.testing.assert_allclose(found, table(layer, rank)[IDS], atol=2e-6)
    found = layer.delta_kernel(rank)
    base = backend.to_numpy(layer.embeddings)
    np.testing.assert_allclose(base + found, table(layer, rank), atol=2e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(frozen):
    layer = layer_of(frozen=frozen)
    layer.set_rank(2)
    weight = np.random.default_rng(1).normal(size=(2, 3, 6)).astype("float32")
    down, up = backend.gradients(
        lambda: keras.ops.sum(keras.ops.multiply(layer(IDS), weight)),
        [layer.down, layer.up],
    )
    # By the rows of each id.
    hit = np.zeros((5, 6))
    np.add.at(hit, IDS, weight)
    wanted_down = 3 * hit @ backend.to_numpy(layer.up).T
    wanted_up = 3 * backend.to_numpy(layer.down).T @ hit
    columns = [1] if frozen else [0, 1]
    for found, wanted in ((down, wanted_down), (up.T, wanted_up.T)):
        used = np.zeros_like(wanted)
        used[:, columns] = wanted[:, columns]
        np.testing.assert_allclose(found, used, rtol=1e-5, atol=1e-5)


def reversible(**arguments):
    cls = keras_hub.layers.ReversibleEmbedding
    layer = cls(5, 6, **arguments)
    layer.build((None, 3))
    inputs = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Dense(6, "tanh", name="body")(layer(inputs))
    model = keras.Model(inputs, layer(hidden, reverse=True))
    randomize(model)
    kd.enable_dylora(
        model,
        rank=4,
        alpha=6,
        target_layers=[layer.name],
        trainable_layers=(),
        verbose=0,
    )
    return randomize_adapters(model, scale=0.5), layer, cls


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_directions(tied, cap):
    model, layer, cls = reversible(tie_weights=tied, logit_soft_cap=cap)
    kernel, bias = map(
        backend.to_numpy,
        (model.get_layer("body").kernel, model.get_layer("body").bias),
    )
    for rank in range(5):
        model.set_rank(rank)
        hidden = np.tanh(table(layer, rank)[IDS] @ kernel + bias)
        back = table(layer, rank).T
        if not tied:
            back = backend.to_numpy(layer.reverse_embeddings)
        wanted = hidden @ back
        if cap:
            wanted = np.tanh(wanted / cap) * cap
        found = model.predict(IDS, verbose=0)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    kd.disable_dylora(model)
    assert type(layer) is cls


def test_a_mask_and_a_constraint_are_refused():
    with pytest.raises(ValueError, match="masks zeros in its call"):
        reversible(mask_zero=True)
    with pytest.raises(ValueError, match="with its `embeddings_constraint`"):
        reversible(embeddings_constraint="non_neg")
    assert reversible_class(keras.layers.Dense) is None


def classifier(**options):
    model = randomize(roberta_classifier(), scale=0.2)
    config = {"rank": 4, "scaling": "constant", "verbose": 0, **options}
    kd.enable_dylora(
        model, target_layers=["token_embedding", "query", "value"], **config
    )
    model.compile(keras.optimizers.Adam(1e-2), classification_loss())
    return randomize_adapters(model, scale=0.4)


def language_model(**options):
    model = randomize(gpt2(), scale=0.3)
    config = {"rank": 4, "scaling": "constant", "verbose": 0, **options}
    kd.enable_dylora(
        model, target_layers=["token_embedding", "value"], **config
    )
    model.compile("adam", classification_loss(), sampler="greedy")
    return randomize_adapters(model, scale=0.4)


MODELS = {"classifier": classifier, "language-model": language_model}


def outputs(model, x):
    return model.predict(x, verbose=0)


def assert_close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, wanted, atol=atol)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.once
def test_merged_reloaded_and_cut_are_the_live_one(model, tmp_path):
    mixed = allocation(model, [2, 1, 3])
    assert_doors_agree(model, tokens(4), mixed, tmp_path)
    kd.order_ranks(model)
    kd.disable_dylora(model)
    assert "Embedding" in type(model.backbone.token_embedding).__name__


OPTIONS = {
    "sampled": {},
    "example": {"draw": "example"},
    "frozen": {"frozen": True},
    "summed": {"objective": "summed"},
    "progressive": {"full_rank_steps": 0.5, "draw": "example", "tune": 0.25},
}


@pytest.mark.parametrize("name", once(OPTIONS, but=["sampled"]))
def test_trains_and_only_rows_of_its_tokens_move(name):
    options = OPTIONS[name]
    model = classifier(**options)
    path = next(p for p in model._dylora.layers if "token_embedding" in p)
    layer = model._dylora.layers[path]
    before = backend.to_numpy(layer.down).copy()
    base = backend.to_numpy(layer.base_kernel).copy()
    x = tokens()
    model.fit(x, labels(), batch_size=8, epochs=2, verbose=0)
    moved = np.abs(backend.to_numpy(layer.down) - before).max(axis=1) > 0
    used = np.isin(np.arange(len(moved)), x["token_ids"])
    if not options.get("full_rank_steps"):  # the order turns all
        assert not moved[~used].any() and moved[used].any()
    np.testing.assert_array_equal(backend.to_numpy(layer.base_kernel), base)
    report = kd.evaluate_ranks(model, x, labels(), verbose=0)
    assert np.isfinite(report.values("loss")).all()


@pytest.mark.once
def test_a_budget_and_tuned_cuts():
    model = classifier(min_rank=4)
    kd.order_ranks(model)
    x, y = tokens(), labels()
    small = kd.allocate_ranks(model, x, y, 0.5, verbose=0)
    assert any("token_embedding" in path for path in small.ranks)
    plain = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    kd.tune_ranks(model, x, y, [1, 2, small], steps=12, verbose=0)
    tuned = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    assert (np.array(tuned.values("loss")) < plain.values("loss")).all()
    for rank in (1, small):
        with model.rank_scope(rank):
            wanted = outputs(model, x)
        assert_close(outputs(kd.merge(model, rank), x), wanted)


@pytest.mark.once
def test_a_tuned_language_model_writes_as_the_merged_one():
    model = language_model(min_rank=4)
    kd.order_ranks(model)
    x = tokens()
    y = np.roll(x["token_ids"], -1, axis=1)
    kd.tune_ranks(model, x, y, [2], steps=6, verbose=0)
    model.set_rank(2)
    assert_close(outputs(kd.merge(model), x), outputs(model, x))
    prompt = tokens(2, 12)
    np.testing.assert_array_equal(
        model.generate(prompt, stop_token_ids=None)["token_ids"],
        kd.merge(model).generate(prompt, stop_token_ids=None)["token_ids"],
    )


@pytest.mark.once
def test_named_adapters_have_each_its_own():
    model, x = classifier(), tokens(4)
    first = outputs(model, x)
    model.add_adapter("other")
    randomize_adapters(model, seed=5, scale=0.4)
    second = outputs(model, x)
    assert np.abs(first - second).max() > 1e-3
    model.set_adapter("default")
    assert_close(outputs(model, x), first)


@pytest.mark.once
def test_a_quantized_base_leaves_it_float():
    model, x = classifier(), tokens(4)
    layer = model.backbone.embeddings.token_embedding
    model.quantize("int8")
    assert layer.quantization_mode is None
    with model.rank_scope(2):
        wanted = outputs(model, x)
    assert_close(outputs(kd.merge(model, 2), x), wanted, 5e-2)
    quantized = randomize(roberta_classifier(), scale=0.2)
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="Only a float layer of its kind"):
        kd.enable_dylora(quantized, target_layers="token_embedding", rank=2)


def test_it_is_adapted_if_it_is_named():
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, target_layers="all-linear", rank=2, verbose=0)
    assert not any("embedding" in path for path in model._dylora.layers)


def test_a_hand_built_model(tmp_path):
    ids = keras.Input((3,), dtype="int32")
    x = kd.DyLoRAEmbedding(20, 6, rank=4, alpha=8, mask_zero=True)(ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    outputs_ = kd.DyLoRADense(3, rank=4, alpha=8)(x)
    model = kd.DyLoRAModel(ids, outputs_)
    model.compile("adam", "mse")
    _, y = mlp_data(32)
    x = np.random.default_rng(0).integers(0, 20, (32, 3)).astype("int32")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(outputs(again, x), outputs(model, x))
    assert_close(outputs(kd.merge(model, 2), x), outputs_at(model, x, 2))


def outputs_at(model, x, rank):
    with model.rank_scope(rank):
        return outputs(model, x)

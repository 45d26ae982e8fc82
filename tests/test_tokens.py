"""Trained tokens: rows of the table of tokens that are trained in full."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.doors import assert_doors_agree
from tests.marks import once
from tests.models import (
    VOCABULARY,
    allocation,
    classification_loss,
    gpt2,
    labels,
    mlp,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)
from tests.text import WORDS, text_classifier

IDS = (17, 49, 83)
MAKE = {"roberta": roberta_classifier, "gpt2": gpt2}


def enabled(name, **options):
    """An enabled model with adapters and rows of values of their own."""
    model = randomize(MAKE[name](), scale=0.3)
    options = {"rank": 4, "trainable_tokens": IDS, "verbose": 0, **options}
    kd.enable_dylora(model, **options)
    model.compile(keras.optimizers.Adam(1e-2), classification_loss())
    rows = np.random.default_rng(2).normal(size=(len(IDS), 16))
    table_of(model).trained_tokens.assign(rows.astype("float32"))
    return randomize_adapters(model)


def table_of(model):
    return model.backbone.token_embedding


def rows_of(model):
    return backend.to_numpy(table_of(model).trained_tokens)


def outputs(model, x=None):
    return model.predict(tokens(6) if x is None else x, verbose=0)


def targets(name, x):
    ids = x["token_ids"]
    return labels(len(ids)) if name == "roberta" else np.roll(ids, -1, 1)


@pytest.fixture(params=once(MAKE, but=["gpt2"]))
def name(request):
    return request.param


def test_a_plain_model_with_these_rows_computes_the_same(name):
    model, plain = enabled(name, min_rank=4), MAKE[name]()
    model.set_rank(0)
    kd.merge(model, 0)  # one more way, which checks itself
    base = [v for v in model.weights if not is_ours(v)]
    for weight, value in zip(plain.weights, base, strict=True):
        weight.assign(backend.to_numpy(value))
    table = backend.to_numpy(table_of(model).embeddings).copy()
    table[list(IDS)] += rows_of(model)
    table_of(plain).embeddings.assign(table)
    np.testing.assert_allclose(outputs(model), outputs(plain), atol=2e-6)


def is_ours(variable):
    return variable.path.endswith(("/down", "/up", "/trained_tokens"))


def test_fit_moves_these_rows_alone(name):
    model, x = enabled(name, trainable_layers=()), tokens(16)
    before = {v.path: backend.to_numpy(v).copy() for v in model.weights}
    model.fit(x, targets(name, x), batch_size=4, epochs=2, verbose=0)
    for v in model.weights:
        assert np.any(backend.to_numpy(v) != before[v.path]) == is_ours(v)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cap", once([None, 1.5], but=[1.5]))
def test_both_directions(tied, cap):
    layer = keras_hub.layers.ReversibleEmbedding(
        8, 6, tie_weights=tied, logit_soft_cap=cap
    )
    layer.build((None, 3))
    inputs = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Dense(6, "tanh", name="body")(layer(inputs))
    model = randomize(keras.Model(inputs, layer(hidden, reverse=True)))
    kd.enable_dylora(
        model, target_layers="body", trainable_layers=(), rank=2, verbose=0,
        trainable_tokens=[6, 1],
    )  # fmt: skip
    rows = np.arange(12, dtype="float32").reshape(2, 6) / 10
    layer.trained_tokens.assign(rows)
    table = backend.to_numpy(layer.embeddings).copy()
    table[[1, 6]] += rows  # in the order of the ids
    ids = np.array([[1, 2, 6], [0, 6, 6]])
    body = model.get_layer("body")
    kernel, bias = map(backend.to_numpy, (body.kernel, body.bias))
    back = table.T if tied else backend.to_numpy(layer.reverse_embeddings)
    wanted = np.tanh(table[ids] @ kernel + bias) @ back
    if cap:
        wanted = np.tanh(wanted / cap) * cap
    np.testing.assert_allclose(outputs(model, ids), wanted, atol=1e-5)
    merged = kd.merge(model)
    np.testing.assert_allclose(outputs(merged, ids), wanted, atol=1e-5)


@pytest.mark.once
def test_merged_reloaded_and_cut_are_the_live_one(name, tmp_path):
    model = enabled(name, scaling="constant")
    mixed = allocation(model, [2, 1, 3])
    assert_doors_agree(model, tokens(4), mixed, tmp_path)


@pytest.mark.once
def test_one_operation_after_another(name, tmp_path):
    base = MAKE[name]()
    randomize(base, scale=0.3)
    plain = outputs(base)
    model = enabled(name, scaling="constant", draw="example")
    x = tokens(8)
    model.fit(x, targets(name, x), batch_size=4, verbose=0)
    kd.order_ranks(model)
    kd.truncate(model, 3)
    model.fit(x, targets(name, x), batch_size=4, verbose=0)
    wanted = outputs(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs(again), wanted, atol=1e-6)
    assert again.dylora_config.trainable_tokens == IDS
    kd.save_adapter(again, tmp_path / "adapter")
    for each in (again, model):
        kd.disable_dylora(each)
    assert "trained" not in type(table_of(again)).__name__.lower()
    fresh = randomize(MAKE[name](), scale=0.3)
    np.testing.assert_array_equal(outputs(fresh), plain)
    kd.load_adapter(fresh, tmp_path / "adapter")
    np.testing.assert_allclose(outputs(fresh), wanted, atol=1e-5)
    kd.disable_dylora(fresh, restore_head=True)
    np.testing.assert_allclose(outputs(fresh), plain, atol=1e-6)


def test_each_adapter_has_its_own(name):
    model, x = enabled(name), tokens(8)
    first, rows = outputs(model), rows_of(model).copy()
    model.add_adapter("other")
    model.fit(x, targets(name, x), batch_size=4, verbose=0)
    assert np.abs(rows_of(model) - rows).max() > 1e-3
    other = outputs(model)
    model.set_adapter("default")
    np.testing.assert_array_equal(rows_of(model), rows)
    np.testing.assert_allclose(outputs(model), first, atol=1e-6)
    model.set_adapter("other")
    np.testing.assert_allclose(outputs(model), other, atol=1e-6)


def grown_classifier():
    """A classifier of texts whose tokenizer has two words more."""
    model = text_classifier()
    tokenizer = model.preprocessor.tokenizer
    words = [*tokenizer.get_vocabulary(), "splendid", "awful"]
    model.preprocessor.tokenizer = keras_hub.models.BertTokenizer(
        words, lowercase=True
    )
    return randomize(model, scale=0.3)


@pytest.mark.once
def test_new_tokens_get_rows_of_their_own(tmp_path):
    model = grown_classifier()
    size = table_of(model).input_dim
    texts = ["a splendid film", "an awful plot"]
    table = backend.to_numpy(table_of(model).embeddings)
    known = model.predict(["a good film"], verbose=0)
    kd.enable_dylora(model, rank=2, trainable_tokens="new", verbose=0)
    assert model.dylora_config.trainable_tokens == (size, size + 1)
    assert model.backbone.vocabulary_size == table_of(model).input_dim
    np.testing.assert_allclose(
        model.predict(["a good film"], verbose=0), known, atol=1e-6
    )
    grown = backend.to_numpy(table_of(model).embeddings)
    np.testing.assert_array_equal(grown[:size], table)
    np.testing.assert_allclose(grown[size:], [table.mean(0)] * 2, atol=1e-6)
    model.compile(keras.optimizers.Adam(0.05), classification_loss())
    model.fit(texts, np.array([1, 0]), epochs=5, verbose=0)
    assert np.abs(rows_of(model)).min(1).max() > 0
    wanted = model.predict(texts, verbose=0)
    plain = kd.merge(model)
    np.testing.assert_allclose(
        plain.predict(texts, verbose=0), wanted, atol=1e-5
    )
    for each, file in ((plain, "plain.keras"), (model, "model.keras")):
        each.save(tmp_path / file)
        again = keras.models.load_model(tmp_path / file)
        np.testing.assert_allclose(
            again.predict(texts, verbose=0), wanted, atol=1e-5
        )
    kd.save_adapter(model, tmp_path / "adapter")
    fresh = grown_classifier()
    kd.load_adapter(fresh, tmp_path / "adapter")
    np.testing.assert_allclose(
        fresh.predict(texts, verbose=0), wanted, atol=1e-5
    )
    kd.disable_dylora(model, restore_head=True)
    assert table_of(model).input_dim == size == model.backbone.vocabulary_size
    np.testing.assert_array_equal(
        backend.to_numpy(table_of(model).embeddings), table
    )
    np.testing.assert_allclose(
        model.predict(["a good film"], verbose=0), known, atol=1e-6
    )


def test_what_is_refused(tmp_path):
    def refused(match, model, error=ValueError, **options):
        before = {v.path for v in model.weights}
        with pytest.raises(error, match=match):
            kd.enable_dylora(model, verbose=0, **options)
        assert {v.path for v in model.weights} == before

    model = roberta_classifier()
    refused("must be rows of the table", model, trainable_tokens=[VOCABULARY])
    refused("must be a list of ids", model, TypeError, trainable_tokens=[])
    refused("must be a list of ids", model, TypeError, trainable_tokens=7)
    refused("trainable_tokens", model, trainable_tokens=[-1])
    refused("more tokens than the table", model, trainable_tokens="new")
    both = ["token_embedding", "value"]
    refused("not both", model, trainable_tokens=[1], target_layers=both)
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    targets = {"target_layers": "all-linear", "trainable_layers": ()}
    refused("one table of tokens", dense, trainable_tokens=[1], **targets)
    kd.enable_dylora(model, rank=4, trainable_tokens=[1, 2], verbose=0)
    other = enabled("roberta", alpha=16)
    kd.save_adapter(other, tmp_path / "adapter")
    rows = rows_of(model).copy()
    with pytest.raises(ValueError, match="must have the `trainable_tokens`"):
        kd.load_adapter(model, tmp_path / "adapter", strict=False)
    np.testing.assert_array_equal(rows_of(model), rows)
    with pytest.raises(ValueError, match="more tokens than"):
        kd.enable_dylora(text_classifier(), trainable_tokens="new", verbose=0)
    assert len(WORDS) < table_of(text_classifier()).input_dim
    assert mlp().dylora_config.trainable_tokens is None

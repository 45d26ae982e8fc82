"""combine_adapters: against NumPy, of all kinds, and in a row with others."""

import pathlib
import tracemalloc

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.adapters import sums
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.layers.factors import Factors
from tests import backend
from tests.marks import once
from tests.models import (
    allocation,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
    with_tuned_cuts,
)

OLD = pathlib.Path(__file__).parent / "data" / "v0_1_0"
LAYERS = ["table", "conv", "einsum", "query"]
SCALES = {
    "rank": lambda alpha, b: alpha / b,
    "sqrt": lambda alpha, b: alpha / b**0.5,
    "constant": lambda alpha, b: alpha / b,
}


def factors(rank, shape=(9, 7), seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    down = rng.normal(size=(shape[0], rank)).astype("float32")
    up = rng.normal(size=(rank, shape[1])).astype("float32")
    return Factors(down, up, scale)


def product(x):
    return x.scale * x.down.astype("float64") @ x.up


def parts(shape=(9, 7), ranks=(2, 3), weights=(0.7, -1.3)):
    return [
        (weight, factors(rank, shape, seed, scale=seed + 0.5))
        for seed, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def summed(parts):
    return sum(weight * product(x) for weight, x in parts)


def cut(matrix, rank):
    """The best approximation of a rank, by the SVD of the whole matrix."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * singular[:rank] @ right[:rank]


SHAPES = {"tall": (30, 7), "wide": (7, 30), "small": (3, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_concatenated_is_the_sum(shape):
    found = sums.concatenated(parts(shape), 0.5)
    assert found.rank == 5
    np.testing.assert_allclose(product(found), summed(parts(shape)), atol=2e-6)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_cut_of_the_closest_is_the_best(shape, rank):
    found = sums.closest(parts(shape), rank, 0.5)
    assert found.rank == rank
    for b in range(1, rank + 1):
        kept = Factors(found.down[:, :b], found.up[:b], 0.5)
        wanted = cut(summed(parts(shape)), b)
        np.testing.assert_allclose(product(kept), wanted, atol=1e-5)
    # Whatever has no share of the sum can still be trained.
    assert (np.linalg.norm(found.down, axis=0) > 0.1).all()


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_cut_of_a_whole_update_is_the_best(shape, rank):
    update = np.random.default_rng(0).normal(size=shape).astype("float32")
    found = sums.closest_to(update, rank, 0.5)
    assert found.rank == rank
    for b in range(1, rank + 1):
        kept = Factors(found.down[:, :b], found.up[:b], 0.5)
        np.testing.assert_allclose(product(kept), cut(update, b), atol=1e-5)
    assert (np.linalg.norm(found.down, axis=0) > 0.1).all()


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_value_by_value(method):
    three = parts(ranks=(2, 3, 1), weights=(0.7, -1.3, 2.0))
    updates = [product(x) for _, x in three]
    for update in updates:
        size = np.sort(np.abs(update), axis=None)[::-1]
        update[np.abs(update) < size[int(0.4 * update.size) - 1]] = 0
    wanted = np.zeros((9, 7))
    for place in np.ndindex(wanted.shape):
        values = [update[place] for update in updates]
        votes = values if method == "total" else np.sign(values)
        sign = 1 if sum(votes) >= 0 else -1
        kept = [
            weight * x
            for (weight, _), x in zip(three, values, strict=True)
            if x * sign > 0
        ]
        wanted[place] = np.mean(kept) if kept else 0
    found = sums.ties(three, 0.4, method)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_ties_of_too_few_values_is_nothing():
    assert not sums.ties(parts(), 0.01, "total").any()


def test_dare_keeps_the_mean():
    two = parts((200, 300))
    found = sums.dare(two, 0.4, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    wanted = sum(
        weight * product(x) * (rng.random((200, 300), "float32") < 0.4) / 0.4
        for weight, x in two
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert 0.33 < np.mean(found == 0) < 0.39  # .6 * .6 of both are dropped
    assert abs(np.mean(found - summed(two))) < 0.02


def test_a_sum_of_an_embedding_is_never_a_table():
    inputs, outputs = 20_000, 1_000
    two = [(1.0, factors(4, (inputs, outputs), seed)) for seed in range(2)]
    tracemalloc.start()
    found = sums.closest(two, 4, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rank == 4
    assert peak < 4 * inputs * outputs / 4


def network(classes=3):
    """A layer of each kind, and a head."""
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = keras.layers.Embedding(20, 6, name="table")(ids)
    x = keras.layers.Conv1D(8, 3, padding="same", name="conv")(x)
    x = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 4), name="einsum")(
        x
    )
    x = keras.layers.Reshape((48,))(x)
    x = keras.layers.Dense(5, "tanh", name="query")(x)
    outputs = keras.layers.Dense(classes, name="head")(x)
    return randomize(keras.Model(ids, outputs))


def ids(size=8):
    return np.random.default_rng(0).integers(0, 20, (size, 6)).astype("int32")


def enabled(seed=1, rank=4, alpha=8, scaling="rank", classes=3, **arguments):
    """The network with trained adapters and a trained head."""
    arguments = {"trainable_layers": ["head"], **arguments}
    model = kd.enable_dylora(
        network(classes),
        rank=rank,
        alpha=alpha,
        scaling=scaling,
        target_layers=LAYERS,
        verbose=0,
        **arguments,
    )
    randomize_adapters(model, seed, scale=0.5)
    if arguments["trainable_layers"]:
        for weight in model.get_layer("head").weights:
            weight.assign(weight + 0.1 * seed)
    return model


def updates(model, rank=None):
    """Dict of path to the update of a kernel as a matrix, by the formula."""
    config, found = model.dylora_config, {}
    for path, layer in model._dylora.layers.items():
        b = rank or config.rank
        down, up = (backend.to_numpy(x) for x in (layer.down, layer.up))
        scale = SCALES[config.scaling](config.alpha, b)
        if config.scaling == "constant":
            scale = config.alpha / config.rank
        found[path] = scale * down[:, :b].astype("float64") @ up[:b]
    return found


def head(model):
    return [backend.to_numpy(v) for v in model.get_layer("head").weights]


def predicted(model):
    return model.predict(ids(), verbose=0)


def assert_same(found, wanted, atol=1e-5):
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(
            found[path], wanted[path], atol=atol, err_msg=path
        )


def of(combined):
    return {path: product(x) for path, x in combined.layers.items()}


def weighted(*pairs):
    """The weighted sum of dicts of path to matrix."""
    return {
        path: sum(weight * x[path] for weight, x in pairs)
        for path in pairs[0][1]
    }


@pytest.fixture
def folders(tmp_path):
    """Two adapters in files, unlike in all that they may be unlike in."""
    a, b = enabled(), enabled(2, rank=3, alpha=5, scaling="sqrt")
    kd.save_adapter(a, tmp_path / "a")
    kd.save_adapter(b, tmp_path / "b")
    return {"a": tmp_path / "a", "b": tmp_path / "b"}, a, b


def test_files_concatenated(folders, tmp_path):
    where, a, b = folders
    wanted = weighted((0.7, updates(a)), (-0.4, updates(b)))
    both = {where["a"]: 0.7, str(where["b"]): -0.4}
    combined = kd.combine_adapters(both, method="concatenate", head=where["a"])
    assert_same(of(combined), wanted, 2e-6)
    assert set(combined.ranks.values()) == {7}
    model = kd.load_adapter(network(), combined)
    assert model.rank == model.dylora_config.min_rank == 7
    assert_same(updates(model), wanted, 2e-6)
    np.testing.assert_allclose(head(model)[0], head(a)[0])
    # What is computed is the sum of what is added.
    base = network()
    for path in LAYERS:
        layer = base.get_layer(path)
        kernel = model.get_layer(path)._geometry.kernel(wanted[path])
        variable = layer.embeddings if path == "table" else layer.kernel
        variable.assign(backend.to_numpy(variable) + kernel)
    base.get_layer("head").set_weights(head(a))
    np.testing.assert_allclose(predicted(model), predicted(base), atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2, 7])
def test_files_by_svd(rank, folders):
    where, a, b = folders
    both = {where["a"]: 0.5, where["b"]: 1.5}
    combined = kd.combine_adapters(both, rank)
    wanted = weighted((0.5, updates(a)), (1.5, updates(b)))
    model = kd.load_adapter(network(), combined)
    rank = rank or 4
    assert model.rank == rank
    for b_ in range(1, rank + 1):
        best = {path: cut(x, b_) for path, x in wanted.items()}
        assert_same(updates(model, b_), best, 2e-5)
    averaged = [0.25 * x + 0.75 * y for x, y in zip(head(a), head(b), strict=1)]
    for found, mean in zip(head(model), averaged, strict=True):
        np.testing.assert_allclose(found, mean, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_files_by_ties_and_dare(method, folders):
    where, a, b = folders
    both = {where["a"]: 0.5, where["b"]: 1.5}
    combined = kd.combine_adapters(both, 3, method, density=0.6)
    one, two = updates(a), updates(b)
    rng = np.random.default_rng(0)
    for path, found in combined.layers.items():
        pair = [
            (weight, Factors(x[path].astype("float32"), np.eye(x[path].shape[1],
             dtype="float32"), 1.0))
            for weight, x in ((0.5, one), (1.5, two))
        ]  # fmt: skip
        whole = (
            sums.ties(pair, 0.6, "total")
            if method == "ties"
            else sums.dare(pair, 0.6, rng)
        )
        np.testing.assert_allclose(product(found), cut(whole, 3), atol=2e-5)
    assert set(combined.ranks.values()) == {3}
    assert list(combined.layers) == LAYERS  # what is random is by their order
    again = kd.combine_adapters(both, 3, method, density=0.6)
    assert_same(of(again), of(combined), 0)
    if method == "dare":
        other = kd.combine_adapters(both, 3, method, density=0.6, seed=1)
        assert np.abs(of(other)["conv"] - of(combined)["conv"]).max() > 0.1
    else:
        other = kd.combine_adapters(
            both, 3, method, density=0.6, majority_sign_method="frequency"
        )
        assert set(other.ranks.values()) == {3}


def named(tmp_path, scaling="constant"):
    """A model with two adapters, of which the last has a lower rank."""
    model = enabled(scaling=scaling)
    small = enabled(2, rank=3, alpha=5, scaling=scaling)
    kd.save_adapter(small, tmp_path / "small")
    kd.load_adapter(model, tmp_path / "small", name="small")
    return model, small


def test_names_of_a_model(tmp_path):
    model, small = named(tmp_path)
    model.set_rank(2)
    first = enabled(scaling="constant")
    before = backend.snapshot(model.weights)
    both = {"default": 1.0, "small": 0.5}
    combined = kd.combine_adapters(both, model=model)
    assert (model.active_adapter, model.rank) == ("small", 2)
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    wanted = weighted((1.0, updates(first)), (0.5, updates(small)))
    best = {path: cut(x, 4) for path, x in wanted.items()}
    assert_same(of(combined), best)
    kd.load_adapter(model, combined, name="both")
    assert model.adapter_names == ["default", "small", "both"]
    assert_same(updates(model), best)
    fresh = kd.load_adapter(network(), combined)
    for b in (1, 4):
        model.set_rank(b)
        fresh.set_rank(b)
        np.testing.assert_allclose(
            predicted(model), predicted(fresh), atol=1e-5
        )
    model.set_adapter("default")
    np.testing.assert_allclose(predicted(model), predicted(first), atol=1e-6)


def test_names_and_files_together(tmp_path):
    model, small = named(tmp_path)
    both = {"default": 1.0, tmp_path / "small": 0.5}
    mixed = kd.combine_adapters(both, model=model)
    names = kd.combine_adapters({"default": 1.0, "small": 0.5}, model=model)
    assert_same(of(mixed), of(names), 1e-6)
    assert list(mixed.layers) == list(names.layers) == LAYERS
    # Files, by the layers of a model that isn't enabled.
    alone = kd.combine_adapters({tmp_path / "small": 0.5}, model=network())
    half = {path: 0.5 * x for path, x in updates(small).items()}
    assert_same(of(alone), half)


@pytest.mark.parametrize("live", [True, False], ids=["name", "file"])
@pytest.mark.parametrize("scaling", SCALES)
def test_an_allocation_counts_as_it_computes(live, scaling, tmp_path):
    source = enabled(scaling=scaling)
    small = allocation(source, [2, 0, 3, 1])
    kd.save_adapter(source, tmp_path / "small", rank=small)
    wanted = {}
    for path, b in small.items():
        down, up = (
            backend.to_numpy(getattr(source._dylora.layers[path], side))
            for side in ("down", "up")
        )
        scale = 8 / 4 if scaling == "constant" else SCALES[scaling](8, b or 1)
        wanted[path] = 0.5 * scale * down[:, :b].astype("float64") @ up[:b]
    key, model = tmp_path / "small", None
    if live:
        key, model = "small", enabled(3, scaling=scaling)
        kd.load_adapter(model, tmp_path / "small", name="small")
        model.set_adapter("default")
    for method in ("concatenate", "svd"):
        combined = kd.combine_adapters({key: 0.5}, None, method, model=model)
        assert combined.ranks == dict(small)
        assert_same(of(combined), wanted)
    combined = kd.combine_adapters(
        {key: 0.5}, 3, "ties", model=model, density=1.0
    )
    assert_same(of(combined), wanted)
    assert combined.ranks == {p: 3 if b else 0 for p, b in small.items()}


def test_a_rank_for_each_layer(folders):
    where, a, b = folders
    small = allocation(a, [2, 1, 4, 3])
    combined = kd.combine_adapters({where["a"]: 1, where["b"]: 1}, small)
    assert combined.ranks == dict(small)
    wanted = weighted((1, updates(a)), (1, updates(b)))
    best = {path: cut(x, small[path]) for path, x in wanted.items()}
    assert_same(of(combined), best)
    assert kd.load_adapter(network(), combined).rank == small
    small = allocation(a, [2, 0, 4, 3])
    sparse = kd.combine_adapters(
        {where["a"]: 1, where["b"]: 1}, small, "dare", density=0.5
    )
    assert sparse.ranks == dict(small)


def test_tuned_cuts_of_lower_ranks_are_left_out(tmp_path):
    model = enabled()
    wanted = updates(model)
    with_tuned_cuts(model, 2)
    kd.save_adapter(model, tmp_path / "whole")
    kd.save_adapter(model, tmp_path / "cut", rank=2)
    whole = kd.combine_adapters({tmp_path / "whole": 1}, method="concatenate")
    assert not whole.cuts
    assert_same(of(whole), wanted)
    folded = kd.combine_adapters({tmp_path / "cut": 1}, method="concatenate")
    (tuned,) = model._dylora.named.cuts
    for path, layer in model._dylora.layers.items():
        left, right = tuned.sides(path)
        down, up = backend.to_numpy(layer.down), backend.to_numpy(layer.up)
        mixed = 8 / 2 * (down @ left).astype("float64") @ (right @ up)
        np.testing.assert_allclose(of(folded)[path], mixed, atol=1e-5)


def test_layers_without_names_are_found_by_their_place(tmp_path):
    def unnamed():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(5, "tanh")(inputs)
        return randomize(keras.Model(inputs, keras.layers.Dense(3)(x)))

    found = []
    for name in ("a", "b"):
        model = kd.enable_dylora(
            unnamed(),
            target_layers="all-linear",
            trainable_layers=(),
            rank=2,
            verbose=0,
        )
        kd.save_adapter(randomize_adapters(model), tmp_path / name)
        found.append(list(model._dylora.layers))
    assert found[0] != found[1]
    both = kd.combine_adapters({tmp_path / "a": 0.5, tmp_path / "b": 0.5})
    assert list(both.layers) == found[0]
    again = kd.load_adapter(unnamed(), both)
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(
        again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )


@pytest.mark.once
def test_a_quantized_base(tmp_path):
    model = kd.enable_dylora(
        network(), rank=4, target_layers=["einsum", "query"],
        trainable_layers=["head"], scaling="constant", verbose=0,
    )  # fmt: skip
    randomize_adapters(model)
    model.quantize("int8")
    first = updates(model)
    model.add_adapter("other")
    randomize_adapters(model, 5)
    second = updates(model)
    names = {"default": 1.0, "other": 1.0}
    combined = kd.combine_adapters(names, 8, "svd", model=model)
    assert_same(of(combined), weighted((1, first), (1, second)))
    cut_to_4 = kd.combine_adapters(names, model=model)
    kd.load_adapter(model, cut_to_4, name="both")
    best = weighted((1, first), (1, second))
    assert_same(updates(model), {p: cut(x, 4) for p, x in best.items()})


@pytest.mark.once
def test_a_tied_embedding(tmp_path):
    """Both directions of an embedding see the sum."""
    keras_hub = pytest.importorskip("keras_hub")

    def tied():
        ids = keras.Input((4,), dtype="int32")
        table = keras_hub.layers.ReversibleEmbedding(12, 6, name="table")
        return randomize(keras.Model(ids, table(table(ids), reverse=True)))

    model = kd.enable_dylora(
        tied(), rank=3, target_layers=["table"], trainable_layers=(), verbose=0
    )
    randomize_adapters(model)
    kd.save_adapter(model, tmp_path / "a")
    halves = kd.combine_adapters({tmp_path / "a": 1.0}, method="concatenate")
    x = np.arange(8).reshape(2, 4) % 12
    again = kd.load_adapter(tied(), halves)
    np.testing.assert_allclose(
        again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )


@pytest.mark.parametrize("method", once(["svd", "concatenate"]))
def test_in_a_row_with_others(method, folders, tmp_path, recwarn):
    where, a, b = folders
    both = {where["a"]: 0.7, where["b"]: 0.4}
    combined = kd.combine_adapters(both, method=method)
    kd.save_adapter(combined, tmp_path / "both")
    model = kd.load_adapter(network(), tmp_path / "both")
    whole = predicted(model)
    if method == "concatenate":
        kd.order_ranks(model)
        np.testing.assert_allclose(predicted(model), whole, atol=1e-5)
    model.set_rank(2)
    wanted = predicted(model)
    kd.save_adapter(model, tmp_path / "cut", rank=2)
    kd.truncate(model, 2)
    np.testing.assert_allclose(predicted(model), wanted, atol=1e-6)
    again = kd.load_adapter(network(), tmp_path / "cut")
    np.testing.assert_allclose(predicted(again), wanted, atol=1e-5)
    if method == "svd":  # which needs no model to be cut
        kd.save_adapter(combined, tmp_path / "cut-too", rank=2)
        other = kd.load_adapter(network(), tmp_path / "cut-too")
        np.testing.assert_allclose(predicted(other), wanted, atol=1e-5)
    np.testing.assert_allclose(predicted(kd.merge(again)), wanted, atol=1e-5)
    again.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predicted(loaded), wanted, atol=1e-5)
    loaded.compile(keras.optimizers.Adam(1e-2), "mse")
    y = mlp_data(8)[1]
    history = loaded.fit(ids(), y, epochs=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert set(history["rank"]) == {2}
    # Once more, of what was combined and trained.
    kd.save_adapter(loaded, tmp_path / "trained")
    twice = kd.combine_adapters({tmp_path / "trained": 1, where["a"]: 1})
    best = weighted((1, updates(loaded)), (1, updates(a)))
    assert_same(of(twice), {path: cut(x, 4) for path, x in best.items()})
    assert not [w for w in recwarn if "Adapters are of use" in str(w.message)]


@pytest.mark.once
def test_trained_on_at_every_rank(folders):
    """What trains it is the config of the model that it is put on."""
    where, a, _ = folders
    combined = kd.combine_adapters({where["a"]: 1.0, where["b"]: 1.0})
    model = kd.enable_dylora(
        network(),
        kd.DyLoRAConfig.progressive(full_rank_steps=0, rank=4, alpha=32),
        target_layers=LAYERS,
        trainable_layers=["head"],
        verbose=0,
    )
    kd.load_adapter(model, combined)
    assert_same(updates(model), of(combined))
    assert model.dylora_config.min_rank == 1
    model.compile("adam", "mse")
    model.fit(ids(), mlp_data(8)[1], verbose=0)


def test_a_cut_without_an_order_warns(folders, tmp_path):
    where, *_ = folders
    both = {where["a"]: 1.0, where["b"]: 1.0}
    combined = kd.combine_adapters(both, method="concatenate")
    with pytest.warns(UserWarning, match="Adapters are of use"):
        kd.save_adapter(combined, tmp_path / "cut", rank=2)


def test_another_scaling_is_right_at_the_maximum(folders):
    where, a, _ = folders
    combined = kd.combine_adapters({where["a"]: 1.0, where["b"]: 1.0})
    with pytest.warns(UserWarning, match="scales all of its adapters") as found:
        kd.load_adapter(a, combined, name="both")
    (warning,) = (w for w in found if "scales all" in str(w.message))
    assert warning.filename == __file__
    assert_same(updates(a), of(combined))
    wanted = kd.load_adapter(network(), combined)
    np.testing.assert_allclose(predicted(a), predicted(wanted), atol=1e-5)


def test_it_is_no_model(folders, tmp_path):
    where, *_ = folders
    both = kd.combine_adapters({where["a"]: 1.0})
    with pytest.raises(ValueError, match="must be enabled"):
        kd.to_peft(both, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_its_text_is_short(folders):
    where, *_ = folders
    text = repr(kd.combine_adapters({where["a"]: 1.0}))
    assert text == (
        "AdapterWeights(4 layers, maximum rank 4, 2 weights trained in full)"
    )


@pytest.mark.once
def test_files_of_the_first_version():
    key = OLD / "sampled_adapter"
    with pytest.raises(ValueError, match="first version don't say"):
        kd.combine_adapters({key: 1.0})
    model = randomize(roberta_classifier(num_layers=1))
    combined = kd.combine_adapters({key: 1.0}, model=model)
    found = kd.load_adapter(model, combined)
    wanted = randomize(roberta_classifier(num_layers=1))
    kd.load_adapter(wanted, key)
    np.testing.assert_allclose(
        found.predict(tokens(4), verbose=0),
        wanted.predict(tokens(4), verbose=0),
        atol=1e-5,
    )


WRONG = {
    "method": ({"method": "linear"}, ValueError, "must be one of.*'linear'"),
    "a-list": ({"adapters": ["a", "b"]}, TypeError, "a dict of names"),
    "none": ({"adapters": {}}, ValueError, "at least one"),
    "key": ({"adapters": {1: 1.0}}, TypeError, "a dict.*1: 1.0"),
    "weight": ({"adapters": {"a": "1"}}, TypeError, "numbers.*'a': '1'"),
    "true": ({"adapters": {"a": True}}, TypeError, "'a': True"),
    "nan": ({"adapters": {"a": np.nan}}, ValueError, "must be finite.*'a'"),
    "not-there": ({"adapters": {"c": 1.0}}, ValueError, "'c' that isn't there"),
    "rank-0": ({"rank": 0}, ValueError, "between 1 and 7.*rank=0"),
    "rank-8": ({"rank": 8}, ValueError, "between 1 and 7.*rank=8"),
    "rank-float": ({"rank": 2.0}, TypeError, "must be an integer"),
    "cut-concatenated": (
        {"rank": 4, "method": "concatenate"},
        ValueError,
        "keeps all columns.*rank=4 of 7",
    ),
    "no-density": ({"method": "ties"}, ValueError, "'ties' needs a `density`"),
    "density-0": (
        {"method": "dare", "density": 0.0},
        ValueError,
        r"in \(0, 1\].*density=0.0",
    ),
    "density-svd": (
        {"density": 0.5},
        ValueError,
        "'svd' takes no `density`.*0.5",
    ),
    "seed-ties": (
        {"method": "ties", "density": 0.5, "seed": 3},
        ValueError,
        "'ties' takes no `seed`.*seed=3",
    ),
    "seed": (
        {"method": "dare", "density": 0.5, "seed": 0.5},
        TypeError,
        "`seed` must be an integer",
    ),
    "majority": (
        {"method": "ties", "density": 0.5, "majority_sign_method": "all"},
        ValueError,
        "`majority_sign_method` must be one of.*'all'",
    ),
    "head": ({"head": "c"}, ValueError, "one of the adapters.*head='c'"),
    "sum-0": (
        {"adapters": {"a": 1.0, "b": -1.0}},
        ValueError,
        "a positive sum to average heads. `head",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case, folders, monkeypatch):
    arguments, error, message = WRONG[case]
    where, *_ = folders
    monkeypatch.chdir(where["a"].parent)
    arguments = {"adapters": {"a": 1.0, "b": 1.0}, **arguments}
    with pytest.raises(error, match=f"(?s){message}"):
        kd.combine_adapters(**arguments)


def other_layers():
    model = kd.enable_dylora(
        network(),
        rank=4,
        target_layers=LAYERS[:-1],
        trainable_layers=["head"],
        verbose=0,
    )
    return randomize_adapters(model)


def other_base():
    model = enabled(2)
    kernel = model.get_layer("query").kernel
    kernel.assign(kernel + 1)
    return model


def other_model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, name="query")(inputs)
    model = randomize(keras.Model(inputs, x))
    return kd.enable_dylora(model, trainable_layers=(), rank=4, verbose=0)


def diverged():
    model = enabled(2)
    layer = model.get_layer("conv")
    layer.down.assign(layer.down * np.nan)
    return model


UNLIKE = {
    "layers": (other_layers, r"same layers.*other'.*without \['query'\]"),
    "base": (other_base, "one model and base.*other'.*of a base whose 'query"),
    "model": (other_model, "one model and base.*other'.*as many layers"),
    "head": (lambda: enabled(2, classes=2), r"averaged. `head=….*\(5, 2\)"),
    "no-head": (lambda: enabled(2, trainable_layers=()), "averaged. `head=…"),
    "diverged": (diverged, r"must be finite.*other'.*\['conv'\]"),
}


@pytest.mark.parametrize("live", [False, True], ids=["files", "model"])
@pytest.mark.parametrize("case", UNLIKE)
def test_adapters_that_are_unlike(case, live, folders, tmp_path):
    make, message = UNLIKE[case]
    where, *_ = folders
    kd.save_adapter(make(), tmp_path / "other")
    both = {where["a"]: 1.0, tmp_path / "other": 1.0}
    model = network() if live else None
    if case == "head" and not live:
        # The shape of the head is no part of the base.
        combined = kd.combine_adapters(both, head=where["a"])
        assert combined.trained["head/kernel"].shape == (5, 3)
    with pytest.raises(ValueError, match=f"(?s){message}.*"):
        kd.combine_adapters(both, model=model)


def test_a_name_that_is_none(tmp_path):
    model, _ = named(tmp_path)
    with pytest.raises(ValueError, match="name of an adapter.*'french'.*small"):
        kd.combine_adapters({"french": 1.0}, model=model)


def test_a_peft_folder_needs_a_model():
    with pytest.raises(ValueError, match="so it needs `model`"):
        kd.combine_adapters({OLD / "sampled_peft": 1.0})


def test_more_columns_than_the_model_has(folders):
    where, a, _ = folders
    both = {where["a"]: 1.0, where["b"]: 1.0}
    combined = kd.combine_adapters(both, method="concatenate")
    assert isinstance(combined, AdapterWeights)
    with pytest.raises(ValueError, match="at most the rank.*rank 7"):
        kd.load_adapter(a, combined, name="both")
    assert a.adapter_names == ["default"]

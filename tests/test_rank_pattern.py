"""A maximum rank for each layer before training, by pattern of its path."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora._keras.optimizers import optimizer_slots
from tests import backend
from tests.marks import once
from tests.models import (
    allocation,
    classification_loss,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

RANK, LOWER, ALPHA = 4, 2, 8.0
SCALES = {
    "rank": lambda b: ALPHA / b,
    "sqrt": lambda b: ALPHA / b**0.5,
    "constant": lambda b: ALPHA / RANK,
}
DIMENSIONS = {"first": (10, 12), "second": (12, 6)}


def plain(seed=0, names=("first", "second")):
    inputs = keras.Input((10,))
    x = keras.layers.Dense(12, "tanh", name=names[0])(inputs)
    x = keras.layers.Dense(6, name=names[1])(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    return randomize(keras.Model(inputs, outputs), seed)


def patterned(names=("first", "second"), **options):
    """A model whose first layer has half of the rank."""
    model = plain(names=names)
    _, first, second, _ = (layer.name for layer in model.layers)
    options = {
        "rank": RANK,
        "alpha": ALPHA,
        "rank_pattern": {first: LOWER},
        "target_layers": [first, second],
        "trainable_layers": "head",
        "verbose": 0,
        **options,
    }
    return randomize_adapters(kd.enable_dylora(model, **options))


def compiled(model, rate=0.0):
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def expected(model, rank, scaling="rank"):
    """The outputs at a rank: a layer is at that, or at its own maximum."""
    x, _ = mlp_data()
    for name, activation in (("first", np.tanh), ("second", lambda x: x)):
        layer = model.get_layer(name)
        weights = layer.kernel, layer.bias, layer.down, layer.up
        kernel, bias, down, up = map(backend.to_numpy, weights)
        b = min(rank, LOWER if name == "first" else RANK)
        if b:
            kernel = kernel + SCALES[scaling](b) * down[:, :b] @ up[:b]
        x = activation(x @ kernel + bias)
    kernel, bias = map(backend.to_numpy, model.get_layer("head").weights)
    return x @ kernel + bias


def outputs(model, rank=None):
    x, _ = mlp_data()
    if rank is None:
        return backend.to_numpy(model(x))
    with model.rank_scope(rank):
        return backend.to_numpy(model(x))


def assert_same(found, wanted, atol=2e-5):
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=1e-5)


def assert_same_at_every_rank(model, other):
    for b in range(RANK + 1):
        assert_same(outputs(model, b), outputs(other, b))


def max_ranks(model):
    return [layer.rank for layer in model.dylora_layers]


def test_layers_are_as_large_as_their_maximum():
    model = patterned()
    assert max_ranks(model) == [LOWER, RANK]
    sizes = [
        (tuple(x.down.shape), tuple(x.up.shape)) for x in model.dylora_layers
    ]
    assert sizes == [((10, 2), (2, 12)), ((12, 4), (4, 6))]
    head = 6 * 3 + 3
    columns = {b: min(b, 2) * 22 + b * 18 for b in range(1, 5)}
    assert head + columns[4] == sum(
        int(np.prod(v.shape)) for v in model.trainable_variables
    )
    report = kd.evaluate_ranks(compiled(model), *mlp_data(), verbose=0)
    assert report.parameters == {b: head + n for b, n in columns.items()}
    lines = []
    model.dylora_summary(lines.append)
    assert "10 x 12      2           44" in lines[0]
    assert "12 x 6      4           72" in lines[0]


@pytest.mark.parametrize("scaling", SCALES)
def test_a_layer_is_at_the_rank_or_at_its_maximum(scaling):
    model = patterned(scaling=scaling)
    assert model.rank == RANK
    assert_same(outputs(model), expected(model, RANK, scaling))
    for b in range(RANK + 1):
        model.set_rank(b)
        assert model.rank == b
        assert [x.active_rank for x in model.dylora_layers] == [min(b, 2), b]
        assert_same(outputs(model), expected(model, b, scaling))
        assert_same(outputs(kd.merge(model, b)), expected(model, b, scaling))


PATTERNS = {
    "name": ({"query": 2}, [2, 4, 2, 4]),
    "path": (
        {"transformer_layer_1/self_attention_layer/value": 3},
        [4, 4, 4, 3],
    ),
    "expression": ({r".*layer_0/.*": 1}, [1, 1, 4, 4]),
    "first-counts": ({r".*_0/.*query": 1, "query": 3}, [1, 4, 3, 4]),
    "the-rest": ({r".*_0/.*value": 4, ".*": 2}, [2, 4, 2, 2]),
    "empty": ({}, [4, 4, 4, 4]),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_are_those_of_target_layers(case):
    pattern, ranks = PATTERNS[case]
    model = kd.enable_dylora(
        roberta_classifier(), rank=4, rank_pattern=pattern, verbose=0
    )
    assert max_ranks(model) == ranks
    assert model.dylora_config.rank_pattern == (pattern or None)
    model.set_rank(3)
    assert model.rank == 3


WRONG = {
    "no-dict": (["first"], TypeError, "must be a dict of names"),
    "no-name": ({3: 2}, TypeError, "must be a dict of names"),
    "no-rank": ({"first": 2.0}, TypeError, "rank of 'first'` must be an int"),
    "zero": ({"first": 0}, ValueError, "leave it out of `target_layers`"),
    "too-high": ({"first": 5}, ValueError, "`rank` is the maximum of all"),
    "nothing": (
        {"frist": 2},
        ValueError,
        r"'frist' .did you mean 'first'.*none of \['first', 'second'\]",
    ),
    "not-adapted": ({"head": 2}, ValueError, "'head', which matches none"),
    "no-expression": ({"(": 2}, ValueError, "must be a name or a regular"),
    "hidden": (
        {".*s.*": 2, "first": 1},
        ValueError,
        "put narrow patterns before wide ones",
    ),
    "none-at-the-rank": ({".*": 2}, ValueError, "all 2 layers at most 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_patterns(case):
    pattern, error, message = WRONG[case]
    model = plain()
    before = outputs(model)
    with pytest.raises(error, match=message):
        kd.enable_dylora(
            model,
            rank=RANK,
            rank_pattern=pattern,
            target_layers=["first", "second"],
        )
    assert type(model.get_layer("first")) is keras.layers.Dense
    np.testing.assert_array_equal(outputs(model), before)


def test_config_is_written_and_read():
    config = kd.DyLoRAConfig(rank_pattern={"key": np.int64(2)})
    written = config.get_config()
    assert written["rank_pattern"] == {"key": 2}
    assert type(written["rank_pattern"]["key"]) is int
    assert kd.DyLoRAConfig.from_config(written) == config
    del written["rank_pattern"]  # as an earlier version wrote it
    assert kd.DyLoRAConfig.from_config(written) == kd.DyLoRAConfig()


def test_a_step_is_at_the_drawn_rank():
    model = compiled(patterned())
    seen = {}
    for _ in range(12):
        model.reset_metrics()  # which Keras 3.14 doesn't do by itself
        logs = model.train_on_batch(*mlp_data(), return_dict=True)
        seen[int(logs["rank"])] = float(logs["loss"])
    assert len(seen) > 2
    for b, loss in seen.items():
        wanted = np.mean((expected(model, b) - mlp_data()[1]) ** 2)
        assert loss == pytest.approx(wanted, rel=1e-5)
    assert model.rank == RANK


@pytest.mark.parametrize("objective", once(["summed", "matryoshka"]))
def test_objectives_without_a_drawn_rank(objective):
    model = compiled(patterned(objective=objective), 0.1)
    if objective == "summed":
        found = float(
            model.train_on_batch(*mlp_data(), return_dict=True)["loss"]
        )
        model = patterned()
        losses = [
            np.mean((expected(model, b) - mlp_data()[1]) ** 2)
            for b in range(1, RANK + 1)
        ]
        assert found == pytest.approx(np.mean(losses), rel=1e-5)
        return
    gates, _ = model._dylora.objective.gate(model._dylora, None)
    gates = [backend.to_numpy(gate) for gate in gates.values()]
    scale, ranks = SCALES["rank"], range(1, RANK + 1)
    for gate, most in zip(gates, (LOWER, RANK), strict=True):
        at = [
            [scale(min(b, most)) * (i < min(b, most)) for i in range(RANK)]
            for b in ranks
        ]
        assert_same(gate, np.sum(at, axis=0))
    model.train_on_batch(*mlp_data())


def test_each_example_is_at_its_rank():
    model = patterned(draw="example")
    x, _ = mlp_data()
    with model.draw_ranks(x):
        found = backend.to_numpy(model(x, training=True))
    at = np.stack([expected(model, b) for b in range(1, RANK + 1)])
    nearest = np.abs(at - found).max(axis=-1)
    assert nearest.min(axis=0).max() < 2e-5
    counts = np.bincount(nearest.argmin(axis=0), minlength=RANK)
    assert counts.tolist() == [16] * RANK


def test_frozen_steps_change_the_column_that_a_layer_is_at():
    model = patterned(frozen=True)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    ranks = set()
    for _ in range(8):
        before = [backend.to_numpy(x.down) for x in model.dylora_layers]
        rows = [backend.to_numpy(x.up) for x in model.dylora_layers]
        logs = model.train_on_batch(*mlp_data(), return_dict=True)
        b = int(logs["rank"])
        ranks.add(b)
        for layer, down, up in zip(
            model.dylora_layers, before, rows, strict=True
        ):
            moved = np.any(backend.to_numpy(layer.down) != down, axis=0)
            assert np.flatnonzero(moved).tolist() == [min(b, layer.rank) - 1]
            moved = np.any(backend.to_numpy(layer.up) != up, axis=1)
            assert np.flatnonzero(moved).tolist() == [min(b, layer.rank) - 1]
    assert max(ranks) > LOWER


@pytest.mark.parametrize("scaling", SCALES)
def test_order_keeps_the_maximum_and_gives_the_best_cuts(scaling):
    model = patterned(scaling=scaling, min_rank=RANK)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    model.fit(*mlp_data(), verbose=0)
    whole = [layer.delta_kernel(layer.rank) for layer in model.dylora_layers]
    before = outputs(model)
    momentum = {
        id(owner): slot for slot, owner in optimizer_slots(model.optimizer)
    }

    def turned():
        """What stays as momenta turn with the columns and rows."""
        sides = [(x.down, x.up) for x in model.dylora_layers]
        pairs = [(momentum[id(v)], v) for each in sides for v in each]
        pairs = [[backend.to_numpy(v) for v in each] for each in pairs]
        return [np.sum(slot * weights) for slot, weights in pairs]

    kept = turned()
    kd.order_ranks(model)
    assert model.dylora_config.scaling == "constant"
    assert max_ranks(model) == [LOWER, RANK]
    assert_same(outputs(model), before)
    for found, wanted in zip(turned(), kept, strict=True):
        assert_same(found, wanted)
    for layer, delta in zip(model.dylora_layers, whole, strict=True):
        left, singular, right = np.linalg.svd(delta)
        for b in range(1, layer.rank + 1):
            best = left[:, :b] * singular[:b] @ right[:b]
            assert_same(layer.delta_kernel(b), best)


def test_progressive_runs_end_in_order():
    config = kd.DyLoRAConfig.progressive(
        full_rank_steps=2,
        rank=RANK,
        rank_pattern={"first": LOWER},
        target_layers=["first", "second"],
        trainable_layers="head",
        tune=0.25,
    )
    model = kd.enable_dylora(plain(), config, verbose=0)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(*mlp_data(), batch_size=8, verbose=0)
    assert model._dylora.tuned_cut(2).ranks == {"first": 2, "second": 2}
    assert_same(outputs(kd.merge(model, 2)), outputs(model, 2))
    assert not int(backend.to_numpy(model._dylora.full_rank))


def test_tuned_cuts_are_of_the_columns_that_a_layer_has(tmp_path):
    model = compiled(patterned())
    loss = kd.evaluate_ranks(model, *mlp_data(), verbose=0).values("loss")
    kd.tune_ranks(model, *mlp_data(), ranks=[1, 3], steps=30, verbose=0)
    report = kd.evaluate_ranks(model, *mlp_data(), verbose=0)
    tuned = report.values("loss")
    assert tuned[0] < loss[0] and tuned[2] < loss[2]
    wanted = outputs(model, 3)
    assert_same(outputs(kd.merge(model, 3)), wanted)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(outputs(again, 3), wanted)
    kd.save_adapter(model, tmp_path / "adapter")
    again = kd.load_adapter(plain(), tmp_path / "adapter")
    assert_same(outputs(again, 3), wanted)
    kd.order_ranks(model)
    assert_same(outputs(model, 3), wanted, atol=2e-4)
    with pytest.raises(ValueError, match="A cut is below the maximum rank"):
        kd.tune_ranks(
            model, *mlp_data(), ranks=[allocation(model, [2, 4])], verbose=0
        )


def test_allocations_are_within_the_maximum_of_each_layer(tmp_path):
    model = compiled(patterned())
    whole = allocation(model, [2, 4])
    assert (whole.share, whole.max_rank) == (1.0, RANK)
    model.set_rank(whole)
    assert model.rank == RANK  # an allocation that is the maximum everywhere
    small = kd.allocate_ranks(model, *mlp_data(), budget=0.6, verbose=0)
    assert 0.4 < small.share <= 0.6
    assert small["first"] <= LOWER
    found = kd.allocate_ranks(model, *mlp_data(), budget=1.0, verbose=0)
    assert found == whole
    mixed = allocation(model, [1, 4])
    mixed.to_json(tmp_path / "mixed.json")
    again = kd.RankAllocation.from_json(tmp_path / "mixed.json")
    assert again == mixed and again.share == mixed.share
    model.set_rank(again)
    assert model.rank == mixed
    high = kd.RankAllocation({"first": 3, "second": 4}, DIMENSIONS, RANK)
    with pytest.raises(
        ValueError, match="rank of first` must be between 0 and 2"
    ):
        model.set_rank(high)
    with pytest.raises(ValueError, match="one for each adapted layer"):
        kd.RankAllocation({"first": 1}, {"first": (10, 12)}, {"second": 4})


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncated(rank):
    model = patterned()
    wanted = [outputs(model, b) for b in range(rank + 1)]
    kd.truncate(model, rank)
    assert max_ranks(model) == [min(LOWER, rank), rank]
    for b, output in enumerate(wanted):
        assert_same(outputs(model, b), output)
    model.compile("sgd", "mse")
    model.fit(*mlp_data(), verbose=0)


def test_truncated_to_an_allocation():
    model = patterned()
    mixed = allocation(model, [1, 3])
    wanted = outputs(model, mixed)
    kd.truncate(model, mixed)
    assert max_ranks(model) == [2, 3]
    assert_same(outputs(model), wanted)


def test_files(tmp_path):
    model = patterned()
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(*mlp_data(), verbose=0)
    model.set_rank(3)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert max_ranks(again) == [LOWER, RANK]
    assert again.rank == 3
    assert again.dylora_config == model.dylora_config
    assert_same_at_every_rank(again, model)
    for each in (model, again):
        each.fit(*mlp_data(), verbose=0, shuffle=False)
    assert_same_at_every_rank(again, model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = patterned()
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_at_every_rank(other, model)


FRESH = """
import sys, keras, numpy as np
import keras_dylora as kd
model = keras.saving.load_model(sys.argv[1])
x = np.load(sys.argv[2])
found = {f"rank_{b}": model.set_rank(b) or model.predict(x, verbose=0)
         for b in range(5)}
np.savez(sys.argv[3], **found)
"""


@pytest.mark.once
def test_a_fresh_process_computes_the_same(tmp_path):
    model = patterned()
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", mlp_data()[0])
    files = [tmp_path / x for x in ("model.keras", "x.npy", "found.npz")]
    backend.run_python(FRESH, *files)
    with np.load(files[-1]) as found:
        for b in range(RANK + 1):
            assert_same(found[f"rank_{b}"], expected(model, b))


@pytest.mark.parametrize("rank", [None, 3, 1])
def test_adapters_of_a_pattern(rank, tmp_path):
    # Keras numbers layers without a name anew, so that paths differ.
    model = patterned(names=(None, None))
    kd.save_adapter(model, tmp_path / "adapter", rank=rank)
    again = kd.load_adapter(plain(names=(None, None)), tmp_path / "adapter")
    high = rank or RANK
    assert max_ranks(again) == [min(LOWER, high), high]
    for b in range(high + 1):
        assert_same(outputs(again, b), outputs(model, b))
    assert again.rank == high


def test_an_adapter_fits_within_the_maximum_of_each_layer(tmp_path):
    wide = patterned(rank_pattern=None)
    kd.save_adapter(wide, tmp_path / "wide")
    model = patterned()
    before = outputs(model)
    with pytest.raises(ValueError, match="rank 4 for 'first' of rank 2"):
        kd.load_adapter(model, tmp_path / "wide")
    np.testing.assert_array_equal(outputs(model), before)
    kd.save_adapter(model, tmp_path / "narrow")
    kd.load_adapter(wide, tmp_path / "narrow")
    assert_same(outputs(wide), before)
    assert wide.rank == allocation(wide, [LOWER, RANK])
    mixed = allocation(model, [1, 4])
    kd.save_adapter(model, tmp_path / "mixed", rank=mixed)
    again = kd.load_adapter(plain(), tmp_path / "mixed")
    assert max_ranks(again) == [LOWER, RANK]
    assert_same(outputs(again), outputs(model, mixed))


def test_named_adapters_have_the_maxima_of_the_model(tmp_path):
    model = patterned()
    wanted = outputs(model)
    model.add_adapter("other")
    randomize_adapters(model, seed=5)
    assert max_ranks(model) == [LOWER, RANK] and model.rank == RANK
    other = outputs(model)
    # One from a file may have lower ranks, which are those it computes at.
    lower = patterned(rank_pattern={"second": 1}, rank=2)
    kd.save_adapter(lower, tmp_path / "lower")
    kd.load_adapter(model, tmp_path / "lower", name="lower")
    assert model.rank == allocation(model, [2, 1])
    assert_same(outputs(model), outputs(lower))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, again):
        assert_same(outputs(each), outputs(lower))
        each.set_adapter("other")
        assert_same(outputs(each), other)
        each.set_adapter("default")
        assert_same(outputs(each), wanted)


KINDS = {
    "convolution": (
        lambda x: keras.layers.Conv1D(6, 3, padding="same", name="adapted")(x),
        (8, 5),
    ),
    "einsum": (
        lambda x: keras.layers.EinsumDense(
            "abc,cde->abde", (8, 2, 3), name="adapted"
        )(x),
        (8, 5),
    ),
    "embedding": (
        lambda x: keras.layers.Embedding(11, 6, name="adapted")(x),
        (8,),
    ),
}


@pytest.mark.parametrize("kind", once(KINDS, but=["convolution"]))
@pytest.mark.parametrize("draw", once(["step", "example"], but=["example"]))
def test_kinds_of_layers(kind, draw, tmp_path):
    make, shape = KINDS[kind]
    inputs = keras.Input(shape, dtype="int32" if kind == "embedding" else None)
    x = keras.layers.Flatten()(make(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(x))
    kd.enable_dylora(
        randomize(model),
        rank=4,
        draw=draw,
        rank_pattern={"adapted": 2},
        target_layers=["adapted", "last"],
        trainable_layers=(),
        verbose=0,
    )
    randomize_adapters(model)
    assert max_ranks(model) == [2, 4]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 11, (16, *shape))
    if kind != "embedding":
        x = rng.normal(size=x.shape).astype("float32")
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(x, np.zeros((16, 2)), batch_size=8, verbose=0)
    model.set_rank(3)
    wanted = backend.to_numpy(model(x))
    assert_same(backend.to_numpy(kd.merge(model)(x)), wanted)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(backend.to_numpy(again(x)), wanted)
    kd.disable_dylora(model)
    assert not any("down" in v.name for v in model.weights)


@pytest.mark.once
def test_operations_in_a_row(tmp_path):
    def logits(model):
        return model.predict(tokens(), verbose=0)

    def fit(model):
        model.fit(tokens(), np.arange(32) % 2, batch_size=8, verbose=0)

    base = randomize(roberta_classifier(), scale=0.1)
    values = base.get_weights()
    model = kd.enable_dylora(
        base,
        rank=4,
        rank_pattern={r".*_0/.*": 2, "query": 3},
        target_layers="all-linear",
        verbose=0,
    )
    model.compile(keras.optimizers.Adam(1e-2), classification_loss())
    fit(model)
    ranks = max_ranks(model)
    assert set(ranks[:6]) == {2} and set(ranks[6:]) == {3, 4}
    wanted = logits(model)
    with pytest.warns(UserWarning, match="Columns are ordered for one scale"):
        kd.order_ranks(model)
    assert_same(logits(model), wanted)
    model.set_rank(3)
    wanted = logits(model)
    kd.truncate(model, 3)
    assert max_ranks(model) == [min(b, 3) for b in ranks]
    assert_same(logits(model), wanted)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert max_ranks(again) == max_ranks(model)
    assert_same(logits(again), wanted)
    fit(again)
    kd.save_adapter(again, tmp_path / "adapter", rank=2)
    again.set_rank(2)
    other = roberta_classifier()
    other.set_weights(values)
    kd.load_adapter(other, tmp_path / "adapter")
    assert set(max_ranks(other)) == {2}
    assert_same(logits(other), logits(again))


EXPORTS = {
    "shared": {},
    "merged": {"layout": "merged"},
    "adapters": {"adapters": "all"},
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(x, marks=pytest.mark.long)
        for x in ("shared", "merged", "adapters")
    ],
)
def test_exports_are_at_the_maximum_of_each_layer(kind, tmp_path):
    model = patterned()
    model.add_adapter("other")
    randomize_adapters(model, seed=5)
    mixed = allocation(model, [1, 4])
    ranks = {"one": 1, "three": 3, "four": 4, "mixed": mixed}
    # It is verified: compared with the live model in a fresh process.
    kd.export_ranks(model, tmp_path / "export", ranks=ranks, **EXPORTS[kind])

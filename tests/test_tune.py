"""Tuned cuts: what they compute, alone and in a row with all else."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    allocation,
    classification_loss,
    gpt2,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    tokens,
)

RANK = 4


def enabled(rank=RANK, **options):
    """A model whose adapters count for much."""
    inputs = keras.Input((10,))
    x = keras.layers.Dense(12, "tanh", name="first")(inputs)
    x = keras.layers.Dense(6, name="second")(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    model = randomize(keras.Model(inputs, outputs))
    options = {"scaling": "constant", "min_rank": rank, "alpha": 8, **options}
    kd.enable_dylora(
        model,
        rank=rank,
        target_layers=["first", "second"],
        trainable_layers="head",
        verbose=0,
        **options,
    )
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return randomize_adapters(model, scale=0.5)


def trained(**options):
    """One with its columns in order."""
    return kd.order_ranks(enabled(**options))


def tuned(ranks=(1, 2), steps=12, model=None, **options):
    model = model or trained(**options)
    return kd.tune_ranks(model, *mlp_data(), ranks, steps, verbose=0)


def losses(model, ranks):
    report = kd.evaluate_ranks(model, *mlp_data(), ranks, verbose=0)
    return np.array(report.values("loss"))


def outputs(model, *ranks):
    """What a model computes at ranks, or as it is."""
    found = []
    for rank in ranks or (model.rank,):
        with model.rank_scope(rank):
            found.append(predicted(model))
    return np.array(found)


def predicted(model):
    return model.predict(mlp_data(8)[0], verbose=0)


def assert_equal(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, wanted, atol=atol)


def test_a_tuned_rank_loses_less_and_nothing_else_changes():
    model = trained()
    before = losses(model, [1, 2, 3, 4])
    weights = backend.snapshot(model.weights)
    other = outputs(model, 0, 3, 4)
    assert tuned(model=model) is model
    after = losses(model, [1, 2, 3, 4])
    assert (after[:2] < before[:2] - 1e-3).all()
    assert_equal(after[2:], before[2:], 1e-6)
    assert_equal(outputs(model, 0, 3, 4), other, 1e-6)
    for value, wanted in zip(
        backend.snapshot(model.weights), weights, strict=True
    ):
        np.testing.assert_array_equal(value, wanted)


def test_what_a_layer_computes():
    model = randomize(mlp())
    model.compile("sgd", "mse")
    kd.tune_ranks(model, *mlp_data(), [2], steps=3, verbose=0)
    (cut,) = model._dylora.named.cuts
    layer = model.dylora_layers[0]
    kernel, bias, down, up = backend.snapshot(
        [layer.kernel, layer.bias, layer.down, layer.up]
    )
    left, right = cut.sides(next(iter(cut.ranks)))
    assert left.shape == (RANK, 2) and right.shape == (2, RANK)
    x = mlp_data()[0]
    wanted = x @ kernel + bias + 8 / 2 * (x @ down @ left) @ (right @ up)
    model.set_rank(2)
    assert_equal(backend.to_numpy(layer(x)), np.tanh(wanted))
    assert np.abs(left - np.eye(RANK)[:, :2]).max() > 1e-2
    layer.set_rank(1)  # the other layer is at 2 still
    plain = x @ (kernel + layer.delta_kernel(1)) + bias
    assert_equal(backend.to_numpy(layer(x)), np.tanh(plain))
    layer.set_rank(2)
    assert_equal(backend.to_numpy(layer(x)), np.tanh(wanted))


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "rate"), [(64, 0.0125), (1024, 0.05), (2048, 0.05)]
)
def test_the_rate_goes_with_the_targets(batch_size, rate, classes):
    """Adam's first step moves each entry by the rate."""
    model = trained()
    x, y = mlp_data(batch_size)
    if classes:
        y = y.argmax(axis=-1)
        model.compile("sgd", classification_loss())
    kd.tune_ranks(model, x, y, [2], 1, batch_size=batch_size, verbose=0)
    (cut,) = model._dylora.named.cuts
    for left in cut.left.values():
        moved = np.abs(left - np.eye(RANK)[:, :2])
        np.testing.assert_allclose(moved, rate, rtol=1e-3)


def test_a_batch_may_mix_cuts():
    model = tuned([1, 2])
    adaptation, turns = model._dylora, [0, 1, 1, 0, 0, 0, 1, 0]
    cuts = adaptation.named.cuts
    cores = {
        path: np.stack(
            [cuts[i].core(path, adaptation.config.scale) for i in turns]
        )
        for path in adaptation.layers
    }
    with adaptation.overridden(cores):
        found = backend.to_numpy(model(mlp_data(8)[0]))
    each = outputs(model, 1, 2)
    assert_equal(found, [each[i, row] for row, i in enumerate(turns)])


def test_the_same_each_time_and_ranks_one_after_another():
    model = tuned()
    before = outputs(model, 1, 2)
    assert_equal(outputs(tuned(model=model), 1, 2), before, 0)
    kd.tune_ranks(model, *mlp_data(), [3], 5, verbose=0)
    assert_equal(outputs(model, 1, 2), before, 0)
    ranks = [set(cut.ranks.values()) for cut in model._dylora.named.cuts]
    assert ranks == [{1}, {2}, {3}]


@pytest.mark.once
def test_a_rank_for_each_layer():
    model = trained()
    small = allocation(model, [0, 3])
    before = losses(model, [small])
    same = kd.RankAllocation.of(model, dict.fromkeys(small, 1))
    tuned([1, small], model=model)
    report = kd.evaluate_ranks(model, *mlp_data(), [small, same, 2], verbose=0)
    assert report.metrics[small]["loss"] < before[0] - 1e-3
    assert report.state(small) == report.state(same) == "tuned"
    plain = predicted(kd.merge(model, small))
    assert_equal(outputs(model, small), plain[None])
    kd.truncate(model, small)
    assert model.rank == small
    assert losses(model, [small]) < before - 1e-3


def test_report():
    model = trained()
    report = kd.evaluate_ranks(tuned([1], model=model), *mlp_data(), verbose=0)
    states = ["tuned", "cut", "cut", "trained"]
    assert [report.state(b) for b in report.ranks] == states
    assert str(report).count("tuned") == 1
    assert '"tuned": [\n    1\n  ]' in report.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_rank(1)


@pytest.mark.skipif(backend.NAME == "torch", reason="traces nothing")
def test_a_new_rank_traces_nothing():
    model = tuned()
    model.evaluate(*mlp_data(), verbose=0)
    with backend.count_compilations(model) as counts:
        for rank in (1, 2, 3, 4, allocation(model, [2, 1])):
            model.set_rank(rank)
            model.evaluate(*mlp_data(), verbose=0)
    assert not any(counts.values())


def merged(model, rank, _):
    return kd.merge(model, rank)


def from_keras_file(model, rank, folder):
    model.save(folder / "model.keras")
    found = keras.saving.load_model(folder / "model.keras")
    found.set_rank(rank)
    return found


def from_weights_file(model, rank, folder):
    model.save_weights(folder / "model.weights.h5")
    found = enabled()
    found.load_weights(folder / "model.weights.h5")
    found.set_rank(rank)
    return found


def from_adapter(model, rank, folder):
    """All ranks in a file."""
    kd.save_adapter(model, folder / "adapter")
    found = randomize_base()
    kd.load_adapter(found, folder / "adapter")
    found.set_rank(rank)
    return found


def from_small_adapter(model, rank, folder):
    kd.save_adapter(model, folder / "adapter", rank=rank)
    return kd.load_adapter(randomize_base(), folder / "adapter")


def beside(model, rank, folder):
    """As an adapter of a lower rank than the model's."""
    kd.save_adapter(model, folder / "adapter")
    found = enabled(6, alpha=12)
    kd.load_adapter(found, folder / "adapter", name="beside")
    found.set_rank(rank)
    found.set_adapter("default")
    found.set_adapter("beside")
    return found


def by_name(model, rank, folder):
    """Beside another, through a file."""
    model.set_rank(rank)
    model.add_adapter("other")
    assert not model._dylora.named.cuts
    model.save(folder / "model.keras")
    found = keras.saving.load_model(folder / "model.keras")
    found.set_adapter("default")
    return found


def cut_off(model, rank, _):
    with pytest.warns(UserWarning, match="with 1 other tuned cuts"):
        return kd.truncate(model, rank)


def ordered(model, rank, _):
    model.set_rank(rank)
    return kd.order_ranks(model)


DOORS = [
    merged, from_keras_file, from_weights_file, from_adapter,
    from_small_adapter, beside, by_name, cut_off, ordered,
]  # fmt: skip


def randomize_base():
    """The base of `enabled`, alone."""
    model = enabled()
    return kd.disable_dylora(model)


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("door", DOORS, ids=lambda f: f.__name__)
@pytest.mark.once
def test_through_every_door(door, rank, tmp_path):
    model = tuned()
    wanted = outputs(model, rank)[0]
    plain = outputs(trained(), rank)[0]
    assert np.abs(wanted - plain).max() > 1e-3
    found = door(model, rank, tmp_path)
    assert_equal(predicted(found), wanted)


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_order_with_another_scale(scaling):
    model = tuned(model=enabled(scaling=scaling, min_rank=1))
    before = outputs(model, 1, 2, 4)
    with pytest.warns(UserWarning, match="ordered for one scale"):
        kd.order_ranks(model)
    assert model.dylora_config.scaling == "constant"
    assert_equal(outputs(model, 1, 2, 4), before)


def test_each_adapter_has_its_own():
    model = tuned([1])
    first = outputs(model, 1)
    model.add_adapter("other")
    model.fit(*mlp_data(), verbose=0)
    tuned([1, 3], model=model)
    second = outputs(model, 1, 3)
    model.set_adapter("default")
    assert_equal(outputs(model, 1), first, 1e-6)
    assert len(model._dylora.named.cuts) == 1
    model.set_adapter("other")
    assert_equal(outputs(model, 1, 3), second, 1e-6)


def fit(model):
    model.fit(*mlp_data(), shuffle=False, verbose=0)


def train_on_batch(model):
    model.train_on_batch(*mlp_data())


def own_loop(model):
    x, _ = mlp_data()
    with model.draw_ranks(x):
        model(x, training=True)


@pytest.mark.parametrize("train", [fit, train_on_batch, own_loop])
@pytest.mark.once
def test_training_goes_on_without_them(train):
    model = tuned(min_rank=1)
    model.set_rank(1)
    outputs(model)
    wanted = trained(min_rank=1)
    wanted.set_rank(1)
    with pytest.warns(UserWarning, match="call `tune_ranks` once more"):
        train(model)
    train(wanted)
    assert_equal(outputs(model, 1, 2, 4), outputs(wanted, 1, 2, 4), 1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Training moves")
        train(model)
    tuned(model=model)
    assert losses(model, [1]) < losses(train_anew(wanted, train), [1])


def train_anew(model, train):
    train(model)
    return model


def test_a_fit_that_fails_loses_none():
    model = tuned()
    before = outputs(model, 1)
    with pytest.raises(Exception):  # noqa: B017  each backend has its own
        model.fit(mlp_data()[0][:, :9], mlp_data()[1], verbose=0)
    assert_equal(outputs(model, 1), before, 1e-6)


def test_a_head_may_be_trained_alone():
    model = tuned()
    for layer in model.dylora_layers:
        layer.trainable = False
    model.compile("adam", "mse")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Training moves")
        model.fit(*mlp_data(), verbose=0)
    assert len(model._dylora.named.cuts) == 2


def test_default_ranks():
    model = tuned(None, 1)
    chosen = [set(x.ranks.values()) for x in model._dylora.named.cuts]
    assert chosen == [{1}, {2}]
    some = kd.Categorical({3: 1, 4: 1})
    model = enabled(rank_distribution=some, min_rank=3)
    tuned(None, 1, model=model)
    chosen = [set(x.ranks.values()) for x in model._dylora.named.cuts]
    assert chosen == [{3}]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": [4]}, ValueError, "below the maximum"),
        ({"ranks": [0]}, ValueError, "`rank` must be between 1 and 4"),
        ({"ranks": [1.5]}, TypeError, "must be an integer"),
        ({"ranks": 2}, TypeError, "must be a list of integers"),
        ({"ranks": []}, ValueError, "must name a rank below"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"y": None}, ValueError, "inputs and targets"),
    ],
)
@pytest.mark.once
def test_bad_arguments(arguments, error, message):
    model = tuned([1])
    before = outputs(model, 1)
    x, y = mlp_data()
    given = {"x": x, "y": y, "ranks": [1], "steps": 1}
    with pytest.raises(error, match=message):
        kd.tune_ranks(model, **{**given, **arguments}, verbose=0)
    assert_equal(outputs(model, 1), before, 0)


def test_a_model_that_was_never_trained():
    model = randomize(mlp())
    for layer in model.dylora_layers:
        layer.up.assign(0 * layer.up)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be trained first"):
        kd.tune_ranks(model, *mlp_data(), [1], verbose=0)


@pytest.mark.families
def test_a_language_model():
    model = randomize(gpt2(), scale=0.3)
    kd.enable_dylora(
        model, rank=RANK, min_rank=RANK, target_layers="all-linear", verbose=0
    )
    randomize_adapters(model, scale=0.5)
    model.compile("adam", classification_loss(), sampler="greedy")
    kd.order_ranks(model)
    x = tokens()
    y = np.roll(x["token_ids"], -1, axis=1)
    plain = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    kd.tune_ranks(model, x, y, [1, 2], 8, verbose=0)
    report = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    assert (np.array(report.values("loss")) < plain.values("loss")).all()
    model.set_rank(2)
    prompt = tokens(2, 12)
    merged = kd.merge(model)
    assert_equal(
        model.generate(prompt, stop_token_ids=None)["token_ids"],
        merged.generate(prompt, stop_token_ids=None)["token_ids"],
        0,
    )

"""Several adapters on one base: each as though it were alone."""

import json
import zipfile

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.live import named
from tests import backend
from tests.models import (
    allocation,
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)


def enabled(rank=4, compiled=True, scaling="rank", alpha=8, seed=0, **kwargs):
    model = randomize(roberta_classifier(), seed=seed)
    kd.enable_dylora(
        model, rank=rank, alpha=alpha, scaling=scaling, verbose=0, **kwargs
    )
    if compiled:
        model.compile(keras.optimizers.AdamW(1e-2), classification_loss())
    return model


def train(model, seed):
    x, y = tokens(seed=seed), labels(seed=seed)
    logs = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    return [value for values in logs.values() for value in values]


def outputs(model, rank=None):
    if rank is None:
        return backend.to_numpy(model(tokens(4)))
    with model.rank_scope(rank):
        return backend.to_numpy(model(tokens(4)))


def states(model):
    """The trained values by the name of the adapter."""
    found = {}
    for name in model.adapter_names:
        model.set_adapter(name)
        found[name] = [backend.to_numpy(v) for v in model.trainable_variables]
    return found


@pytest.mark.parametrize(
    "full_rank_steps", [pytest.param(0, marks=pytest.mark.long), 4]
)
@pytest.mark.once
def test_each_is_trained_as_though_it_were_alone(full_rank_steps):
    options = {"full_rank_steps": full_rank_steps, "scaling": "constant"}
    alone = {}
    for name, seed in (("german", 1), ("french", 2)):
        model = enabled(**options)
        logs = [train(model, seed), train(model, seed + 10)]
        alone[name] = (
            logs,
            [backend.to_numpy(v) for v in model.trainable_variables],
        )
    model = enabled(**options)
    model.add_adapter("french")
    first = {"french": train(model, 2)}
    model.set_adapter("default")
    first["german"] = train(model, 1)
    model.set_adapter("french")
    second = {"french": train(model, 12)}
    model.set_adapter("default")
    second["german"] = train(model, 11)
    trained = states(model)
    trained["german"] = trained.pop("default")
    for name, (logs, weights) in alone.items():
        np.testing.assert_allclose([first[name], second[name]], logs, 1e-5)
        for mine, wanted in zip(trained[name], weights, strict=True):
            np.testing.assert_allclose(mine, wanted, atol=1e-6)


@pytest.mark.once
def test_learning_rate_is_the_users():
    model = enabled()
    train(model, 1)
    model.add_adapter("other")
    model.optimizer.learning_rate = 0.5
    model.set_adapter("default")
    assert float(model.optimizer.learning_rate) == 0.5


@pytest.mark.parametrize(
    "scaling",
    [
        "rank",
        *(
            pytest.param(x, marks=pytest.mark.long)
            for x in ("sqrt", "constant")
        ),
    ],
)
@pytest.mark.once
def test_a_loaded_one_has_its_own_rank_scale_and_head(scaling, tmp_path):
    small = randomize_adapters(
        enabled(rank=2, alpha=5, compiled=False, scaling=scaling), seed=7
    )
    for weight in small.trainable_variables[-2:]:
        weight.assign(weight + 0.5)
    kd.save_adapter(small, tmp_path / "small")
    model = randomize_adapters(enabled(scaling=scaling))
    before = {b: outputs(model, b) for b in range(5)}
    kd.load_adapter(model, tmp_path / "small", name="small")
    assert model.adapter_names == ["default", "small"]
    assert (model.active_adapter, model.rank) == ("small", 2)
    for b in range(3):
        np.testing.assert_allclose(
            outputs(model, b), outputs(small, b), atol=1e-5
        )
    for above in (model.set_rank, lambda b: kd.merge(model, b)):
        with pytest.raises(ValueError, match="between 0 and 2"):
            above(3)
    report = kd.evaluate_ranks(model, tokens(8), labels(8), verbose=0)
    assert list(report.metrics) == [1, 2]
    np.testing.assert_allclose(
        backend.to_numpy(kd.merge(model)(tokens(4))), outputs(small), atol=1e-5
    )
    kd.save_adapter(model, tmp_path / "again")
    again = randomize(roberta_classifier())
    kd.load_adapter(again, tmp_path / "again")
    assert again.dylora_config.rank == 2
    np.testing.assert_allclose(outputs(again), outputs(small), atol=1e-5)
    lines = []
    model.dylora_summary(print_fn=lines.append)
    assert "small (active)" in lines[0]
    model.set_adapter("default")
    assert model.rank == 4
    for b, wanted in before.items():
        np.testing.assert_array_equal(outputs(model, b), wanted)
    # Trained, it has all columns.
    model.set_adapter("small")
    train(model, 3)
    model.set_rank(4)
    assert np.abs(outputs(model, 4) - outputs(model, 2)).max() > 1e-3


def test_one_at_an_allocation(tmp_path):
    source = randomize_adapters(enabled(compiled=False))
    ranks = allocation(source, [3, 0, 2])
    kd.save_adapter(source, tmp_path / "a", rank=ranks)
    wanted = outputs(source, ranks)
    model = enabled()
    kd.load_adapter(model, tmp_path / "a", name="a")
    assert dict(model.rank) == dict(ranks)
    np.testing.assert_allclose(outputs(model), wanted, atol=1e-5)
    model.set_adapter("default")
    model.set_rank(1)
    model.set_adapter("a")
    assert dict(model.rank) == dict(ranks)


def test_the_first_may_have_a_name(tmp_path):
    kd.save_adapter(randomize_adapters(enabled()), tmp_path / "a")
    model = randomize(roberta_classifier())
    kd.load_adapter(model, tmp_path / "a", name="german")
    assert model.adapter_names == ["german"]
    assert model.active_adapter == "german"


def test_head_stays_where_classes_differ(tmp_path):
    source = randomize_adapters(enabled(compiled=False))
    kd.save_adapter(source, tmp_path / "a")
    other = randomize(roberta_classifier(), seed=0)
    more = type(other)(other.backbone, num_classes=5, preprocessor=None)
    head = [backend.to_numpy(v) for v in more.weights[-2:]]
    with pytest.raises(ValueError, match="`head=False`"):
        kd.load_adapter(more, tmp_path / "a")
    assert not isinstance(more, kd.DyLoRAModel)
    kd.load_adapter(more, tmp_path / "a", head=False)
    for mine, wanted in zip(
        more.dylora_layers, source.dylora_layers, strict=True
    ):
        np.testing.assert_array_equal(mine.up, wanted.up)
    for mine, wanted in zip(more.weights[-2:], head, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(mine), wanted)
    assert more(tokens(2)).shape == (2, 5)


@pytest.mark.once
def test_a_file_keeps_all(tmp_path):
    model = enabled()
    train(model, 1)
    model.add_adapter("french")
    train(model, 2)
    model.set_rank(3)
    small = randomize_adapters(enabled(rank=2, compiled=False), seed=7)
    kd.save_adapter(small, tmp_path / "small")
    kd.load_adapter(model, tmp_path / "small", name="small")
    model.set_adapter("french")
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))["config"]
    assert config["format_version"] == 2  # which older ones refuse
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.adapter_names == ["default", "french", "small"]
    assert loaded.active_adapter == "french"
    for name in model.adapter_names:
        for each in (model, loaded):
            each.set_adapter(name)
        assert loaded.rank == model.rank
        np.testing.assert_allclose(outputs(loaded), outputs(model), atol=1e-6)
    with pytest.raises(ValueError, match="between 0 and 2"):
        loaded.set_rank(3)


@pytest.mark.long
def test_a_run_goes_on_from_a_file(tmp_path):
    """The place of each in its rank sequence, and that its steps at the
    maximum are over; also with another optimizer."""
    options = {"full_rank_steps": 4, "scaling": "constant"}
    model = enabled(**options)
    train(model, 1)
    model.add_adapter("other")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    model.compile(keras.optimizers.AdamW(1e-2), classification_loss())
    for each in (model, loaded):
        each.set_adapter("default")
    alone = enabled(**options)
    train(alone, 1)
    alone.compile(keras.optimizers.AdamW(1e-2), classification_loss())
    logs = train(alone, 2)
    for each in (model, loaded):
        np.testing.assert_allclose(train(each, 2), logs, rtol=1e-5)


def test_weights_keep_all_and_those_of_one_change_the_active(tmp_path):
    one = randomize_adapters(enabled(compiled=False), seed=5)
    one.save_weights(tmp_path / "one.weights.h5")
    model = randomize_adapters(enabled(compiled=False))
    default = outputs(model)
    model.add_adapter("other")
    model.load_weights(tmp_path / "one.weights.h5")
    np.testing.assert_array_equal(outputs(model), outputs(one))
    model.save_weights(tmp_path / "two.weights.h5")
    fresh = enabled(compiled=False)
    fresh.load_weights(tmp_path / "two.weights.h5")
    assert fresh.active_adapter == "other"
    fresh.set_adapter("default")
    np.testing.assert_array_equal(outputs(fresh), default)


def test_a_swap_traces_nothing():
    model = enabled()
    train(model, 1)
    model.predict(tokens(8), verbose=0)
    model.add_adapter("other")
    train(model, 1)
    with backend.count_compilations(model) as counts:
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            train(model, 2)
            model.predict(tokens(8), verbose=0)
    if backend.NAME != "torch":  # which compiles nothing
        assert not any(counts.values())


def test_an_interruption_leaves_the_active_one(monkeypatch):
    model = randomize_adapters(enabled(compiled=False))
    model.add_adapter("other")
    randomize_adapters(model, seed=5)
    before = outputs(model)
    assign = named._replace

    def interrupted(variables, values):
        monkeypatch.setattr(named, "_replace", assign)
        assign(variables[:3], values[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(named, "_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.set_adapter("default")
    assert model.active_adapter == "other"
    np.testing.assert_array_equal(outputs(model), before)


@pytest.mark.long
def test_within_fit():
    """A callback that changes the adapter after each epoch."""
    turns = ["other", "default", "other"]

    class Turn(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.set_adapter(turns[epoch])

    model = enabled()
    model.add_adapter("other")
    model.set_adapter("default")
    x, y = tokens(), labels()
    common = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=3, callbacks=[Turn()], **common)
    apart = enabled()
    apart.add_adapter("other")
    for name in ("default", "other", "default"):
        apart.set_adapter(name)
        apart.fit(x, y, **common)
    mine, wanted = states(model), states(apart)
    for name in mine:
        for a, b in zip(mine[name], wanted[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_hand_built_model():
    model = mlp()
    x = np.ones((2, 10), "float32")
    randomize_adapters(model)
    before = backend.to_numpy(model(x))
    model.add_adapter("other")
    assert np.abs(backend.to_numpy(model(x)) - before).max() > 1e-3
    model.set_adapter("default")
    np.testing.assert_array_equal(backend.to_numpy(model(x)), before)


def test_names():
    model = enabled(compiled=False)
    with pytest.raises(TypeError, match="must be a string"):
        model.add_adapter(3)
    with pytest.raises(ValueError, match="empty"):
        model.add_adapter("")
    with pytest.raises(ValueError, match="must be free.*'default'"):
        model.add_adapter("default")
    with pytest.raises(ValueError, match="isn't one of .'default'"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="can't be deleted"):
        model.delete_adapter("default")
    model.add_adapter("other")
    with pytest.raises(ValueError, match="one adapter"):
        kd.truncate(model, 2)
    with pytest.raises(ValueError, match="one adapter"):
        kd.order_ranks(model)
    model.delete_adapter("default")
    assert model.adapter_names == ["other"]
    kd.truncate(model, 2)


def test_what_cannot_be_loaded(tmp_path):
    kd.save_adapter(enabled(rank=8, compiled=False), tmp_path / "large")
    kd.save_adapter(
        enabled(compiled=False, scaling="sqrt"), tmp_path / "scaled"
    )
    kd.save_adapter(enabled(compiled=False, seed=3), tmp_path / "base")
    kd.save_adapter(enabled(compiled=False), tmp_path / "good")
    model = randomize_adapters(enabled(compiled=False))
    before = outputs(model)
    for name, rule in (
        ("large", "at most the rank"),
        ("scaled", "the scaling"),
        ("base", "the base model"),
    ):
        with pytest.raises(ValueError, match=rule):
            kd.load_adapter(model, tmp_path / name, name=name)
    kd.load_adapter(model, tmp_path / "good", name="good")
    with pytest.raises(ValueError, match="must be free"):
        kd.load_adapter(model, tmp_path / "good", name="good")
    assert model.adapter_names == ["default", "good"]
    model.set_adapter("default")
    np.testing.assert_array_equal(outputs(model), before)


@pytest.mark.skipif(backend.NAME != "torch", reason="has inference tensors")
def test_changed_in_inference_mode():
    import torch

    model = mlp()
    model.compile("adam", "mse")
    x, y = mlp_data()
    with torch.inference_mode():
        model.add_adapter("other")
        model(x)
    for name in ("other", "default"):
        model.set_adapter(name)
        model.fit(x, y, verbose=0)
        with torch.inference_mode():
            model(x)

"""Files: .keras, .weights.h5, adapters; fresh processes, other backends."""

import json
import os
import pickle
import shutil

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import (
    classification_loss,
    gpt2,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

LOAD = """
import sys, keras, keras_dylora, numpy as np
model = keras.saving.load_model(sys.argv[1])
with np.load(sys.argv[2]) as data:
    inputs = {k: data[k] for k in data.files if not k.startswith("rank")}
    assert model.rank == 2, model.rank
    for rank in range(1, 5):
        model.set_rank(rank)
        found = model.predict(inputs, verbose=0)
        assert np.abs(found - data[f"rank{rank}"]).max() <= 1e-5
print(int(keras.ops.convert_to_numpy(model._ranks_drawn)))
print(int(keras.ops.convert_to_numpy(model.optimizer.iterations)))
labels = np.zeros(found.shape[:1] if found.ndim == 2 else found.shape[:2])
print(model.fit(inputs, labels, verbose=0).history["loss"][0])
print(model.jit_compile)
"""


def trained(make, frozen=False):
    model = randomize(make(), scale=0.1)
    kd.enable_dylora(model, rank=4, frozen=frozen, seed=7)
    randomize_adapters(model)
    model.compile(keras.optimizers.AdamW(1e-3), classification_loss())
    y = labels() if make is roberta_classifier else tokens()["token_ids"]
    model.fit(tokens(), y, batch_size=8, epochs=2, verbose=0)
    return model


def ranks_of(model, x):
    return {
        f"rank{rank}": _at(model, rank, x)
        for rank in range(1, model.dylora_config.rank + 1)
    }


def _at(model, rank, x):
    with model.rank_scope(rank):
        return model.predict(x, verbose=0)


# Each backend writes for itself and for the next one, and so reads both.
NEXT = backend.BACKENDS[(backend.BACKENDS.index(backend.NAME) + 1) % 3]


@pytest.mark.parametrize(
    ("make", "target"),
    [
        pytest.param(roberta_classifier, backend.NAME, marks=pytest.mark.long),
        (roberta_classifier, NEXT),
        pytest.param(gpt2, backend.NAME, marks=pytest.mark.long),
    ],
    ids=["roberta", f"roberta-to-{NEXT}", "gpt2"],
)
def test_keras_file_in_a_fresh_process(make, target, tmp_path):
    model = trained(make)
    x = tokens()
    np.savez(tmp_path / "data.npz", **x, **ranks_of(model, x))
    model.set_rank(2)
    model.save(tmp_path / "model.keras")
    printed = backend.run_python(
        LOAD,
        tmp_path / "model.keras",
        tmp_path / "data.npz",
        backend=target,
    ).split()
    assert printed[:2] == ["8", "8"]
    assert np.isfinite(float(printed[2]))
    # As Keras decides on the backend that loads, not on the one that saved.
    if target == "torch":
        assert printed[3] == "False"


@pytest.mark.parametrize("frozen", once([False, True]), ids=["all", "frozen"])
def test_loading_goes_on_where_saving_stopped(frozen, tmp_path):
    model = trained(roberta_classifier, frozen)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dylora_config == model.dylora_config
    for m in (model, again):
        m.fit(tokens(), labels(), batch_size=8, verbose=0, shuffle=False)
    for a, b in zip(
        backend.snapshot(model.trainable_variables),
        backend.snapshot(again.trainable_variables),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    kd.disable_dylora(again)
    assert all(w.trainable for w in again.weights)


@pytest.mark.once
def test_weights_file(tmp_path):
    model = trained(roberta_classifier, frozen=True)
    model.set_rank(3)
    model.save_weights(tmp_path / "model.weights.h5")
    again = roberta_classifier()
    kd.enable_dylora(again, rank=4, frozen=True, seed=7)
    again.load_weights(tmp_path / "model.weights.h5")
    assert again.rank == 3
    assert int(backend.to_numpy(again._ranks_drawn)) == 8
    for rank, expected in ranks_of(model, tokens()).items():
        found = _at(again, int(rank[4:]), tokens())
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_base_weights_into_an_enabled_model(tmp_path):
    base = roberta_classifier()
    base.save_weights(tmp_path / "base.weights.h5")
    model = kd.enable_dylora(roberta_classifier(), rank=4)
    with pytest.raises(ValueError, match="before you enable"):
        model.load_weights(tmp_path / "base.weights.h5")


@pytest.mark.parametrize(
    "frozen",
    [False, pytest.param(True, marks=pytest.mark.long)],
    ids=["all", "frozen"],
)
def test_backup_and_restore_resumes_to_the_same_weights(frozen, tmp_path):
    x, y = tokens(), labels()
    # On torch, Keras draws dropout from torch's global generator, which no
    # seed of a layer decides and no file holds.
    rate = 0.0 if backend.NAME == "torch" else 0.1

    def start():
        model = roberta_classifier(dropout=rate, num_layers=1)
        randomize(model, scale=0.1)
        kd.enable_dylora(model, rank=4, frozen=frozen, dropout=rate)
        randomize_adapters(model)
        for generator in _seed_generators(model):
            generator.state.assign([5, 0])
        optimizer = keras.optimizers.AdamW(1e-3, gradient_accumulation_steps=3)
        model.compile(optimizer, classification_loss())
        return model

    through = start()
    through.fit(x, y, batch_size=8, epochs=4, verbose=0)

    def stop(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    callbacks = [backup, keras.callbacks.LambdaCallback(on_epoch_end=stop)]
    with pytest.raises(KeyboardInterrupt):
        start().fit(
            x, y, batch_size=8, epochs=4, verbose=0, callbacks=callbacks
        )
    resumed = start()
    resumed.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[backup])
    for a, b in zip(
        backend.snapshot(through.trainable_variables),
        backend.snapshot(resumed.trainable_variables),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def _seed_generators(model):
    return [g for y in model._flatten_layers() for g in y._seed_generators]


@pytest.mark.filterwarnings("error:Skipping variable loading")
@pytest.mark.parametrize("fitted", [False, True], ids=["never", "fitted"])
def test_the_optimizer_comes_back_as_it_was(fitted, tmp_path):
    model = kd.enable_dylora(roberta_classifier(num_layers=1), rank=2)
    model.compile(keras.optimizers.AdamW(1e-3), classification_loss())
    if fitted:
        model.fit(tokens(), labels(), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer.built == fitted
    for a, b in zip(
        backend.snapshot(model.optimizer.variables),
        backend.snapshot(again.optimizer.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_layers_that_are_trained_come_back_trainable(tmp_path):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(6, name="query")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kd.enable_dylora(model, rank=2, trainable_layers=["norm", "head"])
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(3, 2, (32, 6)).astype("float32")
    for each in (model, loaded):
        each.fit(x, np.zeros((32, 2), "float32"), verbose=0)
    for a, b in zip(
        backend.snapshot(model.weights),
        backend.snapshot(loaded.weights),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.once
def test_pickle():
    model, x = trained(roberta_classifier), tokens()
    again = pickle.loads(pickle.dumps(model))
    for rank in (1, 4):
        np.testing.assert_array_equal(_at(again, rank, x), _at(model, rank, x))


@pytest.mark.once
def test_a_newer_format(tmp_path):
    config = trained(roberta_classifier).get_config()
    with pytest.raises(ValueError, match="newer.*format_version=99"):
        kd.DyLoRAModel.from_config({**config, "format_version": 99})


def test_functional_model_saves_and_loads(tmp_path):
    model = randomize_adapters(mlp(frozen=True, seed=2))
    model.compile("adam", "mse")
    model.fit(*mlp_data(), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dylora_config == model.dylora_config
    x, _ = mlp_data()
    for rank, expected in ranks_of(model, x).items():
        found = _at(again, int(rank[4:]), x)
        np.testing.assert_allclose(found, expected, atol=1e-6)


# Adapter files


@pytest.fixture(scope="module")
def shared_model():
    return trained(roberta_classifier)


@pytest.mark.parametrize("rank", range(1, 5))
@pytest.mark.once
def test_adapter_round_trip_at_every_rank(rank, shared_model, tmp_path):
    model = shared_model
    kd.save_adapter(model, tmp_path / "adapter", rank=rank)
    other = kd.load_adapter(
        randomize(roberta_classifier(), scale=0.1), tmp_path / "adapter"
    )
    assert other.dylora_config.rank == rank
    expected = ranks_of(model, tokens())
    for b in range(1, rank + 1):
        found = _at(other, b, tokens())
        np.testing.assert_allclose(found, expected[f"rank{b}"], atol=1e-6)
    again = randomize(roberta_classifier(), scale=0.1)
    kd.enable_dylora(again, rank=rank)
    kd.load_adapter(again, tmp_path / "adapter")


def test_adapter_files_get_smaller(tmp_path):
    from safetensors import numpy as safetensors

    model = kd.enable_dylora(roberta_classifier(), rank=4)
    for rank in (1, 4):
        kd.save_adapter(model, tmp_path / str(rank), rank=rank)
        tensors = safetensors.load_file(
            tmp_path / str(rank) / "adapter.safetensors"
        )
        adapters = [v for k, v in tensors.items() if k.startswith("adapter/")]
        assert sum(v.size for v in adapters) == 2 * 2 * 2 * 16 * rank
        assert {k for k in tensors if k.startswith("head/")} == {
            "head/pooled_dense/kernel",
            "head/pooled_dense/bias",
            "head/logits/kernel",
            "head/logits/bias",
        }


def damage_truncate(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_json(folder):
    (folder / "adapter_config.json").write_text("{")


def damage_encoding(folder):
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")


def damage_version(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "format_version": 99}))


def damage_missing(folder):
    (folder / "adapter.safetensors").unlink()


DAMAGES = {
    "truncated": (damage_truncate, "SHA-256"),
    "json": (damage_json, "adapter_config.json"),
    "encoding": (damage_encoding, "adapter_config.json must be a JSON file"),
    "newer": (damage_version, "format_version=99"),
    "missing-file": (damage_missing, "adapter.safetensors"),
    "missing-folder": (shutil.rmtree, "adapter_config.json"),
}


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "enabled"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.once
def test_damaged_adapters_change_nothing(damage, enabled, tmp_path):
    folder = tmp_path / "adapter"
    kd.save_adapter(kd.enable_dylora(roberta_classifier(), rank=2), folder)
    act, message = DAMAGES[damage]
    act(folder)
    refuses(folder, enabled, 2, message)


def refuses(folder, enabled, rank, message, make=roberta_classifier):
    model = make()
    if enabled:
        kd.enable_dylora(model, rank=rank)
    cls, before = type(model), backend.snapshot(model.weights)
    with pytest.raises(ValueError, match=message):
        kd.load_adapter(model, folder)
    assert type(model) is cls
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "enabled"])
def test_adapter_of_another_model(enabled, tmp_path):
    folder = tmp_path / "adapter"
    kd.save_adapter(kd.enable_dylora(gpt2(), rank=2), folder)
    refuses(folder, enabled, 2, "extra: adapter/transformer_layer_0")


def test_adapter_of_other_shapes(tmp_path):
    folder = tmp_path / "adapter"
    wider = roberta_classifier(hidden_dim=32)
    kd.save_adapter(kd.enable_dylora(wider, rank=2), folder)
    refuses(folder, False, 2, "mis-shaped: .*must be")


def test_adapter_of_another_rank(tmp_path):
    folder = tmp_path / "adapter"
    kd.save_adapter(kd.enable_dylora(roberta_classifier(), rank=2), folder)
    refuses(folder, True, 3, "rank 2 for a model of rank 3")


def test_adapter_of_another_alpha(tmp_path):
    folder = tmp_path / "adapter"
    model = kd.enable_dylora(roberta_classifier(), rank=2, alpha=4)
    kd.save_adapter(model, folder)
    refuses(folder, True, 2, r"alpha=4(\.0)? for a model of alpha=16")


def test_save_adapter_leaves_other_directories_alone(tmp_path):
    model = kd.enable_dylora(roberta_classifier(), rank=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="keras_dylora"):
        kd.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    kd.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="overwrite=True"):
        kd.save_adapter(model, tmp_path / "adapter", overwrite=False)
    kd.save_adapter(model, tmp_path / "adapter", rank=1)
    with pytest.raises(ValueError, match="Received: rank=3"):
        kd.save_adapter(model, tmp_path / "adapter", rank=3)
    (tmp_path / "adapter" / "report.json").write_text("mine")
    with pytest.raises(ValueError, match="which holds 'report.json'"):
        kd.save_adapter(model, tmp_path / "adapter")
    config = json.loads(
        (tmp_path / "adapter" / "adapter_config.json").read_text()
    )
    assert config["config"]["rank"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter",
        "notes.txt",
    ]


@pytest.mark.parametrize("reloaded", [False, True])
def test_adapter_holds_a_head_that_is_frozen_by_now(reloaded, tmp_path):
    model = kd.enable_dylora(randomize(roberta_classifier()), rank=2)
    if reloaded:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    model.get_layer("logits").trainable = False
    kd.save_adapter(model, tmp_path / "adapter")
    other = kd.load_adapter(
        randomize(roberta_classifier()), tmp_path / "adapter"
    )
    np.testing.assert_array_equal(
        backend.to_numpy(other.get_layer("logits").kernel),
        backend.to_numpy(model.get_layer("logits").kernel),
    )


def test_save_adapter_needs_an_enabled_model(tmp_path):
    with pytest.raises(ValueError, match="enable_dylora"):
        kd.save_adapter(roberta_classifier(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_weights_across_dropout_and_mode(tmp_path):
    """Keras loads across dropout rates; the rank sequence goes on too."""

    def enabled(**kwargs):
        return kd.enable_dylora(roberta_classifier(), rank=4, **kwargs)

    saved = randomize_adapters(enabled(dropout=0.1))
    saved.compile("adam", classification_loss())
    saved.fit(tokens(), labels(), verbose=0)
    saved.save_weights(tmp_path / "w.weights.h5")
    for other in (enabled(), enabled(frozen=True, dropout=0.1)):
        other.load_weights(tmp_path / "w.weights.h5")
        np.testing.assert_allclose(
            other.predict(tokens(), verbose=0),
            saved.predict(tokens(), verbose=0),
            atol=1e-6,
        )
        drawn = (int(backend.to_numpy(m._ranks_drawn)) for m in (saved, other))
        assert len(set(drawn)) == 1


@pytest.mark.long
@pytest.mark.parametrize("frozen_by_now", [False, True])
def test_adapter_holds_moving_statistics(frozen_by_now, tmp_path):
    def normalized():
        inputs = keras.Input((10,), name="x")
        x = keras.layers.Dense(8, name="query")(inputs)
        x = keras.layers.BatchNormalization(name="norm")(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))

    model = randomize(normalized())
    model.get_layer("norm").moving_variance.assign(np.full(8, 2.0))
    base = backend.snapshot(model.weights)
    kd.enable_dylora(
        model,
        rank=2,
        target_layers="query",
        trainable_layers=["norm", "head"],
    )
    model.compile("adam", "mse")
    x, y = mlp_data()
    model.fit(x, y, epochs=3, verbose=0)
    model.get_layer("norm").trainable = not frozen_by_now
    kd.save_adapter(model, tmp_path / "adapter")
    for enabled in (False, True):
        fresh = normalized()
        for weight, value in zip(fresh.weights, base, strict=True):
            weight.assign(value)
        if enabled:
            kd.enable_dylora(fresh, model.dylora_config)
        kd.load_adapter(fresh, tmp_path / "adapter")
        np.testing.assert_allclose(
            fresh.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
        )


def test_save_adapter_leaves_an_adapter_of_peft_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"theirs")
    with pytest.raises(
        ValueError, match="keras_dylora wrote.*holds 'adapter_c"
    ):
        kd.save_adapter(kd.enable_dylora(gpt2(), rank=2), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"theirs"


def test_an_interrupted_replacement_keeps_the_old(tmp_path, monkeypatch):
    model = kd.enable_dylora(gpt2(), rank=2)
    kd.save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    randomize_adapters(model)
    replace = os.replace

    def interrupted(source, target):
        if os.path.basename(source) == "new":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kd.save_adapter(model, tmp_path / "adapter")
    after = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_cutting_below_the_lowest_trained_rank_is_warned_of(tmp_path):
    model = kd.enable_dylora(gpt2(), rank=4, min_rank=3)
    kd.save_adapter(model, tmp_path / "a", rank=3)
    with pytest.warns(UserWarning, match="rank=2 of .* from rank 3 on"):
        kd.save_adapter(model, tmp_path / "b", rank=2)
    with pytest.warns(UserWarning, match="rank=1 of .* from rank 3 on"):
        kd.truncate(model, 1)


@pytest.mark.skipif(
    backend.NAME != "tensorflow", reason="TensorFlow's own formats"
)
def test_formats_of_tensorflow(tmp_path):
    import tensorflow as tf

    model = randomize_adapters(mlp(frozen=True))
    model.compile("sgd", "mse")
    x, y = mlp_data()
    model.fit(x, y, verbose=0)
    tf.saved_model.save(model, str(tmp_path / "saved_model"))
    serve = tf.saved_model.load(str(tmp_path / "saved_model")).signatures
    (found,) = serve["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-6)
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    other = mlp(frozen=True)
    tf.train.Checkpoint(other).read(path)
    assert int(other._ranks_drawn) == 2

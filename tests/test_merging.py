"""merge and truncate."""

import keras
import keras_hub
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
from tests.text import TEXTS, text_classifier

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def enabled(make):
    model = randomize(make(), scale=0.1)
    kd.enable_dylora(model, rank=4)
    return randomize_adapters(model, scale=0.05)


@pytest.mark.parametrize("dtype", once(TOLERANCE, but=["float32"]))
@pytest.mark.parametrize("rank", once(range(5), but=[2]))
@pytest.mark.parametrize(
    "make",
    once([roberta_classifier, gpt2], but=[roberta_classifier]),
    ids=["roberta", "gpt2"],
)
def test_merged_equals_adapted(make, rank, dtype):
    keras.config.set_dtype_policy(dtype)
    model = enabled(make)
    cls = type(model).original_class
    before = backend.snapshot(model.weights)
    merged = kd.merge(model, rank=rank)
    assert type(merged) is cls
    assert not any(
        type(layer).__module__.startswith("keras_dylora")
        for layer in merged._flatten_layers()
    )
    with model.rank_scope(rank):
        expected = model.predict(tokens(), verbose=0)
    found = merged.predict(tokens(), verbose=0)
    np.testing.assert_allclose(
        np.asarray(found, "float32"),
        np.asarray(expected, "float32"),
        atol=TOLERANCE[dtype],
    )
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_merging_leaves_the_model_enabled_and_trainable():
    model = enabled(roberta_classifier)
    model.compile("adam", classification_loss(), metrics=["accuracy"])
    merged = kd.merge(model)
    merged.fit(tokens(), labels(), verbose=0)
    model.fit(tokens(), labels(), verbose=0)
    assert isinstance(model, kd.DyLoRAModel)
    names = merged.evaluate(tokens(), labels(), verbose=0, return_dict=True)
    assert len(names) == 2


@pytest.mark.parametrize(
    "used",
    [False, pytest.param(True, marks=pytest.mark.long)],
    ids=["fresh", "used"],
)
@pytest.mark.once
def test_merges_a_task_that_takes_text(used, tmp_path):
    model = text_classifier()
    kd.enable_dylora(model, rank=4)
    randomize_adapters(model)
    if used:
        model.compile("adam", classification_loss())
        model.fit(TEXTS, np.array([0, 1, 0, 1]), verbose=0)
    merged = kd.merge(model, rank=2)
    assert merged.preprocessor is model.preprocessor
    with model.rank_scope(2):
        expected = model.predict(TEXTS, verbose=0)
    found = merged.predict(TEXTS, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="merge.*Received: save_to_preset"):
        model.save_to_preset(tmp_path)
    merged.save_to_preset(tmp_path)
    again = type(merged).from_preset(str(tmp_path))
    np.testing.assert_allclose(
        again.predict(TEXTS, verbose=0), found, atol=1e-6
    )


def test_merges_what_only_its_maker_may_revive():
    inputs = keras.Input((10,))
    x = keras.layers.Dense(6, name="query")(inputs)
    model = keras.Model(inputs, keras.layers.Lambda(lambda x: 2 * x)(x))
    kd.enable_dylora(randomize(model), rank=2)
    randomize_adapters(model)
    model.compile(optimizer=None, loss="mse", metrics=["mae"])
    x, _ = mlp_data()
    merged = kd.merge(model)
    np.testing.assert_allclose(
        merged.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )
    assert merged.optimizer is None
    assert len(merged.evaluate(x, x[:, :6], verbose=0)) == 2


@keras.saving.register_keras_serializable("test")
class Autoencoder(keras.Model):
    """Its decoder is the transposed kernel of its encoder."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = keras.layers.Dense(6, name="encoder")
        self.output_layer = keras.layers.Dense(3, name="output")

    def build(self, input_shape):
        self.encoder.build(input_shape)
        self.output_layer.build(input_shape)
        self.built = True

    def call(self, x):
        x = self.encoder(x)
        x = keras.ops.matmul(x, keras.ops.transpose(self.encoder.kernel))
        return self.output_layer(x)


def autoencoder(target):
    model = Autoencoder()
    model.build((None, 10))
    kd.enable_dylora(
        randomize(model), rank=2, verbose=0,
        target_layers=target, trainable_layers=(),
    )  # fmt: skip
    return randomize_adapters(model)


def test_a_kernel_that_another_layer_reads_cannot_be_merged():
    model = autoencoder("encoder")
    before = backend.snapshot(model.variables)
    with pytest.raises(RuntimeError, match="tied weights.*a difference of"):
        kd.merge(model)
    for a, b in zip(before, backend.snapshot(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    x, _ = mlp_data()
    model = autoencoder("output")
    np.testing.assert_allclose(
        kd.merge(model).predict(x, verbose=0),
        model.predict(x, verbose=0),
        atol=1e-5,
    )


@keras.saving.register_keras_serializable("test")
class Noise(keras.layers.Layer):
    """Random in inference too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


def test_merging_draws_no_random_number_and_takes_a_random_model():
    inputs = keras.Input((10,))
    x = keras.layers.Dense(6, name="query")(inputs)
    model = keras.Model(inputs, Noise()(x))
    kd.enable_dylora(randomize(model), rank=2, verbose=0)
    randomize_adapters(model)
    before = backend.snapshot(model.variables)
    kd.merge(model)
    for a, b in zip(before, backend.snapshot(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)


class Constant(keras.optimizers.schedules.LearningRateSchedule):
    """A constant rate as a user may write it: without `get_config`."""

    def __call__(self, step):
        return keras.ops.cast(1e-5, "float32")


@pytest.mark.long
def test_what_is_not_registered_stays_compiled():
    def loss(y, outputs):
        return keras.losses.sparse_categorical_crossentropy(
            y, outputs, from_logits=True
        )

    model = enabled(roberta_classifier)
    metric = keras.metrics.SparseCategoricalAccuracy()
    model.compile(keras.optimizers.Adam(Constant()), loss, metrics=[metric])
    model.fit(tokens(), labels(), verbose=0)
    merged = kd.merge(model)
    kd.truncate(model, 2)
    for each in (merged, model, kd.disable_dylora(model)):
        before = backend.snapshot(each.trainable_weights)
        each.fit(tokens(), labels(), verbose=0)
        for a, b in zip(
            before, backend.snapshot(each.trainable_weights), strict=True
        ):
            np.testing.assert_array_less(np.abs(a - b), 5e-5)
    metric.reset_state()
    merged.evaluate(tokens(), labels(), verbose=0)
    assert float(metric.result()) == 0


@pytest.mark.once
def test_a_fresh_optimizer_excludes_from_weight_decay_what_the_old_one_did():
    model = enabled(roberta_classifier)
    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=100.0)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, classification_loss())
    model.fit(tokens(), labels(), verbose=0)
    kd.truncate(model, 2)
    bias = model.get_layer("logits").bias
    bias.assign([1.0, 1.0])
    model.fit(tokens(), labels(), verbose=0)
    np.testing.assert_allclose(backend.to_numpy(bias), 1, atol=1e-3)


def test_merging_keeps_the_sampler():
    model = enabled(gpt2)
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=3, seed=1))
    sampler = kd.merge(model).sampler
    assert type(sampler) is keras_hub.samplers.TopKSampler
    assert sampler.k == 3 and sampler is not model.sampler


@pytest.mark.long
def test_merged_functional_model_needs_no_library(tmp_path):
    model = randomize_adapters(mlp())
    x, _ = mlp_data()
    merged = kd.merge(model, rank=3)
    merged.save(tmp_path / "plain.keras")
    np.savez(tmp_path / "x.npz", x=x)
    with model.rank_scope(3):
        expected = model.predict(x, verbose=0)
    backend.run_python(
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "found = model.predict(np.load(sys.argv[2])['x'], verbose=0)\n"
        "np.save(sys.argv[3], found)\n"
        "assert 'keras_dylora' not in sys.modules",
        tmp_path / "plain.keras",
        tmp_path / "x.npz",
        tmp_path / "found.npy",
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), expected, atol=1e-5
    )


def test_merges_models_within_a_model():
    inputs = keras.Input((10,))
    inner = mlp()
    inner.compile("adam", "mse")
    outputs = kd.DyLoRADense(2, rank=4, alpha=8)(inner(inputs))
    model = randomize(kd.DyLoRAModel(inputs, outputs))
    x, _ = mlp_data()
    merged = kd.merge(model, rank=2)
    assert not any(
        type(layer).__module__.startswith("keras_dylora")
        for layer in merged._flatten_layers()
    )
    assert isinstance(inner, kd.DyLoRAModel) and inner.compiled
    with model.rank_scope(2):
        expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(
        merged.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "rank", "error", "message"),
    [
        (lambda: enabled(roberta_classifier), 5, ValueError, "rank=5"),
        (lambda: enabled(roberta_classifier), 1.0, TypeError, "integer"),
        (roberta_classifier, 1, ValueError, "enable_dylora"),
    ],
    ids=["above", "float", "plain"],
)
def test_bad_merges(model, rank, error, message):
    with pytest.raises(error, match=message):
        kd.merge(model(), rank=rank)


@pytest.mark.parametrize(
    "frozen",
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=["all", "frozen"],
)
@pytest.mark.parametrize("kind", ["enabled", "by-hand"])
@pytest.mark.once
def test_truncate_keeps_the_ranks_that_are_left(kind, frozen):
    if kind == "enabled":
        model = randomize(roberta_classifier())
        kd.enable_dylora(model, rank=4, frozen=frozen)
        x, y, loss = tokens(), labels(), classification_loss()
    else:
        model = mlp(frozen=frozen)
        (x, y), loss = mlp_data(), "mse"
    randomize_adapters(model)
    model.compile("adam", loss)
    model.fit(x, y, verbose=0)
    drawn = int(backend.to_numpy(model._ranks_drawn))
    expected = {}
    for rank in (1, 2):
        model.set_rank(rank)
        expected[rank] = model.predict(x, verbose=0)
    assert kd.truncate(model, 2) is model
    assert model.dylora_config.rank == 2
    assert {layer.down.shape[1] for layer in model.dylora_layers} == {2}
    for rank, outputs in expected.items():
        model.set_rank(rank)
        np.testing.assert_allclose(
            model.predict(x, verbose=0), outputs, rtol=1e-5, atol=1e-6
        )
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert max(history.history["rank"]) <= 2
    assert int(backend.to_numpy(model._ranks_drawn)) > drawn


def test_truncate_out_of_range():
    model = enabled(roberta_classifier)
    with pytest.raises(ValueError, match="Received: rank=0"):
        kd.truncate(model, 0)
    assert model.dylora_config.rank == 4

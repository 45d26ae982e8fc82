"""Quantized bases: int8 and int4 kernels under float32 adapters."""

import gc
import weakref

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)
from tests.text import TEXTS, text_classifier

MODES = ["int8", "int4"]


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Keras collects garbage for every layer that it quantizes."""
    gc.freeze()
    yield
    gc.unfreeze()


def quantized(mode, order="after", **kwargs):
    """A classifier with quantized linear layers, not yet compiled."""
    model = randomize(roberta_classifier(num_layers=1), scale=0.1)
    if order == "before":
        model.backbone.quantize(mode)
    kd.enable_dylora(model, rank=4, target_layers="all-linear", **kwargs)
    if order == "after":
        model.quantize(mode)
    return randomize_adapters(model)


def dense():
    """A model of one layer to adapt and a head to train in full."""
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(128, "tanh", name="first")(inputs)
    outputs = keras.layers.Dense(3, name="head")(hidden)
    return randomize(keras.Model(inputs, outputs), scale=0.1)


def dense_data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 64)), rng.normal(size=(16, 3))


def enable(model):
    kd.enable_dylora(
        model, rank=4, target_layers="first", trainable_layers="head"
    )
    return randomize_adapters(model)


def compiled(model):
    model.compile(
        keras.optimizers.AdamW(0.01),
        classification_loss(),
        metrics=["accuracy"],
    )
    return model


def fit(model, epochs=1):
    x, y = tokens(), labels()
    history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0)
    return history.history["loss"]


def predict(model):
    return model.predict(tokens(), verbose=0)


def base_bytes(model):
    return sum(
        backend.to_numpy(weight).nbytes
        for layer in model.dylora_layers
        for weight in layer.base_weights
    )


@pytest.mark.parametrize("mode", MODES)
def test_before_and_after_enabling_are_the_same(mode):
    before, after = (dense() for _ in range(2))
    before.quantize(mode, filters="first")
    for model in (before, after):
        enable(model)
    after.quantize(mode)
    first, second = (m.get_layer("first") for m in (before, after))
    assert first.quantization_mode == second.quantization_mode == mode
    for a, b in zip(
        backend.snapshot(first.weights),
        backend.snapshot(second.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    x, _ = dense_data()
    quantized, again, exact = (
        m.predict(x, verbose=0) for m in (before, after, enable(dense()))
    )
    np.testing.assert_array_equal(quantized, again)
    np.testing.assert_allclose(quantized, exact, atol=0.2)
    assert (quantized != exact).any()


@pytest.mark.parametrize(
    ("mode", "order"),
    [
        ("int8", "after"),
        pytest.param("int4", "before", marks=pytest.mark.long),
    ],
)
@pytest.mark.once
def test_trains_saves_reloads_and_merges(mode, order, tmp_path):
    model = compiled(quantized(mode, order))
    layers = model.dylora_layers
    assert {x.quantization_mode for x in layers} == {mode}
    assert {v.dtype for x in layers for v in (x.down, x.up)} == {"float32"}
    base = [backend.snapshot(x.base_weights) for x in layers]
    adapters = backend.snapshot([x.down for x in layers])
    first, _ = model.evaluate(tokens(), labels(), verbose=0)
    fit(model, epochs=15)
    last, _ = model.evaluate(tokens(), labels(), verbose=0)
    assert last < first
    for layer, before in zip(layers, base, strict=True):
        after = backend.snapshot(layer.base_weights)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
    after = backend.snapshot([x.down for x in layers])
    assert all((a != b).any() for a, b in zip(adapters, after, strict=True))

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert {x.quantization_mode for x in again.dylora_layers} == {mode}
    for rank in (1, 4):
        with model.rank_scope(rank), again.rank_scope(rank):
            np.testing.assert_allclose(
                predict(again), predict(model), atol=1e-6
            )
    fit(again)
    again.save(tmp_path / "again.keras")

    merged = kd.merge(model, rank=4)
    assert type(merged) is type(model).original_class
    # Keras also rounds the inputs of an int8 layer; the merged one doesn't.
    np.testing.assert_allclose(
        predict(merged), predict(model), atol=5e-3 if mode == "int8" else 1e-5
    )
    linear = [
        x
        for x in merged.backbone._flatten_layers()
        if isinstance(x, (keras.layers.Dense, keras.layers.EinsumDense))
    ]
    assert {x.quantization_mode for x in linear} == {None}
    assert {str(x.kernel.dtype) for x in linear} == {"float32"}
    merged.save(tmp_path / "merged.keras")
    plain = keras.saving.load_model(tmp_path / "merged.keras")
    np.testing.assert_allclose(predict(plain), predict(merged), atol=1e-6)


@pytest.mark.parametrize(("mode", "limit"), [("int8", 0.3), ("int4", 0.2)])
def test_memory_of_the_base(mode, limit):
    model = enable(dense())
    before = base_bytes(model)
    kernel = weakref.ref(model.get_layer("first").kernel)
    model.quantize(mode)
    gc.collect()
    assert kernel() is None, "something keeps the float kernel alive"
    assert base_bytes(model) <= limit * before


def test_quantizing_keeps_the_training_and_the_head():
    model = dense()
    model.compile("adam", "mse")
    enable(model)
    model.fit(*dense_data(), verbose=0)
    trained = [id(v) for v in model.trainable_variables]
    model.quantize("int8")
    assert [id(v) for v in model.trainable_variables] == trained
    assert model.get_layer("first").quantization_mode == "int8"
    assert model.get_layer("head").quantization_mode is None
    model.fit(*dense_data(), verbose=0)
    assert int(backend.to_numpy(model.optimizer.iterations)) == 2
    assert int(backend.to_numpy(model._ranks_drawn)) == 2


def test_filters_choose_the_layers():
    model = randomize(roberta_classifier(num_layers=1), scale=0.1)
    kd.enable_dylora(model, rank=4)
    model.quantize("int8", filters=["query", "key"])
    chosen = {x.name for x in model._flatten_layers() if x.quantization_mode}
    assert chosen == {"query", "key"}
    with pytest.raises(TypeError, match="filters=3"):
        model.quantize("int8", filters=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "float8"}, "mode='float8'"),
        ({"mode": "int7"}, "mode=int7"),
        ({"mode": "int8", "filters": lambda layer: 1 / 0}, "division"),
    ],
    ids=["float8", "unknown", "failing-filter"],
)
def test_a_refused_quantization_changes_nothing(arguments, message):
    model = randomize_adapters(mlp())
    x, y = mlp_data()
    expected = model.predict(x, verbose=0)
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        model.quantize(**arguments)
    assert {type(layer) for layer in model.dylora_layers} == {kd.DyLoRADense}
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.once
def test_a_model_built_from_adapted_layers(mode, tmp_path):
    model = randomize_adapters(randomize(mlp(frozen=True)))
    model.quantize(mode)
    model.compile("adam", "mse")
    x, y = mlp_data()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )


def test_disabling_gives_the_quantized_model_back():
    model = dense()
    expected = dense()
    expected.quantize("int4", filters="first")
    enable(model)
    model.quantize("int4")
    kd.disable_dylora(model)
    x, _ = dense_data()
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), expected.predict(x, verbose=0)
    )
    # The method of Keras is back.
    with pytest.raises(ValueError, match="already quantized"):
        model.quantize("int4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("equation", "output_shape", "shape"),
    [
        ("abc,cde->abde", (None, 3, 4), (5, 6)),
        ("abcd,cde->abe", (None, 6), (5, 3, 4)),
        ("abc,ced->abde", (None, 3, 4), (5, 6)),
        ("abc,dc->abd", (None, 8), (5, 6)),
    ],
    ids=["query", "output", "transposed-outputs", "transposed-kernel"],
)
@pytest.mark.once
def test_merging_dequantizes_any_equation(mode, equation, output_shape, shape):
    inputs = keras.Input(shape)
    layer = keras.layers.EinsumDense(equation, output_shape, name="only")
    model = randomize(keras.Model(inputs, layer(inputs)), scale=0.5)
    original = backend.to_numpy(layer.kernel)
    kd.enable_dylora(model, rank=2, target_layers="only")
    model.quantize(mode)
    kernel = backend.to_numpy(kd.merge(model, rank=0).get_layer("only").kernel)
    # Half a step of 127 or, asymmetric, of 15 in the range of the weights.
    step = abs(original).max() / (127 if mode == "int8" else 7)
    assert abs(kernel - original).max() <= 0.51 * step


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.once
def test_quantized_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    mode = "int8" if policy == "mixed_bfloat16" else "int4"
    model = randomize_adapters(randomize(mlp(), scale=0.2))
    model.quantize(mode)
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    losses = model.fit(*mlp_data(), epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    merged = kd.merge(model)
    assert merged.get_layer("first").dtype_policy.name == policy
    assert merged.get_layer("first").kernel.dtype == "float32"


@pytest.mark.skipif(
    backend.NAME != "tensorflow",
    reason="elsewhere, it exports what TensorFlow loads of the saved model",
)
@pytest.mark.long
def test_exports_with_a_quantized_base(tmp_path):
    model = quantized("int8")
    kd.export_ranks(model, tmp_path / "ranks", ranks=[2], layout="shared")
    assert (tmp_path / "ranks").is_dir()


@pytest.mark.long
def test_quantizes_a_task_that_takes_text(recwarn):
    model = text_classifier()
    kd.enable_dylora(model, rank=2)
    model.quantize("int8")
    assert not [w for w in recwarn if "quantize" in str(w.message)]
    assert {x.quantization_mode for x in model.dylora_layers} == {"int8"}
    compiled(model).fit(np.array(TEXTS), np.array([0, 1, 0, 1]), verbose=0)
    report = kd.evaluate_ranks(model, TEXTS, np.array([0, 1, 0, 1]), verbose=0)
    assert report.ranks == [1, 2]
    model.predict(TEXTS, verbose=0)


def test_a_loaded_head_stays_float(tmp_path):
    model = compiled(roberta_classifier(num_layers=1))
    kd.enable_dylora(model, rank=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.quantize("int8")
    head = loaded.get_layer("logits")
    assert head.trainable and head.quantization_mode is None


def test_a_quantized_head_takes_no_adapter(tmp_path):
    model = kd.enable_dylora(roberta_classifier(num_layers=1), rank=2)
    kd.save_adapter(model, tmp_path / "adapter")
    kd.to_peft(model, tmp_path / "peft")
    other = roberta_classifier(num_layers=1)
    other.quantize("int8")
    before = backend.snapshot(other.weights)
    for load, name in ((kd.load_adapter, "adapter"), (kd.from_peft, "peft")):
        with pytest.raises(ValueError, match="must be float.*Received: .*int8"):
            load(other, tmp_path / name)
    assert not isinstance(other, kd.DyLoRAModel)
    for a, b in zip(before, backend.snapshot(other.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_quantized_head_is_warned_of():
    model = dense()
    model.quantize("int8")
    with pytest.warns(UserWarning, match="Received: .*'head'"):
        enable(model)


def test_quantizing_twice_changes_nothing():
    model = quantized("int8", order="never")
    model.quantize("int8", filters="value")
    before = [layer.quantization_mode for layer in model.dylora_layers]
    with pytest.raises(ValueError, match="once. Received.*'value'"):
        model.quantize("int8")
    after = [layer.quantization_mode for layer in model.dylora_layers]
    assert before == after and None in after


def test_a_head_that_is_frozen_for_a_while_stays_float():
    model = kd.enable_dylora(roberta_classifier(num_layers=1), rank=2)
    head = [v.path for v in model.trainable_variables]
    model.trainable = False
    model.quantize("int8")
    model.trainable = True
    assert [v.path for v in model.trainable_variables] == head


def attention():
    inputs = keras.Input((4, 6))
    outputs = keras.layers.MultiHeadAttention(2, 3)(inputs, inputs)
    return keras.Model(inputs, outputs)


@keras.saving.register_keras_serializable(package="tests.quantized")
class OwnLayers(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4)

    def call(self, x):
        return self.first(x)


def own_layers():
    model = OwnLayers()
    model(np.ones((1, 4, 6), "float32"))
    return model


@pytest.mark.parametrize("build", [attention, own_layers])
@pytest.mark.once
def test_nothing_is_saved_that_keras_cannot_load(build, tmp_path):
    model = kd.enable_dylora(
        build(), rank=2, target_layers="all-linear", trainable_layers=()
    )
    model.quantize("int8")
    with pytest.raises(ValueError, match="makes its own layers"):
        model.save(tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())
    model.save_weights(tmp_path / "model.weights.h5")
    x = np.ones((1, 4, 6), "float32")
    expected = backend.to_numpy(model(x))
    for variable in model.trainable_variables:
        variable.assign(variable + 1)
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(backend.to_numpy(model(x)), expected)

"""The layers, against their formula in NumPy."""

import concurrent.futures

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import mlp_data

EQUATIONS = {
    # equation: (input shape, output shape, bias axes)
    "abc,cde->abde": ((2, 3, 6), (None, 2, 4), "de"),  # query, RoBERTa, GPT-2
    "abcd,cde->abe": ((2, 3, 2, 4), (None, 5), "e"),  # attention output
    "ab,bc->ac": ((2, 6), (5,), "c"),
    "...x,xy->...y": ((2, 3, 6), 5, "y"),
    "bqm,muh->bquh": ((2, 3, 6), (None, 2, 4), None),  # Llama query
    "bquh,uhm->bqm": ((2, 3, 2, 4), (None, 6), None),  # Llama output
    "btd,ndh->btnh": ((2, 3, 6), (None, 2, 4), None),  # Gemma query
    "bsd,kdh->bskh": ((2, 3, 6), (None, 2, 4), None),  # Gemma key, value
    "btnh,nhd->btd": ((2, 3, 2, 4), (None, 6), None),  # Gemma output
    "btd,df->btf": ((2, 3, 6), (None, 8), None),  # Gemma feed-forward
}


def randomize(layer, seed=0):
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    return layer


def delta(layer, rank):
    """(alpha / b) down[:, :b] up[:b] as a matrix in float64."""
    down = backend.to_numpy(layer.down).astype("float64")
    up = backend.to_numpy(layer.up).astype("float64")
    return layer.alpha / max(rank, 1) * down[:, :rank] @ up[:rank]


@pytest.mark.parametrize("rank", range(5))
def test_dense_formula(rank):
    layer = kd.DyLoRADense(5, "tanh", rank=4, alpha=6)
    layer.build((None, 7))
    randomize(layer)
    layer.set_rank(rank)
    x = np.random.default_rng(1).normal(size=(3, 2, 7)).astype("float32")
    kernel, bias = map(backend.to_numpy, (layer.kernel, layer.bias))
    expected = np.tanh(x @ (kernel + delta(layer, rank)) + bias)
    np.testing.assert_allclose(
        backend.to_numpy(layer(x)), expected, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_formula(equation, rank):
    shape, output_shape, bias_axes = EQUATIONS[equation]
    layer = kd.DyLoRAEinsumDense(
        equation, output_shape, bias_axes=bias_axes, rank=3, alpha=6
    )
    layer.build(shape)
    randomize(layer)
    layer.set_rank(rank)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    base = np.einsum(equation, x, backend.to_numpy(layer.kernel))
    if bias_axes:
        base = base + backend.to_numpy(layer.bias)
    # Flatten what is summed over, multiply matrices, unflatten what is new.
    inputs = layer.down.shape[0]
    flat = x.reshape(*x.shape[: x.ndim - _trailing(shape, inputs)], inputs)
    update = (flat @ delta(layer, rank)).reshape(base.shape)
    np.testing.assert_allclose(
        backend.to_numpy(layer(x)), base + update, rtol=3e-5, atol=3e-5
    )
    assert_merged_alike(layer, x)


def assert_merged_alike(layer, x):
    merged = backend.to_numpy(layer.kernel) + layer.delta_kernel(
        layer.active_rank
    )
    expected = np.einsum(layer.equation, x, merged)
    if layer.bias is not None:
        expected = expected + backend.to_numpy(layer.bias)
    np.testing.assert_allclose(
        backend.to_numpy(layer(x)), expected, rtol=3e-5, atol=3e-5
    )


@pytest.mark.parametrize(
    ("equation", "output_shape"),
    [("abc,cd->adb", (5, 3)), ("ab...,bd->ad...", (5, 6))],
)
def test_einsum_with_axes_in_another_order(equation, output_shape):
    layer = kd.DyLoRAEinsumDense(equation, output_shape, rank=2)
    layer.build((2, 3, 6))
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype("float32")
    assert_merged_alike(randomize(layer), x)


@pytest.mark.parametrize(
    "mode", once([None, "int8", "int4"], but=[None]), ids=str
)
@pytest.mark.parametrize("equation", [None, "abc,cd->adb"], ids=str)
def test_threads_share_a_layer(equation, mode):
    """On each backend, where it isn't a product of matrices for torch too."""
    options = {"activation": "relu", "rank": 2}
    if equation:
        layer = kd.DyLoRAEinsumDense(equation, (16, 8), **options)
    else:
        layer = kd.DyLoRADense(16, **options)
    layer.build((4, 8, 256))
    randomize(layer)
    inputs = keras.Input((8, 256))
    model = kd.DyLoRAModel(inputs, layer(inputs))
    if mode:
        model.quantize(mode)
    x = np.random.default_rng(1).normal(size=(4, 8, 256)).astype("float32")
    expected = backend.to_numpy(layer(x))
    assert (expected == 0).any()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        outputs = threads.map(lambda _: backend.to_numpy(layer(x)), range(80))
        for output in outputs:
            np.testing.assert_array_equal(output, expected)


@pytest.mark.skipif(backend.NAME != "torch", reason="has inference tensors")
@pytest.mark.parametrize("context", ["inference_mode", "no_grad"])
def test_trains_after_a_call_without_gradients(context):
    import torch

    layer = kd.DyLoRADense(3, rank=2, min_rank=2)
    model = keras.Sequential([keras.Input((10,)), layer])
    model.compile("sgd", "mse")
    x, y = mlp_data(8)
    model.fit(x, y, verbose=0)
    with getattr(torch, context)():
        layer.set_rank(1)
        layer.set_rank(2)
        model(x)
    before = backend.to_numpy(layer.up)
    model.fit(x, y, verbose=0)
    assert (backend.to_numpy(layer.up) != before).all()


@pytest.mark.skipif(backend.NAME != "torch", reason="has inference tensors")
def test_what_is_made_in_inference_mode_computes():
    import torch

    with torch.inference_mode():
        layer = kd.DyLoRADense(3, rank=2, alpha=6)
        layer.build((None, 10))
        randomize(layer)
        x, _ = mlp_data(8)
        kernel = backend.to_numpy(layer.kernel) + delta(layer, 2)
        expected = x @ kernel + backend.to_numpy(layer.bias)
        np.testing.assert_allclose(
            backend.to_numpy(layer(x)), expected, rtol=2e-5, atol=2e-5
        )


def _trailing(shape, size):
    """The number of trailing axes of a shape that multiply to `size`."""
    count, product = 0, 1
    while product < size:
        count += 1
        product *= shape[-count]
    return count


def test_rank_means_the_rank_of_a_matrix():
    layer = kd.DyLoRAEinsumDense("abc,cde->abde", (None, 12, 64), rank=1)
    layer.build((None, None, 768))
    assert tuple(layer.down.shape) == (768, 1)
    assert tuple(layer.up.shape) == (1, 768)


def test_weights_are_the_four_and_the_base_is_frozen():
    layer = kd.DyLoRADense(5, rank=2)
    layer.build((None, 7))
    assert [w.name for w in layer.weights] == ["kernel", "bias", "down", "up"]
    assert [w.name for w in layer.trainable_weights] == ["down", "up"]
    layer.trainable = False
    assert layer.trainable_weights == []
    layer.trainable = True
    assert [w.name for w in layer.trainable_weights] == ["down", "up"]


def test_initial_values_are_the_authors():
    layer = kd.DyLoRADense(50, rank=40)
    layer.build((None, 400))
    down = backend.to_numpy(layer.down)
    assert np.abs(down).max() <= 1 / 20
    np.testing.assert_allclose(down.std(), 1 / 20 / np.sqrt(3), rtol=0.02)
    assert not backend.to_numpy(layer.up).any()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: kd.DyLoRADense(
            5, "relu", rank=3, min_rank=2, alpha=4, frozen=True, dropout=0.1
        ),
        lambda: kd.DyLoRAEinsumDense("ab,bc->ac", 5, bias_axes="c", rank=3),
    ],
    ids=["dense", "einsum"],
)
def test_config_round_trip(layer):
    layer = layer()
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


def test_mixed_precision_keeps_float32_adapters():
    layer = kd.DyLoRADense(5, rank=2, dtype="mixed_bfloat16")
    layer.build((None, 7))
    assert (layer.down.dtype, layer.up.dtype) == ("float32", "float32")
    assert keras.backend.standardize_dtype(layer(np.ones((2, 7))).dtype) == (
        "bfloat16"
    )


def test_bfloat16_base_keeps_its_dtype():
    layer = kd.DyLoRADense(5, rank=2, dtype="bfloat16")
    layer.build((None, 7))
    assert (layer.kernel.dtype, layer.down.dtype) == ("bfloat16", "float32")


def test_dropout_is_for_training_only():
    layer = kd.DyLoRADense(4, rank=2, dropout=0.5)
    layer.build((None, 50))
    randomize(layer)
    x = np.ones((2, 50), "float32")
    calm = backend.to_numpy(layer(x))
    np.testing.assert_array_equal(calm, backend.to_numpy(layer(x)))
    first = backend.to_numpy(layer(x, training=True))
    second = backend.to_numpy(layer(x, training=True))
    assert np.abs(first - calm).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_trains_at_the_full_rank_in_a_plain_model():
    inputs = keras.Input((10,))
    layer = kd.DyLoRADense(3, rank=4)
    model = keras.Model(inputs, layer(inputs))
    kernel = backend.to_numpy(layer.kernel)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(*mlp_data(), epochs=2, verbose=0)
    assert np.abs(backend.to_numpy(layer.up)).max(axis=1).min() > 0
    np.testing.assert_array_equal(kernel, backend.to_numpy(layer.kernel))


def test_plain_model_saves_and_loads(tmp_path):
    inputs = keras.Input((10,))
    layer = kd.DyLoRADense(3, rank=4)
    model = keras.Model(inputs, layer(inputs))
    randomize(layer)
    layer.set_rank(2)
    x, _ = mlp_data()
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[-1].active_rank == 2
    np.testing.assert_allclose(expected, again.predict(x, verbose=0), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kd.DyLoRADense(4, rank=0), ValueError, "rank=0"),
        (lambda: kd.DyLoRADense(4, rank=2.5), TypeError, "integer"),
        (lambda: kd.DyLoRADense(4, rank=2, min_rank=3), ValueError, "min_rank"),
        (lambda: kd.DyLoRADense(4, dropout=1), ValueError, "dropout"),
        (lambda: kd.DyLoRADense(4, alpha=float("nan")), ValueError, "alpha"),
        (lambda: kd.DyLoRADense(4, lora_rank=2), ValueError, "lora_rank"),
        (lambda: kd.DyLoRADense(4).set_rank(1), ValueError, "built"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("rank", "error"),
    [(-1, ValueError), (5, ValueError), (1.0, TypeError), (True, TypeError)],
)
def test_bad_ranks_change_nothing(rank, error):
    layer = kd.DyLoRADense(4, rank=4)
    layer.build((None, 3))
    layer.set_rank(2)
    with pytest.raises(error, match="Received: rank="):
        layer.set_rank(rank)
    assert layer.active_rank == 2


@pytest.mark.parametrize(
    ("equation", "shape", "output_shape"),
    [("abc,acd->abd", (2, 3, 4), (3, 5)), ("ab,b->ab", (2, 3), (3,))],
    ids=["batched-kernel", "elementwise"],
)
def test_unsupported_equation(equation, shape, output_shape):
    layer = kd.DyLoRAEinsumDense(equation, output_shape)
    with pytest.raises(ValueError, match="Received: equation="):
        layer.build(shape)

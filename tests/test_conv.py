"""Convolutions: their formula, and every door of a model that adapts one."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.doors import assert_doors_agree
from tests.marks import once
from tests.models import allocation, randomize, randomize_adapters

LAYERS = {1: kd.DyLoRAConv1D, 2: kd.DyLoRAConv2D, 3: kd.DyLoRAConv3D}
CASES = {
    "plain": {},
    "same": {"padding": "same"},
    "strides": {"strides": 2},
    "strides-same": {"strides": 2, "padding": "same"},
    "dilation": {"dilation_rate": 2},
    "groups": {"groups": 2},
    "groups-same": {"groups": 2, "padding": "same", "use_bias": False},
    "first": {"data_format": "channels_first"},
    "groups-first": {"groups": 2, "data_format": "channels_first"},
    "activation": {"activation": "tanh"},
}
ONE_AXIS = {
    "causal": {"padding": "causal", "dilation_rate": 2},
    "causal-first": {"padding": "causal", "data_format": "channels_first"},
}


def computes(arguments):
    """Whether a backend has what a case asks for, on a processor."""
    first = arguments.get("data_format") == "channels_first"
    return not (backend.NAME == "tensorflow" and first)


def built(axes, rank=4, **arguments):
    layer = LAYERS[axes](6, 3, rank=rank, alpha=6, **arguments)
    first = arguments.get("data_format") == "channels_first"
    sizes = (9, 8, 7)[:axes]
    shape = (2, 4, *sizes) if first else (2, *sizes, 4)
    layer.build(shape)
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        value = rng.normal(size=weight.shape, scale=0.3)
        weight.assign(value.astype("float32"))
    return layer, rng.normal(size=shape).astype("float32")


def plain(axes, arguments, kernel, bias):
    """Keras's own layer with a kernel."""
    cls = LAYERS[axes].original_class
    layer = cls(6, 3, **arguments)
    first = arguments.get("data_format") == "channels_first"
    shape = (None, 4, *[None] * axes) if first else (None, *[None] * axes, 4)
    layer.build(shape)
    layer.kernel.assign(kernel)
    if bias is not None:
        layer.bias.assign(bias)
    return layer


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", CASES | ONE_AXIS)
def test_it_is_the_layer_with_the_kernel_of_the_formula(axes, name):
    arguments = (CASES | ONE_AXIS)[name]
    if name in ONE_AXIS and axes > 1:
        pytest.skip("Keras has it on one axis")
    if not computes(arguments):
        pytest.skip("TensorFlow has no such convolution on a processor")
    layer, x = built(axes, **arguments)
    kernel, down, up = (
        backend.to_numpy(getattr(layer, n)) for n in ("kernel", "down", "up")
    )
    bias = None if layer.bias is None else backend.to_numpy(layer.bias)
    for rank in (0, 1, 3, 4):
        layer.set_rank(rank)
        matrix = 6 / max(rank, 1) * down[:, :rank] @ up[:rank]
        summed = kernel + matrix.reshape(kernel.shape)
        wanted = plain(axes, arguments, summed, bias)(x)
        np.testing.assert_allclose(
            backend.to_numpy(layer(x)), backend.to_numpy(wanted), 2e-5, 3e-5
        )
        np.testing.assert_allclose(
            layer.delta_kernel(rank), summed - kernel, atol=1e-5
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients(groups):
    """By the chain rule, from the gradient of a plain layer's kernel."""
    layer, x = built(2, groups=groups)
    layer.set_rank(2)
    down, up = (backend.to_numpy(v) for v in (layer.down, layer.up))
    update = layer.delta_kernel(2)
    kernel = backend.to_numpy(layer.kernel) + update
    other = plain(2, {"groups": groups}, kernel, backend.to_numpy(layer.bias))
    weight = np.random.default_rng(1).normal(size=layer(x).shape)

    def loss(layer):
        return lambda: keras.ops.sum(
            keras.ops.multiply(layer(x), weight.astype("float32"))
        )

    (by_kernel,) = backend.gradients(loss(other), [other.kernel])
    matrix = by_kernel.reshape(len(down), -1)
    found = backend.gradients(loss(layer), [layer.down, layer.up])
    wanted_down, wanted_up = 3 * matrix @ up.T, 3 * down.T @ matrix
    wanted_down[:, 2:], wanted_up[2:] = 0, 0
    for a, b in zip(found, (wanted_down, wanted_up), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def images(size=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 8, 8, 3)).astype("float32")
    return x, rng.integers(0, 4, size).astype("int32")


def network(**options):
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Conv2D(8, 3, 2, groups=2, use_bias=False, name="next")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    randomize(model)
    model.get_layer("norm").moving_variance.assign(np.ones(8))
    kd.enable_dylora(
        model,
        **{
            "rank": 4,
            "scaling": "constant",
            "verbose": 0,
            "target_layers": "all-conv",
            "trainable_layers": "head",
            **options,
        },
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    return randomize_adapters(model, scale=0.3)


def outputs(model, x):
    return model.predict(x, verbose=0)


def assert_close(found, wanted, atol=2e-5):
    np.testing.assert_allclose(found, wanted, atol=atol)


@pytest.mark.parametrize("rank", [2, 4])  # a `Conv2D` has a `rank` of 2
def test_in_place_and_back(rank, tmp_path):
    model = network(rank=rank)
    layer = model.get_layer("first")
    assert type(layer) is kd.DyLoRAConv2D and layer.rank == rank
    x, _ = images(4)
    model.set_rank(0)
    base = outputs(model, x)
    kd.disable_dylora(model)
    assert type(layer) is keras.layers.Conv2D and layer.rank == 2
    assert_close(outputs(model, x), base)
    model.save(tmp_path / "plain.keras")
    again = keras.saving.load_model(tmp_path / "plain.keras")
    assert_close(outputs(again, x), base)


@pytest.mark.once
def test_merged_reloaded_and_cut_are_the_live_one(tmp_path):
    model = network()
    mixed = allocation(model, [2, 3])
    again = assert_doors_agree(model, images(4)[0], mixed, tmp_path)
    again.fit(*images(), verbose=0)


OPTIONS = {
    "sampled": {},
    "example": {"draw": "example"},
    "frozen": {"frozen": True},
    "dropout": {"dropout": 0.2},
    "summed": {"objective": "summed"},
    "progressive": {"full_rank_steps": 0.5, "draw": "example", "tune": 0.25},
}


@pytest.mark.parametrize("name", once(OPTIONS, but=["sampled"]))
def test_trains(name):
    model = network(**OPTIONS[name])
    base = backend.snapshot([x.base_kernel for x in model.dylora_layers])
    before = backend.snapshot([x.down for x in model.dylora_layers])
    x, y = images()
    first, *_, last = model.fit(
        x, y, batch_size=8, epochs=4, verbose=0
    ).history["loss"]
    assert last < first
    for a, layer in zip(before, model.dylora_layers, strict=True):
        assert np.abs(a - backend.to_numpy(layer.down)).max() > 1e-4
    for a, layer in zip(base, model.dylora_layers, strict=True):
        np.testing.assert_array_equal(a, backend.to_numpy(layer.base_kernel))
    report = kd.evaluate_ranks(model, x, y, verbose=0)
    assert np.isfinite(report.values("loss")).all()


@pytest.mark.once
def test_an_ordered_lora_a_budget_and_tuned_cuts():
    model = network(min_rank=4)
    x, y = images()
    whole = outputs(model, x)
    kd.order_ranks(model)
    assert_close(outputs(model, x), whole)
    small = kd.allocate_ranks(model, x, y, 0.5, verbose=0)
    plain = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    kd.tune_ranks(model, x, y, [1, 2, small], steps=12, verbose=0)
    tuned = kd.evaluate_ranks(model, x, y, [1, 2], verbose=0)
    assert (np.array(tuned.values("loss")) < plain.values("loss")).all()
    for rank in (1, small):
        with model.rank_scope(rank):
            wanted = outputs(model, x)
        assert_close(outputs(kd.merge(model, rank), x), wanted)


def test_what_is_adapted_by_name():
    model = network(target_layers=["first", "head"], trainable_layers=())
    assert list(model._dylora.layers) == ["first", "head"]
    with pytest.raises(ValueError, match="which matches none of"):
        network(target_layers="all-linear")


@pytest.mark.once
def test_a_hand_built_model(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = kd.DyLoRAConv2D(6, 3, strides=2, rank=4, alpha=8, name="c")(inputs)
    x = keras.layers.Flatten()(x)
    model = kd.DyLoRAModel(inputs, kd.DyLoRADense(4, rank=4, alpha=8)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    x, y = images()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("c").rank == 4
    assert_close(outputs(again, x), outputs(model, x))
    with model.rank_scope(2):
        wanted = outputs(model, x)
    merged = kd.merge(model, 2)
    assert merged.get_layer("c").rank == 2  # Keras's, its axes
    assert_close(outputs(merged, x), wanted)

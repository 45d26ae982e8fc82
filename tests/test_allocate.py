"""allocate_ranks: where ranks are of use, found by the loss's gradient."""

import itertools
import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora import training
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

RANK = 3
STRENGTH = {"first": 1.0, "second": 0.03, "third": 0.3}


def student(scaling="constant", rank=RANK):
    """A model of three adapted layers, whose targets are its own outputs.

    Its adapters are of unequal strength, so that ranks are of unequal use; the
    loss is 0 at the maximum.
    """
    inputs = keras.Input((10,))
    common = {"rank": rank, "alpha": 2 * rank, "scaling": scaling}
    x = kd.DyLoRADense(8, "tanh", name="first", **common)(inputs)
    x = kd.DyLoRADense(8, "tanh", name="second", **common)(x)
    outputs = kd.DyLoRADense(3, name="third", **common)(x)
    model = randomize(kd.DyLoRAModel(inputs, outputs))
    rng = np.random.default_rng(1)
    for layer in model.dylora_layers:
        # In order: columns fall in their length.
        fall = STRENGTH[layer.name] * np.geomspace(1.0, 0.2, rank)
        layer.down.assign(rng.normal(size=layer.down.shape) * fall)
        layer.up.assign(rng.normal(size=layer.up.shape))
    model.compile(loss="mse")
    x, _ = mlp_data(256)
    return model, x, model.predict(x, verbose=0)


def loss(model, ranks, x, y):
    with model.rank_scope(ranks):
        return model.evaluate(x, y, verbose=0)


@pytest.mark.parametrize(
    "scaling", ["constant", pytest.param("rank", marks=pytest.mark.long)]
)
@pytest.mark.once
def test_near_the_best_of_all(scaling):
    model, x, y = student(scaling)
    found = kd.allocate_ranks(model, x, y, budget=0.5, verbose=0)
    every = {}
    for ranks in itertools.product(range(RANK + 1), repeat=3):
        each = kd.RankAllocation.of(
            model, dict(zip(STRENGTH, ranks, strict=True))
        )
        if each.share <= 0.5:
            every[each] = loss(model, each, x, y)
    order = sorted(every, key=every.get)
    assert len(order) > 25
    assert found in order[:3]
    assert found["first"] > found["second"]
    one_for_all = loss(model, 1, x, y)  # a third of the parameters
    assert every[found] < 0.7 * one_for_all


def test_budgets_are_kept_and_nested():
    model, x, y = student()
    budgets = [0.2, 0.4, 100, 1.0]
    found = kd.allocate_ranks(model, x, y, budgets, verbose=0)
    sizes = [each.parameters for each in found]
    columns = np.array([18, 16, 11])
    assert sizes[3] == 3 * columns.sum() == 135
    for size, high in zip(sizes, (27, 54, 100, 135), strict=True):
        assert high - columns.max() < size <= high
    for small, large in itertools.pairwise(found):
        assert all(b <= large[path] for path, b in small.items())
    assert found[3].share == 1 and set(found[3].values()) == {RANK}


def test_the_model_is_left_as_it_was_and_the_result_is_the_same():
    model, x, y = student()
    model.compile(keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
    model.fit(x, y, verbose=0, epochs=1)
    model.set_rank(2)
    before = backend.snapshot(model.variables)
    first = kd.allocate_ranks(model, x, y, verbose=0)
    for a, b in zip(before, backend.snapshot(model.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.rank == 2
    assert kd.allocate_ranks(model, x, y, verbose=0) == first


def gate_gradient(model):
    paths = model._dylora.layers
    return training.loss_gradient(
        model, lambda values, _: {p: values[0][i] for i, p in enumerate(paths)}
    )


def test_gradient_by_the_gates():
    """The gradient agrees with differences of the loss of `evaluate`."""
    model, x, _ = student()
    _, y = mlp_data(256, seed=3)
    gradient = gate_gradient(model)
    gates = np.array([[2.0, 1.0, 0.0], [2.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    weight = np.linspace(0.5, 1.5, 256).astype("float32")
    _, (found,) = gradient([gates], (), (x, y, weight))

    def at(gates):
        paths = list(model._dylora.layers)
        for path, row in zip(paths, gates, strict=True):
            model._dylora.layers[path]._gate.gate.variable.assign(row[None])
        return model.evaluate(
            x, y, sample_weight=weight, batch_size=256, verbose=0
        )

    step = 1e-2
    expected = np.empty_like(gates)
    for i in np.ndindex(gates.shape):
        change = np.zeros_like(gates)
        change[i] = step
        expected[i] = (at(gates + change) - at(gates - change)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)


def classifier():
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, rank=4, scaling="constant", verbose=0)
    model.compile(loss=classification_loss(), metrics=["accuracy"])
    return randomize_adapters(model)


class Sequence(keras.utils.PyDataset):
    num_batches = 4

    def __getitem__(self, i):
        rows = slice(8 * i, 8 * i + 8)
        return {k: v[rows] for k, v in tokens().items()}, labels()[rows]


class Endless(Sequence):
    num_batches = None

    def __getitem__(self, i):
        return super().__getitem__(i % 4)


def test_losses_of_layers_count():
    model = randomize(mlp(activity_regularizer="l2"))
    model.compile("sgd", "mse")
    x, y = mlp_data()
    gate = keras.ops.convert_to_numpy(model.dylora_config.scale.gate(4))
    gates = np.stack([gate] * 2)
    found, *_ = gate_gradient(model)([gates], (), (x, y, None))
    wanted = model.evaluate(x, y, batch_size=len(x), verbose=0)
    assert found == pytest.approx(wanted, rel=1e-5)
    error = np.mean((y - model.predict(x, verbose=0)) ** 2)
    assert found > error + 0.01


@pytest.mark.once
def test_datasets():
    import tensorflow as tf

    model = classifier()
    dataset = tf.data.Dataset.from_tensor_slices((tokens(), labels())).batch(8)
    found = [
        kd.allocate_ranks(model, data, budget=0.5, verbose=0)
        for data in (dataset, dataset.repeat(), Sequence(), Endless())
    ]
    assert len(set(found)) == 1
    assert found[0].share == 0.5


@pytest.mark.once
def test_texts():
    model = text_classifier()
    kd.enable_dylora(model, rank=4, scaling="constant", verbose=0)
    model.compile(loss=classification_loss())
    randomize_adapters(model)
    texts = TEXTS * 4
    y = np.arange(len(texts)) % 2
    found = kd.allocate_ranks(model, texts, y, 0.25, verbose=0)
    assert found.parameters == 2 * 32


def test_a_search_traces_one_function(pytestconfig):
    model, x, y = student()
    compute_loss, traces = model.compute_loss, []

    def counted(*args, **kwargs):
        traces.append(1)
        return compute_loss(*args, **kwargs)

    object.__setattr__(model, "compute_loss", counted)
    kd.allocate_ranks(model, x, y, [0.2, 0.5, 0.7], verbose=0)
    # torch traces nothing by itself.
    eager = backend.NAME == "torch" and not pytestconfig.getoption(
        "jit_compile"
    )
    assert len(traces) == (72 if eager else 1)


def test_progress_is_shown(capsys):
    model, x, y = student()
    kd.allocate_ranks(model, x, y, [0.2, 0.5])
    assert "48/48" in capsys.readouterr().out
    kd.allocate_ranks(model, x, y, verbose=0)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0, ValueError, "from 11 parameters.*to 135.*budget=0$"),
        (0.0, ValueError, "budget=0.0"),
        (-0.5, ValueError, "budget=-0.5"),
        (1.1, ValueError, "budget=1.1"),
        (136, ValueError, "budget=136"),
        (10, ValueError, "one column of the smallest layer.*budget=10"),
        (True, TypeError, "budget=True"),
        ("half", TypeError, "budget='half'"),
        ([0.5, 0.25], ValueError, r"ascending.*\[0.5, 0.25\]"),
        ([0.5, 0.5], ValueError, "ascending"),
        ([], ValueError, "ascending"),
        (float("nan"), ValueError, "budget=nan"),
    ],
)
@pytest.mark.once
def test_wrong_budgets(budget, error, message):
    model, x, y = student()
    with pytest.raises(error, match=message):
        kd.allocate_ranks(model, x, y, budget)


def test_wrong_models_and_data():
    model, x, y = student()
    with pytest.raises(ValueError, match="y=None"):
        kd.allocate_ranks(model, x)
    with pytest.raises(ValueError, match="no example"):
        kd.allocate_ranks(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="must be enabled"):
        kd.allocate_ranks(roberta_classifier(), tokens(), labels())
    with pytest.raises(ValueError, match="must be compiled"):
        kd.allocate_ranks(mlp(), *mlp_data())


@pytest.mark.once
def test_warns_of_a_lora_that_is_not_in_order():
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, rank=4, min_rank=4, verbose=0)
    model.compile(loss=classification_loss())
    randomize_adapters(model)
    with pytest.warns(UserWarning, match="after `order_ranks`.*from rank 4 on"):
        kd.allocate_ranks(model, tokens(), labels(), verbose=0)
    kd.order_ranks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kd.allocate_ranks(model, tokens(), labels(), verbose=0)


def test_at_a_high_rank():
    """The ranks of layers may be as far from one rank for all as it takes."""
    model, x, y = student(rank=32)
    small, large = kd.allocate_ranks(model, x, y, [0.3, 0.31], verbose=0)
    assert 0.28 < small.share <= 0.3 < large.share <= 0.31
    assert loss(model, small, x, y) < 0.8 * loss(model, 9, x, y)

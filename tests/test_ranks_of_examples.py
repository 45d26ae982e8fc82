"""A rank for each example of a batch."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.linear import ALPHA, RANK, batches, gates_of, linear, outputs_at
from tests.models import (
    classification_loss,
    labels,
    randomize,
    roberta_classifier,
    tokens,
)
from tests.test_ranks import oracle_for_examples

not_on_torch = pytest.mark.skipif(
    backend.NAME == "torch", reason="Keras refuses steps_per_execution there"
)


@pytest.mark.parametrize("scaling", ["rank", "constant"])
def test_gradient_is_the_mean_over_the_ranks_of_the_examples(scaling):
    model, layer = linear(scaling=scaling)
    kernel, bias, down, up = backend.snapshot(
        [layer.kernel, layer.bias, layer.down, layer.up]
    )
    x, y = batches(16)
    probabilities = kd.Uniform().probabilities(1, RANK)
    drawn = oracle_for_examples(probabilities, 1, 3, 0, 16)
    scales = {"rank": ALPHA / np.array(drawn), "constant": ALPHA / RANK}
    gates = gates_of(drawn, scales[scaling])
    error = x @ kernel + bias + (x @ down * gates) @ up - y
    dy = 2 * error / error.size
    model.compile(keras.optimizers.SGD(1.0), "mse")
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(
        float(logs["loss"]), np.mean(error**2), rtol=1e-6
    )
    assert "rank" not in logs
    for variable, old, gradient in (
        (layer.down, down, x.T @ (dy @ up.T * gates)),
        (layer.up, up, (x @ down * gates).T @ dy),
    ):
        np.testing.assert_allclose(
            backend.to_numpy(variable), old - gradient, atol=1e-6
        )
    assert model.rank == RANK


def test_last_batches_and_evaluation_have_other_sizes():
    model, layer = linear()
    model.compile("adam", "mse")
    x, y = batches(21)
    history = model.fit(
        x, y, batch_size=8, epochs=2, validation_split=0.2, verbose=0
    )
    assert np.isfinite(history.history["loss"]).all()
    with model.rank_scope(2):
        expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(outputs_at(layer, x, 2), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"steps_per_execution": 2}, marks=not_on_torch),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.long),
        pytest.param(
            {
                "optimizer": lambda: keras.optimizers.Adam(
                    0.01, gradient_accumulation_steps=2
                )
            },
            marks=pytest.mark.once,
        ),
    ],
    ids=["steps-per-execution", "eager", "accumulation"],
)
def test_ranks_for_examples_of_a_task(options):
    model = kd.enable_dylora(
        roberta_classifier(dropout=0.1),
        kd.DyLoRAConfig.progressive(3, rank=RANK),
    )
    optimizer = options.pop("optimizer", lambda: keras.optimizers.Adam(0.01))
    model.compile(optimizer(), classification_loss(), **options)
    model.fit(tokens(), labels(), batch_size=8, epochs=2, verbose=0)
    singular = [
        np.linalg.norm(layer.factors().up, axis=1)
        for layer in model.dylora_layers
    ]
    assert all((s > 0).all() for s in singular)
    assert model._dylora.full_rank == 0


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, layer = linear()
    model.compile("adam", "mse")
    before = backend.to_numpy(layer.down)
    model.fit(*batches(16), verbose=0)
    assert np.abs(backend.to_numpy(layer.down) - before).max() > 0


def test_outputs_must_keep_the_examples():
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA)
    outputs = keras.ops.mean(layer(inputs), axis=0)
    model = kd.DyLoRAModel(inputs, outputs, draw="example")
    model.compile("sgd", "mse")
    x, _ = batches(8)
    with pytest.raises(ValueError, match="first axis.*Received: outputs of"):
        model.train_on_batch(x, np.zeros(3, "float32"))


def test_layers_must_keep_the_examples():
    inputs = keras.Input((5,), batch_size=8)
    layer = kd.DyLoRADense(8, rank=RANK, alpha=ALPHA)
    columns = layer(keras.ops.transpose(inputs))  # (5, 8)
    outputs = keras.ops.transpose(columns)
    model = kd.DyLoRAModel(inputs, outputs, draw="example")
    model.compile("sgd", "mse")
    x, _ = batches(8)
    with pytest.raises(ValueError, match="adapted layer must have.*for 8 exam"):
        model.train_on_batch(x, np.zeros((8, 5), "float32"))


class Preferences(kd.DyLoRAModel):
    """The margin of texts that are chosen and the same ones as rejected."""

    def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
        both = self(keras.ops.concatenate([x, x]))
        chosen, rejected = keras.ops.split(both, 2)
        return keras.ops.max(keras.ops.abs(chosen - rejected))


def in_windows(inputs):
    """Two rows of each example, one after the other."""
    return keras.ops.reshape(inputs, (-1, 5))


FOLDS = {
    "concatenated": (Preferences, lambda inputs: inputs, (5,)),
    "windows": (kd.DyLoRAModel, in_windows, (2, 5)),
}
MORE_ROWS = "more rows than examples.*draw='step'.*for 8 examples"


def folding(fold, draw):
    cls, folded, shape = FOLDS[fold]
    inputs = keras.Input(shape)
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA)
    outputs = layer(folded(inputs))
    if fold == "windows":
        outputs = keras.ops.reshape(outputs, (-1, 6))
    model = randomize(cls(inputs, outputs, seed=3, draw=draw))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    return model, x, np.zeros((8, *outputs.shape[1:]), "float32")


@pytest.mark.parametrize("fold", FOLDS)
def test_more_rows_than_examples_are_told_once(fold):
    model, x, y = folding(fold, "example")
    with pytest.warns(UserWarning, match=MORE_ROWS) as caught:
        for _ in range(2):
            model.train_on_batch(x, y)
    assert sum("more rows" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("fold", FOLDS)
def test_more_rows_than_examples_at_one_rank(fold):
    model, x, y = folding(fold, "step")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*more rows than")
        logs = model.train_on_batch(x, y, return_dict=True)
    if fold == "concatenated":
        assert float(logs["loss"]) == 0  # chosen and rejected are the same


def test_more_rows_than_examples_in_a_loop_of_your_own():
    model, x, _ = folding("concatenated", "example")
    with pytest.warns(UserWarning, match=MORE_ROWS), model.draw_ranks(x):
        model(np.concatenate([x, x]), training=True)

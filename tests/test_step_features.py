"""The features of Keras's own step, around a drawn rank."""

import contextlib

import keras
import numpy as np
import pytest

from tests import backend
from tests.marks import once
from tests.models import mlp, mlp_data, randomize, randomize_adapters

# On TensorFlow, no layer with a `training` argument can be rematerialized as a
# whole in a compiled step, a plain `Dense` neither (Keras 3.15).
REMAT = "activations" if backend.NAME == "tensorflow" else "full"


def adamw(**kwargs):
    return keras.optimizers.AdamW(0.01, **kwargs)


class Feature:
    """A feature: how a model is built and compiled with it.

    Args:
        policy: dtype policy of the model.
        remat: mode of the `keras.RematScope`, or `None`.
        optimizer: arguments of the optimizer.
        **compile_arguments: arguments of `compile`.
    """

    def __init__(
        self, policy="float32", remat=None, optimizer=(), **compile_arguments
    ):
        self.policy = policy
        self.remat = remat
        self.optimizer = dict(optimizer)
        self.compile_arguments = compile_arguments

    def model(self, frozen):
        keras.config.set_dtype_policy(self.policy)
        with contextlib.ExitStack() as stack:
            if self.remat:
                stack.enter_context(keras.RematScope(mode=self.remat))
            model = randomize_adapters(randomize(mlp(frozen=frozen)))
        model.compile(adamw(**self.optimizer), "mse", **self.compile_arguments)
        return model


FEATURES = {
    "plain": Feature(),
    "mixed-bfloat16": Feature("mixed_bfloat16"),
    "mixed-float16": Feature("mixed_float16"),
    "steps-per-execution": Feature(steps_per_execution=4),
    "jit-compile": Feature(jit_compile=True),
    "no-jit": Feature(jit_compile=False),
    "run-eagerly": Feature(run_eagerly=True),
    "accumulation": Feature(optimizer={"gradient_accumulation_steps": 3}),
    "ema": Feature(optimizer={"use_ema": True, "ema_momentum": 0.5}),
    "remat": Feature(remat=REMAT),
    "all-together": Feature(
        "mixed_bfloat16",
        REMAT,
        {"gradient_accumulation_steps": 2},
        steps_per_execution=4,
        jit_compile=True,
    ),
}
NOT_COMPILED = {
    "tensorflow": ["run-eagerly"],
    "jax": ["run-eagerly"],
    "torch": list(FEATURES),
}[backend.NAME]
# They change how a step is computed, not what.
SAME_RESULT = ("steps-per-execution", "no-jit", "run-eagerly", "remat")


# Keras refuses several steps per execution on torch. torch compiles for half a
# minute. Without jit, JAX runs as it does eagerly, only slower.
NOT_ON_TORCH = ["steps-per-execution", "all-together", "jit-compile"]
LEFT_OUT = {
    "tensorflow": [],
    "jax": ["no-jit"],
    "torch": NOT_ON_TORCH,
}[backend.NAME]


def parameters(names):
    """Of what torch runs too, plain steps alone are compiled in `make test`."""
    return once(
        [name for name in names if name not in LEFT_OUT],
        but=["plain", *NOT_ON_TORCH],
    )


def fit(model, epochs=4):
    """8 steps an epoch; returns the rank that each execution logs last."""
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: seen.append(int(logs["rank"]))
    )
    x, y = mlp_data()
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[callback],
    )  # fmt: skip
    return seen, history.history["loss"]


def sequence(model, steps):
    """The ranks that the seed decides."""
    draw = model._dylora.draw
    return [int(draw(keras.ops.convert_to_tensor(i))) for i in range(steps)]


@pytest.mark.parametrize("name", parameters(FEATURES))
def test_trains_at_the_drawn_ranks_without_retracing(name):
    feature = FEATURES[name]
    # Frozen mode refuses moving averages.
    model = feature.model(frozen=name != "ema")
    model.set_rank(2)
    epochs = 25 if name == "all-together" else 4
    with backend.count_compilations(model) as counts:
        seen, losses = fit(model, epochs)
    if name not in NOT_COMPILED:
        assert counts["train_step"] == 1
    every = feature.compile_arguments.get("steps_per_execution", 1)
    assert seen == sequence(model, 8 * epochs)[every - 1 :: every]
    assert int(backend.to_numpy(model._ranks_drawn)) == 8 * epochs
    assert losses[-1] < losses[0]
    assert model.rank == 2
    adapters = [v for x in model.dylora_layers for v in (x.down, x.up)]
    assert {v.dtype for v in adapters} == {"float32"}


@pytest.mark.parametrize("name", parameters(SAME_RESULT))
def test_gives_what_the_plain_step_gives(name):
    results = []
    for feature in (FEATURES["plain"], FEATURES[name]):
        model = feature.model(frozen=True)
        fit(model, epochs=1)
        results.append(backend.snapshot(model.trainable_variables))
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_accumulation_averages_the_gradients_of_several_ranks():
    rate, micro_batches = 0.1, 3
    model = randomize_adapters(randomize(mlp()))
    oracle = randomize_adapters(randomize(mlp()))
    model.compile(
        keras.optimizers.SGD(rate, gradient_accumulation_steps=micro_batches),
        "mse",
    )
    variables = oracle.trainable_variables
    total = [0.0 for _ in variables]
    x, y = mlp_data(8 * micro_batches)
    drawn = set()
    for i in range(micro_batches):
        batch = slice(8 * i, 8 * (i + 1))
        logs = model.train_on_batch(x[batch], y[batch], return_dict=True)
        drawn.add(int(logs["rank"]))
        oracle.set_rank(int(logs["rank"]))

        def loss(x=x[batch], y=y[batch]):
            error = keras.losses.mean_squared_error(y, oracle(x))
            return keras.ops.mean(error)

        found = backend.gradients(loss, variables)
        total = [a + b for a, b in zip(total, found, strict=True)]
    assert len(drawn) > 1
    for variable, trained, gradient in zip(
        variables, model.trainable_variables, total, strict=True
    ):
        expected = backend.to_numpy(variable) - rate * gradient / micro_batches
        np.testing.assert_allclose(
            backend.to_numpy(trained), expected, atol=1e-5
        )


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="of Keras 3.15"
)
def test_frozen_with_several_optimizers():
    def optimizers(**kwargs):
        one, other = (keras.optimizers.SGD(0.1, **kwargs) for _ in range(2))
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(one, {"head/.*": other})
        )

    x, y = mlp_data()
    model = mlp(frozen=True)
    model.compile(optimizers(gradient_accumulation_steps=2), "mse")
    with pytest.raises(ValueError, match="one optimizer. Received"):
        model.fit(x, y, verbose=0)
    model.compile(optimizers(), "mse")
    model.fit(x, y, verbose=0)


def test_ema_weights_are_those_after_fit():
    plain, averaged = (
        FEATURES[n].model(frozen=False) for n in ("plain", "ema")
    )
    fit(plain, epochs=1)
    fit(averaged, epochs=1)
    slots = {v.path: v for v in averaged.optimizer.variables}
    found = 0
    for a, b in zip(
        plain.trainable_variables, averaged.trainable_variables, strict=True
    ):
        assert (backend.to_numpy(a) != backend.to_numpy(b)).any()
        for path, slot in slots.items():
            if b.path.replace("/", "_") in path and "average" in path:
                np.testing.assert_array_equal(
                    backend.to_numpy(slot), backend.to_numpy(b)
                )
                found += 1
    assert found >= len(plain.trainable_variables)


def test_a_step_whose_loss_overflows_changes_no_weight():
    keras.config.set_dtype_policy("mixed_float16")
    model = randomize_adapters(randomize(mlp(frozen=True)))
    model.compile(
        keras.optimizers.LossScaleOptimizer(
            adamw(), initial_scale=2.0**30, dynamic_growth_steps=1000
        ),
        "mse",
    )
    x, y = mlp_data()
    before = backend.snapshot(model.weights)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert int(logs["rank"]) == sequence(model, 1)[0]
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    fit(model, epochs=4)
    assert float(backend.to_numpy(model.optimizer.dynamic_scale)) < 2.0**30
    after = backend.snapshot(model.get_layer("head").weights)
    head = before[-len(after) :]
    assert all((a != b).any() for a, b in zip(head, after, strict=True))

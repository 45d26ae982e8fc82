"""A training loop of your own, on each backend: LoRA, the order, then ranks.

    KERAS_BACKEND=tensorflow python -m examples.own_loop
    KERAS_BACKEND=jax python -m examples.own_loop
    KERAS_BACKEND=torch python -m examples.own_loop

`model.draw_ranks` is what makes a step train at drawn ranks; all else is a loop
as in Keras's guides. It prints the loss at every rank, before and after.
"""

import argparse

import keras
import numpy as np

import keras_dylora as kd

BATCH, FULL_RANK_STEPS = 32, 60


def data(size=512, seed=0):
    """Inputs `(size, 16)` and what a random linear map makes of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 16))
    update = rng.normal(size=(16, 8)) @ np.diag(0.5 ** np.arange(8))
    return x.astype("float32"), (x @ update).astype("float32")


def build():
    inputs = keras.Input((16,))
    outputs = keras.layers.Dense(8, kernel_initializer="zeros")(inputs)
    model = keras.Model(inputs, outputs)
    config = kd.DyLoRAConfig.progressive(
        FULL_RANK_STEPS, rank=4, alpha=4, target_layers="all-linear"
    )
    kd.enable_dylora(model, config, trainable_layers=())
    model.compile(keras.optimizers.Adam(0.03), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def batches(x, y, steps):
    for step in range(steps):
        at = step * BATCH % len(x)
        yield x[at : at + BATCH], y[at : at + BATCH]


def loss_function(y, predicted):
    return keras.ops.mean((predicted - keras.ops.convert_to_tensor(y)) ** 2)


def train_tensorflow(model, batches):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with model.draw_ranks(x), tf.GradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        weights = model.trainable_weights
        model.optimizer.apply(tape.gradient(loss, weights), weights)

    for x, y in batches:
        step(x, y)


def train_torch(model, batches):
    import torch

    @model.traced
    def step(x, y):
        model.zero_grad()
        with model.draw_ranks(x):
            loss = loss_function(y, model(x, training=True))
        loss.backward()
        weights = model.trainable_weights
        with torch.no_grad():
            model.optimizer.apply([w.value.grad for w in weights], weights)

    for x, y in batches:
        step(x, y)


def train_jax(model, batches):
    import jax

    def loss(trainable, state, x, y):
        with model.draw_ranks(x, state) as state:
            predicted, state = model.stateless_call(
                trainable, state, x, training=True
            )
        return loss_function(y, predicted), state

    @jax.jit
    def step(trainable, state, slots, x, y):
        gradient = jax.grad(loss, has_aux=True)
        gradients, state = gradient(trainable, state, x, y)
        return *model.optimizer.stateless_apply(
            slots, gradients, trainable
        ), state

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
    )
    trainable, state, slots = ([v.value for v in group] for group in groups)
    for x, y in batches:
        trainable, slots, state = step(trainable, state, slots, x, y)
    values = (trainable, state, slots)
    for group, new in zip(groups, values, strict=True):
        for variable, value in zip(group, new, strict=True):
            variable.assign(value)


TRAIN = {
    "tensorflow": train_tensorflow,
    "torch": train_torch,
    "jax": train_jax,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    keras.utils.set_random_seed(0)
    x, y = data()
    model, train = build(), TRAIN[keras.backend.backend()]
    before = kd.evaluate_ranks(model, x, y, verbose=0)
    train(model, batches(x, y, FULL_RANK_STEPS))
    kd.order_ranks(model)
    train(model, batches(x, y, 2 * FULL_RANK_STEPS))
    after = kd.evaluate_ranks(model, x, y, verbose=0)
    for name, report in (("before", before), ("after", after)):
        values = "  ".join(f"{v:.3f}" for v in report.values("loss"))
        print(f"loss at ranks 1 to 4, {name}: {values}")
    print("Next: docs/loops.md, on what a loop must do.")
    return before, after


if __name__ == "__main__":
    main()

"""The step on TensorFlow and torch: `train_step(data)` changes variables."""

import contextlib

import keras
from keras import ops

from keras_dylora.training import functions, step


def train_step(model, keras_step, data):
    """Runs one DyLoRA step on `data` and returns its logs."""
    if not hasattr(model, "_dylora"):
        x, *_ = keras.utils.unpack_x_y_sample_weight(data)
        model(x)
        model.start_training()
    gates = [gate.variable for gate in model._dylora.gates]
    inference = [ops.copy(gate) for gate in gates]
    masked = step.masked(model)
    before = [ops.copy(variable) for variable, _ in masked]
    iterations = ops.copy(model.optimizer.iterations)
    try:
        examples, drawn = step.begin(model, data)
        with step.training(model, examples):
            logs = keras_step(data)
    finally:
        for gate, value in zip(gates, inference, strict=True):
            gate.assign(value)
    if model._dylora.config.frozen:
        step.hold(model, masked, before, iterations)
    return step.logged(logs, drawn)


def restore_on_error(model, kind, function):
    """Wraps a train function so that a failure keeps the inference rank.

    A TensorFlow graph stops at the operation that fails, before it restores the
    gates. The functions of `evaluate` and `predict` set no gates, so they stay
    as they are.
    """
    if kind != "train":
        return function

    def train_function(iterator):
        inference = {id(x): ops.copy(x.variable) for x in _gates(model)}
        try:
            return function(iterator)
        except BaseException:
            for gate in _gates(model):
                if id(gate) in inference:
                    gate.variable.assign(inference[id(gate)])
                else:  # built in this step
                    gate.set_rank(gate.scale.rank)
            raise

    return train_function


def with_tuning(model, train, tuning):
    """Makes a train function that trains on a batch, and then tunes on it."""

    def step(batch):
        logs = train([(batch, tuning.values())])
        tuning.step(batch)
        return logs

    # On torch, Keras gives a list of batches.
    return lambda data: functions.last(
        step, iter(data), model.steps_per_execution
    )


def _gates(model):
    return model._dylora.gates if hasattr(model, "_dylora") else []


def tracing():
    """Whether a variable has no value of its own now; never the case here."""
    return False


def write_back(model):
    """Does nothing: variables are always up to date here."""


@contextlib.contextmanager
def forward(model, x):
    """Yields predictions of Keras's training step, with their `losses`."""
    yield model(x, **step.call_argument(model, training=True))

"""The step on JAX: `train_step(state, data)` returns a new state."""

import contextlib
import itertools

import keras
from keras import ops

from keras_dylora import _keras
from keras_dylora.training import functions, step

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # JAX before 0.10
    from jax.core import get_opaque_trace_state

_EAGER = get_opaque_trace_state(convention="flax")


def train_step(model, keras_step, state, data):
    """Runs one DyLoRA step on `data`; returns its logs and the new state."""
    trainable, non_trainable, optimizer, metrics = state
    gates = [gate.variable for gate in model._dylora.gates]
    with _scope(model, trainable, non_trainable, optimizer) as scope:
        inference = [scope.get_current_value(gate) for gate in gates]
        masked = step.masked(model)
        before = [scope.get_current_value(v) for v, _ in masked]
        iterations = ops.convert_to_tensor(model.optimizer.iterations)
        examples, drawn = step.begin(model, data)
    state = (trainable, _values(scope, model)[1], optimizer, metrics)
    with step.training(model, examples):
        logs, state = keras_step(state, data)
    with _scope(model, *state[:3]) as scope:
        for gate, value in zip(gates, inference, strict=True):
            gate.assign(value)
        if model._dylora.config.frozen:
            step.hold(model, masked, before, iterations)
    return step.logged(logs, drawn), (*_values(scope, model), state[3])


def _lists(model):
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
    )


def _scope(model, *values):
    pairs = [
        pair
        for variables, group in zip(_lists(model), values, strict=True)
        for pair in zip(variables, group, strict=True)
    ]
    return keras.StatelessScope(state_mapping=pairs)


def _values(scope, model):
    return tuple(
        [scope.get_current_value(v) for v in variables]
        for variables in _lists(model)
    )


def tracing():
    """Whether JAX is tracing; a variable then has no value of its own."""
    return get_opaque_trace_state(convention="flax") != _EAGER


def restore_on_error(model, kind, function):
    """Wraps a function of Keras so that a failure loses no weight.

    Keras takes the state out of the variables before the first batch, and the
    compiled function takes over its memory. So the wrapper first reads the data
    of all steps, and puts the state back if something fails.
    """

    def restoring(state, iterator):
        try:
            steps = itertools.islice(iterator, model.steps_per_execution)
            return function(state, iter(list(steps)))
        except BaseException:
            _keras.put_back(model, state)
            raise

    return restoring


def with_tuning(model, train, tuning):
    """Makes a train function that trains on a batch, and then tunes on it."""

    def function(state, iterator):
        def step(batch):
            nonlocal state
            logs, state = train(state, iter([(batch, tuning.values())]))
            _keras.put_back(model, state)  # the tuning reads the variables
            tuning.step(batch)
            return logs

        try:
            logs = functions.last(step, iterator, model.steps_per_execution)
        except BaseException:
            _keras.put_back(model, state)
            raise
        return logs, state

    return function


def write_back(model):
    """Writes the state of a running `fit` back to the variables."""
    model.jax_state_sync()


@contextlib.contextmanager
def forward(model, x):
    """Yields predictions of Keras's training step, with their `losses`.

    Keras's scope around the loss collects no losses, so this call collects
    its own.
    """
    with _keras.override_losses(model, []):
        predictions, states, losses = model.stateless_call(
            [ops.convert_to_tensor(v) for v in model.trainable_variables],
            [ops.convert_to_tensor(v) for v in model.non_trainable_variables],
            x,
            return_losses=True,
            **step.call_argument(model, training=True),
        )
    for variable, value in zip(
        model.non_trainable_variables, states, strict=True
    ):
        variable.assign(value)
    with _keras.override_losses(model, losses):
        yield predictions

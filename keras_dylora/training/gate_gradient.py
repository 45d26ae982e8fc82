"""The gradient of a model's loss by the gates of its layers."""

import keras
import numpy as np
from keras import ops

from keras_dylora.training import functions, step


def gate_gradient(model):
    """A function that differentiates the mean loss of a batch by gates.

    As in `evaluate`. It takes gates `(layers, rank)`, in the order of the
    adapted layers, and a batch `(x, y, sample_weight)`, all in NumPy; `y` and
    `sample_weight` may be `None`. It returns the gradient, `(layers, rank)`,
    in NumPy, and changes no weight.
    """
    layers = model._dylora.layers

    def loss(gates, batch):
        x, y, sample_weight = batch
        by_path = {path: gates[i] for i, path in enumerate(layers)}
        with model._dylora.overridden(by_path):
            y_pred = model(x, **step.call_argument(model, training=False))
            return model.compute_loss(x, y, y_pred, sample_weight)

    gradient = _DIFFERENTIATED[keras.backend.backend()](model, loss)

    def computed(gates, batch):
        gates = ops.convert_to_tensor(np.asarray(gates, "float32"))
        batch = keras.tree.map_structure(
            lambda v: None if v is None else ops.convert_to_tensor(v), batch
        )
        found = gradient(gates, batch)
        return np.asarray(ops.convert_to_numpy(found), "float64")

    return computed


def _by_jax(model, loss):
    import jax

    variables = {id(v): v for v in [*model.variables, *model.metrics_variables]}
    variables = list(variables.values())

    def stateless(gates, values, batch):
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            return loss(gates, batch)

    differentiated = jax.jit(jax.grad(stateless))
    # As arguments: constants would be compiled into the function.
    values = [v.value for v in variables]
    return lambda gates, batch: differentiated(gates, values, batch)


def _by_tensorflow(model, loss):
    import tensorflow as tf

    @tf.function(autograph=False)
    def differentiated(gates, batch):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(gates)
            value = loss(gates, batch)
        return tape.gradient(value, gates)

    return differentiated


def _by_torch(model, loss):
    import torch

    def gradient(data):
        gates, batch = data[0]
        with torch.enable_grad():
            gates = gates.detach().requires_grad_()
            return torch.autograd.grad(loss(gates, batch), gates)[0]

    if model.jit_compile:
        gradient = functions.traced_step(model, gradient)
    return lambda gates, batch: gradient([(gates, batch)])


_DIFFERENTIATED = {
    "jax": _by_jax,
    "tensorflow": _by_tensorflow,
    "torch": _by_torch,
}

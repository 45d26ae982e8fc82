"""The gradient of a model's loss with respect to the gates of its layers."""

import keras
import numpy as np
from keras import ops

from keras_dylora.training import functions, step


def loss_gradient(model, gates_of):
    """Makes a function that differentiates the mean loss of a batch.

    The loss is that of `evaluate`: it has no dropout, and no weight changes.

    Args:
        model: an enabled model.
        gates_of: function of a list of float tensors and of a structure of
            integer tensors. It returns the gates, a dict of path to tensor as
            in `GateRow.value`.

    Returns:
        A function of the list, of the structure, and of a batch
        `(x, y, sample_weight)`, all in NumPy. `y` and `sample_weight` may be
        `None`. It returns the loss, a float, and the list of gradients in
        NumPy.
    """

    def loss(values, indices, batch):
        x, y, sample_weight = batch
        with model._dylora.overridden(gates_of(values, indices)):
            y_pred = model(x, **step.call_argument(model, training=False))
            return model.compute_loss(x, y, y_pred, sample_weight)

    gradient = _DIFFERENTIATED[keras.backend.backend()](model, loss)

    def computed(values, indices, batch):
        values = [ops.convert_to_tensor(np.asarray(v, "f4")) for v in values]
        indices, batch = keras.tree.map_structure(
            lambda v: None if v is None else ops.convert_to_tensor(v),
            (indices, batch),
        )
        found, gradients = gradient(values, indices, batch)
        gradients = [
            np.asarray(ops.convert_to_numpy(x), "float64") for x in gradients
        ]
        return float(ops.convert_to_numpy(found)), gradients

    return computed


def _by_jax(model, loss):
    import jax

    variables = list({id(v): v for v in model.variables}.values())

    def stateless(values, state, indices, batch):
        pairs = list(zip(variables, state, strict=True))
        # Without it, Keras would leave out the losses of layers.
        with keras.StatelessScope(state_mapping=pairs, collect_losses=True):
            return loss(values, indices, batch)

    differentiated = jax.jit(jax.value_and_grad(stateless))

    def gradient(values, *data):
        # The variables are arguments: JAX would compile constants in.
        return differentiated(values, [v.value for v in variables], *data)

    return gradient


def _by_tensorflow(model, loss):
    import tensorflow as tf

    @tf.function(autograph=False)
    def differentiated(values, *data):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            found = loss(values, *data)
        return found, tape.gradient(found, values)

    return differentiated


def _by_torch(model, loss):
    import torch

    def gradient(data):
        values, *rest = data[0]
        with torch.enable_grad():
            values = [v.detach().requires_grad_() for v in values]
            found = loss(values, *rest)
            gradients = list(torch.autograd.grad(found, values))
            return found.detach(), gradients

    if model.jit_compile:
        gradient = functions.traced_step(model, gradient)
    return lambda *data: gradient([data])


_DIFFERENTIATED = {
    "jax": _by_jax,
    "tensorflow": _by_tensorflow,
    "torch": _by_torch,
}

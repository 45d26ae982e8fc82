"""The private parts of Keras that this package needs, each with its reason.

`tests/test_keras_private.py` uses every one of them, and says what breaks if
Keras changes it.
"""

import contextlib

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.global_state import get_global_attribute

from keras_dylora._keras import optimizers as optimizers

# Live objects change their class, and built layers their variables.


def set_class(instance, cls):
    """Gives a live Keras object another class.

    The object stays the same: every parent, graph node and compiled function
    that holds it sees the change, and no weight is copied. Keras's
    `__setattr__` would try to track the class as state.
    """
    object.__setattr__(instance, "__class__", cls)


def stand_in(layer, cls, **attributes):
    """An object of a class that shares all attributes of a layer but some.

    Its methods can be called as if the layer had these `attributes`. Those of
    the layer itself can't be changed for a call, as threads share them. Don't
    set anything on the object.
    """
    other = object.__new__(cls)
    other.__dict__.update(layer.__dict__, **attributes)
    return other


@contextlib.contextmanager
def unlocked(layer):
    """Lets a built layer take new variables, under its own path.

    Keras locks the state of a layer once it is built, and has no public way to
    add to it later. Keras's own `enable_lora` does the same.
    """
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        with keras.name_scope(layer.name, caller=layer):
            yield
    finally:
        if locked:
            layer._tracker.lock()


def forget(layer, *names):
    """Deletes attributes that hold variables or seeds of a built layer.

    Keras's own deletion of a variable isn't used: it doesn't stop tracking seed
    generators, and it collects garbage each time, which takes a second for
    every few of them.
    """
    with unlocked(layer):
        for name in names:
            value = getattr(layer, name, None)
            if isinstance(value, keras.Variable):
                layer._untrack_variable(value)
            layer._tracker.untrack(value)
            if hasattr(layer, name):
                super(keras.Layer, layer).__delattr__(name)


def track_for_torch(model):
    """Tells torch which variables came or went.

    On torch, every layer lists the parameters below it when it is built, and
    `zero_grad` and `to` use that list. No other backend has one.
    """
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def keeps_own_state(cls):
    """Class decorator: `_own_state()` is kept like a seed generator's state.

    It is in `variables`, which JAX passes to a step and torch moves to a
    device, and in TensorFlow's formats (`_trackable_children`), not in
    `weights`. No base class, as Keras rewrites the bases of a functional
    model's class.
    """

    def variables(self: keras.Layer) -> list[keras.Variable]:
        return [*self._own_state().values(), *super(cls, self).variables]

    def children(self, save_type="checkpoint", **kwargs):
        found = super(cls, self)._trackable_children(save_type, **kwargs)
        return {**found, **self._own_state()}

    cls.variables = property(variables)
    cls._trackable_children = children
    return cls


def loads_any_number(cls):
    """Class decorator: a layer may load with more weights than a plain one.

    Keras's linear layers check the number of their weights before they load.
    """

    def check(self, store):
        pass

    cls._check_load_own_variables = check
    return cls


def sublayers(layer):
    """The direct sublayers in order; Keras shows only those of models."""
    return layer._flatten_layers(include_self=False, recursive=False)


def submodels(model):
    """A model and all models within it."""
    return [x for x in model._flatten_layers() if isinstance(x, keras.Model)]


def own_weights(layer):
    """The weights of a layer itself, in the order of its file."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def trained_weights(layer):
    """The weights of a layer itself that are trained unless it is frozen."""
    return layer._trainable_variables


def statistics(layer):
    """The weights of a layer that have no gradient, such as moving averages."""
    return layer._non_trainable_variables


def saves_hdf5():
    """Whether Keras asks for a config to write it to an HDF5 file."""
    return bool(get_global_attribute("use_legacy_config", False))


def unpickle(archive):
    """The model in an archive that Keras pickled; its class revives it."""
    return keras.Model._unpickle_model(archive)


def operations(model):
    """The calls of operations that a functional model is made of, in order.

    Yields each operation with its arguments, in which `KerasTensor`s stand for
    tensors. Other models have none.
    """
    nodes = getattr(model, "_nodes_by_depth", {})
    for depth in sorted(nodes, reverse=True):
        for node in nodes[depth]:
            yield node.operation, node.arguments.args, node.arguments.kwargs


def graph_calls(model):
    """The `operations` of a model that are layers."""
    for operation, args, kwargs in operations(model):
        if isinstance(operation, keras.Layer):
            yield operation, args, kwargs


def graph_arrays(model):
    """The arrays in the graph of a functional model.

    Yields each operation with an array among its arguments, and that array;
    Keras shows neither. On torch, a view of a weight follows it and isn't one.
    """
    for operation, *arguments in operations(model):
        for x in keras.tree.flatten(arguments):
            is_array = keras.ops.is_tensor(x) or isinstance(x, np.ndarray)
            if is_array and getattr(x, "_base", None) is None:
                yield operation, x


def substituted(mapping, write):
    """A scope in which variables have other values, and writes go elsewhere.

    Args:
        mapping: pairs of a variable and the tensor that is read instead.
        write: function that is called with a variable and its new value.
    """

    class Substitution(keras.StatelessScope):
        def add_update(self, update):
            write(*update)

    return Substitution(mapping, initialize_variables=False)


# Quantization.


def uncover_quantize(model):
    """Sets aside the `quantize` that Keras gives to every instance.

    It wraps the method of the class that the model was made with, and hides
    that of a class that the model gets later.
    """
    wrapped = model.__dict__.pop("quantize", None)
    if wrapped is not None:
        model.__dict__["_keras_quantize"] = wrapped


def cover_quantize(model):
    """Undoes `uncover_quantize`."""
    wrapped = model.__dict__.pop("_keras_quantize", None)
    if wrapped is not None:
        model.__dict__["quantize"] = wrapped


def covered_quantize(model):
    """The method that `uncover_quantize` has set aside, or `None`."""
    return model.__dict__.get("_keras_quantize")


def settle_dtype_policies(model):
    """Gives each layer of a quantized, loaded model a policy of its own.

    KerasHub loads such a model with one `DTypePolicyMap` for all layers. Keras
    saves a quantized layer with the default of that map, which isn't quantized.
    So it can't save the model a second time (Keras 3.15).
    """
    for layer in model._flatten_layers():
        policies = layer.dtype_policy
        if isinstance(policies, keras.dtype_policies.DTypePolicyMap) and any(
            policy.quantization_mode for policy in policies.values()
        ):
            layer._dtype_policy = policies[layer.path or ""]


# Training.


@contextlib.contextmanager
def override_losses(model, losses):
    """In a `with` block, `model.losses` is this list, or what a scope collects.

    On JAX, Keras's step passes the losses of its own call on to the loss.
    """
    before, model._losses_override = model._losses_override, losses
    try:
        yield
    finally:
        model._losses_override = before


def put_back(model, state):
    """Makes the variables hold the state that a function of JAX was given.

    Keras takes the state out of them during a `fit`, and writes back that of an
    earlier batch. After a function that fails, it is missing or too old.
    """
    names = ["trainable", "non_trainable", "optimizer", "metrics"]
    if len(state) == 3:
        names.remove("optimizer")
    model._jax_state = {
        f"{name}_variables": values
        for name, values in zip(names, state, strict=False)
    }
    model._jax_state_synced = False
    model.jax_state_sync()


# The values of variables, which backends share and copy in their own ways.


def own_value(variable):
    """The value of a variable, not a copy, for `replace_value` to restore.

    On TensorFlow and JAX, assigning to the variable leaves this value alone. On
    torch, it would write into the value, so only `replace_value` may follow.
    """
    match keras.backend.backend():
        case "torch":
            return variable.value.data
        case "jax":
            return ops.convert_to_tensor(variable)
        case _:  # the tensor is still the variable
            return ops.copy(ops.convert_to_tensor(variable))


def value_for_another(variable):
    """The value of a variable, for another variable to `assign`.

    On JAX, it is copied by NumPy: variables that share a buffer both lose it
    when one is donated, and a copy by JAX would wait behind the initial values
    of a new model, and keep them in memory.
    """
    if keras.backend.backend() == "jax":
        return ops.convert_to_numpy(variable)
    return own_value(variable)


def replace_value(variable, value):
    """Makes a variable hold a value, which on torch isn't copied.

    For hundreds of variables, the copy is most of the time of an `assign`.
    """
    if keras.backend.backend() == "torch":
        parameter = variable.value
        value = ops.convert_to_tensor(value, variable.dtype).detach()
        if value.is_inference() and not parameter.is_inference():
            variable.assign(value)  # as the variable will be trained
        else:
            parameter.data = value.to(parameter.device)
    else:
        variable.assign(value)


def metric_directions(model):
    """The better direction of each metric of an evaluated model.

    Yields the name in `evaluate`, the name of the class, and `"max"`, `"min"`
    or `None` if Keras doesn't know. Keras has this for its callbacks.
    """
    losses = [model._loss_tracker]
    if model._compile_loss is not None:
        losses += model._compile_loss.metrics
    for metric in model.metrics:
        parts = {metric.name: metric}
        if metric is model._compile_metrics:
            parts = dict(zip(metric.result(), metric.metrics, strict=False))
        for name, part in parts.items():
            direction = getattr(part, "_direction", None)
            if any(part is loss for loss in losses):
                direction = "down"
            best = {"up": "max", "down": "min"}.get(direction)
            yield name, type(part).__name__, best


# Compiling.


def compile_arguments(model):
    """The arguments that a model was compiled with, as live objects."""
    return dict(model._compile_config.config)


def compile_state(model):
    """The objects that change if a model or its optimizer is replaced."""
    return model._compile_config, model.optimizer


@contextlib.contextmanager
def jit_compile(model, value):
    """In a `with` block, a model is as if compiled with a `jit_compile`."""
    before, model._jit_compile = model._jit_compile, value
    try:
        yield
    finally:
        model._jit_compile = before


def stamped_jit(compile_config):
    """A compile config with the backend that chose `jit_compile`.

    Keras writes the result of "auto": True on JAX, and False on torch, where
    compiling a step takes minutes.
    """
    if not compile_config:
        return compile_config
    return {**compile_config, "backend": keras.backend.backend()}


def settled_jit(compile_config):
    """Undoes `stamped_jit`; on another backend, Keras chooses again.

    Version 0.1.0 wrote no backend, so its True may have been JAX's choice.
    """
    config, backend = dict(compile_config), keras.backend.backend()
    stamp = config.pop("backend", None)
    if config.get("jit_compile") if stamp is None else stamp != backend:
        config["jit_compile"] = "auto"
    return config

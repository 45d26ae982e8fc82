"""The private parts of Keras that this package needs, each with its reason.

`tests/test_keras_private.py` touches every one of them and says what breaks
where Keras changes it.
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

    The layer keeps its identity, so every parent, graph node and compiled
    function that holds it sees the change and no weight is copied. Keras's own
    `__setattr__` would try to track the class as state.
    """
    object.__setattr__(instance, "__class__", cls)


def stand_in(layer, cls, **attributes):
    """An object of a class that shares all of a built layer but attributes.

    To call a method of it as if the layer had other ones: those of the layer
    itself are shared by the threads that call it. Nothing is to be set on it.
    """
    other = object.__new__(cls)
    other.__dict__.update(layer.__dict__, **attributes)
    return other


@contextlib.contextmanager
def unlocked(layer):
    """Lets a built layer take new variables, under its own path.

    Keras locks the state of a layer once it is built and has no public way
    to add to it later; its own `enable_lora` does the same.
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

    Past Keras's own deletion of a variable, which doesn't stop tracking seed
    generators and collects garbage each time: a second for every few of them.
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
    """Tells torch of the variables that came or went.

    On torch every layer lists the parameters below it when it is built;
    `zero_grad` and `to` work on that list. No other backend has one.
    """
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def keeps_own_state(cls):
    """Class decorator: `_own_state()` is kept as a seed generator's is.

    In `variables`, which JAX hands to a step and torch moves to a device, and
    in TensorFlow's own formats (`_trackable_children`), not in `weights`. No
    base class, as Keras rewrites the bases of a functional model's class.
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
    """Class decorator: a layer may have more weights than a file of its kind.

    The linear layers of Keras count those of a plain layer before they load.
    """

    def check(self, store):
        pass

    cls._check_load_own_variables = check
    return cls


def sublayers(layer):
    """Direct sublayers in order; Keras has this in public for models only."""
    return layer._flatten_layers(include_self=False, recursive=False)


def submodels(model):
    """A model and all models within it."""
    return [x for x in model._flatten_layers() if isinstance(x, keras.Model)]


def own_weights(layer):
    """The weights of a layer itself, in the order of its file."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def trained_weights(layer):
    """The weights of a layer itself that are trained if it isn't frozen."""
    return layer._trainable_variables


def statistics(layer):
    """The weights of a layer that no gradient trains: moving averages."""
    return layer._non_trainable_variables


def saves_hdf5():
    """Whether Keras asks for a config that it writes to an HDF5 file."""
    return bool(get_global_attribute("use_legacy_config", False))


def unpickle(archive):
    """The model in the archive that Keras pickles; revived by its class."""
    return keras.Model._unpickle_model(archive)


def operations(model):
    """The calls of operations that a functional model is made of, in order.

    Yields each with the arguments, in which `KerasTensor`s stand for tensors;
    none for another model.
    """
    nodes = getattr(model, "_nodes_by_depth", {})
    for depth in sorted(nodes, reverse=True):
        for node in nodes[depth]:
            yield node.operation, node.arguments.args, node.arguments.kwargs


def graph_calls(model):
    """The `operations` of a model that are layers; Keras shows these alone."""
    for operation, args, kwargs in operations(model):
        if isinstance(operation, keras.Layer):
            yield operation, args, kwargs


def graph_arrays(model):
    """The arrays that stand in the graph of a functional model.

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
        mapping: pairs of variable and the tensor that it is read as.
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
    that of a class it gets later.
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
    """What `uncover_quantize` has set aside, or `None`."""
    return model.__dict__.get("_keras_quantize")


def settle_dtype_policies(model):
    """Gives each layer of a quantized, loaded model a policy of its own.

    KerasHub loads such a model with one `DTypePolicyMap` for all layers. Keras
    saves a quantized layer by the default of that map, which isn't quantized,
    and so can't save the model a second time (Keras 3.15).
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
    """Within it, `model.losses` is this list, or what a scope collects.

    On JAX, Keras's step hands the losses of its own call over to the loss.
    """
    before, model._losses_override = model._losses_override, losses
    try:
        yield
    finally:
        model._losses_override = before


def put_back(model, state):
    """Has the variables hold the state that a function of JAX was given.

    Keras takes it out of them for the time of a `fit`, and writes back what a
    batch before has left: after a function that fails, nothing or too old.
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


# What variables hold, which backends share and copy in their own ways.


def own_value(variable):
    """What a variable holds, not a copy, for `replace_value` to bring back.

    On TensorFlow and JAX a variable that takes another value leaves this one
    alone. On torch it writes into it, so only `replace_value` may follow.
    """
    match keras.backend.backend():
        case "torch":
            return variable.value.data
        case "jax":
            return ops.convert_to_tensor(variable)
        case _:  # that is still the variable
            return ops.copy(ops.convert_to_tensor(variable))


def value_for_another(variable):
    """What a variable holds, for another variable to `assign`.

    On JAX by way of NumPy: two variables that share a buffer lose it together
    when one is donated, and a copy by JAX would wait behind the initial values
    of a new model, and keep them in memory.
    """
    if keras.backend.backend() == "jax":
        return ops.convert_to_numpy(variable)
    return own_value(variable)


def replace_value(variable, value):
    """Has a variable hold a value, which on torch it doesn't copy.

    Of hundreds of variables, that is most of the time of an `assign`.
    """
    if keras.backend.backend() == "torch":
        parameter = variable.value
        value = ops.convert_to_tensor(value, variable.dtype).detach()
        if value.is_inference() and not parameter.is_inference():
            variable.assign(value)  # to be trained
        else:
            parameter.data = value.to(parameter.device)
    else:
        variable.assign(value)


def metric_directions(model):
    """What is better of the metrics of a model that was evaluated.

    Yields the name in `evaluate`, the name of the class, and `"max"`, `"min"`
    or `None`, where Keras doesn't know. Keras has this for its callbacks.
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
    """What a model was compiled with, as live objects."""
    return dict(model._compile_config.config)


def compile_state(model):
    """What changes when a model is compiled again, or its optimizer is."""
    return model._compile_config, model.optimizer


@contextlib.contextmanager
def jit_compile(model, value):
    """Within it, a model is as if compiled with this `jit_compile`."""
    before, model._jit_compile = model._jit_compile, value
    try:
        yield
    finally:
        model._jit_compile = before


def stamped_jit(compile_config):
    """A compile config that names the backend which chose `jit_compile`.

    Keras writes what "auto" came to: True on JAX, and False on torch, where to
    compile a step takes minutes.
    """
    if not compile_config:
        return compile_config
    return {**compile_config, "backend": keras.backend.backend()}


def settled_jit(compile_config):
    """Undoes `stamped_jit`; another backend chooses anew.

    Version 0.1.0 wrote no backend: what it compiled may have been JAX's choice.
    """
    config, backend = dict(compile_config), keras.backend.backend()
    stamp = config.pop("backend", None)
    if config.get("jit_compile") if stamp is None else stamp != backend:
        config["jit_compile"] = "auto"
    return config

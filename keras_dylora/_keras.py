"""The private parts of Keras that this package needs, each with its reason.

`tests/test_keras_private.py` touches every one of them and says what breaks
where Keras changes it.
"""

import collections
import contextlib

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.global_state import get_global_attribute

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


ACCUMULATOR = "gradient_accumulator"


def slot_prefix(variable):
    """How the names of what an optimizer keeps for a variable begin."""
    return variable.path.replace("/", "_") + "_"


def optimizer_slots(optimizer, accumulators=False):
    """Pairs of optimizer variable and the model variable it is kept for.

    Keras names them `{path of the variable}_{name}` and has no other way to
    tell. Where several variables share a path, theirs are in the same order.
    Gradient accumulators, which belong to the coming update, are left out
    unless they are asked for.
    """
    owners = collections.defaultdict(list)
    for variable in built_for(optimizer):
        owners[slot_prefix(variable)].append(variable)
    seen = collections.Counter()
    for slot in optimizer.variables:
        if slot.name.endswith(ACCUMULATOR) and not accumulators:
            continue
        prefix = slot.name
        while prefix and prefix not in owners:  # the longest that is one
            prefix = prefix[: prefix.rfind("_", 0, -1) + 1]
        if prefix:
            same_path = owners[prefix]
            yield slot, same_path[seen[slot.name] % len(same_path)]
            seen[slot.name] += 1


def optimizer_parts(optimizer):
    """The optimizers that update weights: those in one, or just this."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "optimizers", [inner])


def built_for(optimizer):
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def factored_slots(optimizer):
    """What `Adafactor` keeps for each variable: means by row and by column.

    They have the name of the variable alone, without its path.
    """
    means = (getattr(optimizer, name, ()) for name in ("_r", "_c"))
    return zip(built_for(optimizer), *means, strict=False)


def optimizer_state(optimizer):
    """The variables of an optimizer without its learning rate.

    The user's own setting, which Keras has among them.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rates = {id(each._learning_rate) for each in (optimizer, inner)}
    return [v for v in optimizer.variables if id(v) not in rates]


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


def fresh_optimizer(optimizer):
    """The same optimizer without its state.

    A learning-rate schedule is handed over as it is: Keras would serialize it,
    but trains with one that has no `get_config`. What is excluded from weight
    decay isn't in the config either.
    """
    if hasattr(optimizer, "inner_optimizer"):
        return type(optimizer)(
            fresh_optimizer(optimizer.inner_optimizer),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable):
        config = optimizer.get_config()
    else:
        object.__setattr__(optimizer, "_learning_rate", None)
        try:
            config = optimizer.get_config() | {"learning_rate": rate}
        finally:
            object.__setattr__(optimizer, "_learning_rate", rate)
    fresh = type(optimizer).from_config(config)
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(optimizer, name):
            object.__setattr__(fresh, name, getattr(optimizer, name))
    return fresh


def built_anew(optimizer):
    """The `fresh_optimizer` of one, built for the same variables.

    Keras doesn't tell them; those that a model trains may be others by now.
    """
    fresh = fresh_optimizer(optimizer)
    fresh.build(built_for(optimizer))
    return fresh


def public_optimizers(compile_config):
    """A compile config in which torch's own optimizers have public names.

    On torch, Keras saves its optimizers under private modules of that
    backend, and no other backend can load them (Keras 3.15).
    """
    if isinstance(compile_config, dict):
        config = {k: public_optimizers(v) for k, v in compile_config.items()}
        if str(config.get("module")).startswith(_TORCH_OPTIMIZERS):
            config["module"] = "keras.optimizers"
            config["registered_name"] = None
        return config
    return compile_config


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


_TORCH_OPTIMIZERS = "keras.src.backend.torch.optimizers"

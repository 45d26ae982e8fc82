"""How Keras sees a live model as a plain one for a while."""

import contextlib

import keras

from keras_dylora import _keras
from keras_dylora.live.recompile import uncompiled
from keras_dylora.live.saving import with_whole_configs


def flags(tree):
    """The model, its layers and its variables, each with its `trainable`."""
    # Layers first, as the flag of a layer also sets those of its variables.
    items = [*tree.every.values(), *tree.model.variables]
    return [(x, x.trainable) for x in items]


def restore(flags):
    """Sets the flags that `flags` returned."""
    for item, trainable in flags:
        if isinstance(item, keras.Model):
            # Not by the setter of a `DyLoRAModel`, which also sets the layers.
            keras.Layer.trainable.fset(item, trainable)
        else:
            item.trainable = trainable


@contextlib.contextmanager
def as_original(instances):
    """Gives layers and models their original classes within a `with` block.

    The variables of the adapters stay where they are.
    """
    classes = [(instance, type(instance)) for instance in instances]
    try:
        for instance, cls in classes:
            _keras.set_class(instance, cls.original_class)
        yield
    finally:
        for instance, cls in classes:
            _keras.set_class(instance, cls)


@contextlib.contextmanager
def _as_float(layers):
    """In a `with` block, configs describe quantized layers as float ones."""
    changed = []
    try:
        for layer in layers:
            if layer.quantization_mode is None:
                continue
            policy = layer.dtype_policy
            changed.append((layer, policy, layer.quantization_config))
            computes, stores = policy.compute_dtype, policy.variable_dtype
            layer.dtype_policy = (
                stores if computes == stores else f"mixed_{computes}"
            )
            layer.quantization_config = None
        yield
    finally:
        for layer, policy, config in changed:
            layer.dtype_policy = policy
            layer.quantization_config = config


@contextlib.contextmanager
def as_plain(tree, whole=False):
    """Makes Keras describe a model without DyLoRA, within a `with` block.

    The model is as it was before `enable_dylora`, with its classes and its
    `trainable` flags, but isn't compiled.

    Args:
        tree: `Tree` of the `DyLoRAModel`.
        whole: bool. Whether hand-built layers, and models within the model, are
            plain too, and quantized layers are the float layers that they were.
            Defaults to `False`.
    """
    model, adaptation = tree.model, tree.model._dylora
    instances, layers = [model, *adaptation.upgraded], []
    table = [adaptation.table] if adaptation.tokens else []
    if whole:
        layers = list(adaptation.layers.values())
        models = _keras.submodels(model)
        instances = [x for x in models if hasattr(x, "original_class")]
        instances += layers
    instances += table
    now = flags(tree) if adaptation.before else []
    try:
        with (
            _as_float(layers),
            uncompiled(model),
            as_original(instances),
            with_whole_configs(model),
        ):
            restore(adaptation.before)
            yield
    finally:
        restore(now)

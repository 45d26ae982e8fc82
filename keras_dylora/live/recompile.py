"""Compiling a model as another one, and anew after a change."""

import contextlib
import inspect

import keras

from keras_dylora import _keras


def compile_as(model, other):
    """Compiles a model as a live one is, with an optimizer of its own.

    Nothing is serialized, so that a loss function needn't be registered.
    """
    arguments = _keras.compile_arguments(other)
    optimizer = other.optimizer
    arguments["optimizer"] = optimizer and _keras.optimizers.fresh_optimizer(
        optimizer
    )
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(
            lambda x: _fresh(x) if isinstance(x, keras.metrics.Metric) else x,
            arguments[name],
        )
    if not _compile(model, arguments, optimizer and optimizer.built):
        keras.Model.compile_from_config(model, other.get_compile_config())
    if hasattr(other, "sampler"):  # of a KerasHub `CausalLM`
        model.sampler = _fresh(other.sampler)


def _fresh(stateful):
    return type(stateful).from_config(stateful.get_config())


def compile_from(model, config):
    """Compiles a model as the one whose `get_compile_config` this is.

    Keras leaves a model with a `compile` of its own uncompiled, and so every
    KerasHub task; its `fit` would go on with another optimizer.
    """
    config = _keras.settled_jit(config)
    build_optimizer = config.pop("optimizer_built", True)
    try:
        arguments = keras.saving.deserialize_keras_object(config)
        compiled = _compile(model, arguments, build_optimizer)
    except Exception:
        if not _compiles_itself(model):
            raise
        compiled = False
    if not compiled:
        keras.Model.compile_from_config(model, config)


def _compile(model, arguments, build_optimizer):
    """Returns whether the `compile` of the model takes the arguments.

    One of a class's own may take others, or hand them on with its own. Keras
    leaves such a model uncompiled then, and warns.
    """
    try:
        inspect.signature(model.compile).bind(**arguments)
        model.compile(**arguments)
    except Exception:
        if not _compiles_itself(model):
            raise
        return False
    if model.optimizer is not None and model.built and build_optimizer:
        model.optimizer.build(model.trainable_variables)
    return True


def _compiles_itself(model):
    return type(model).compile is not keras.Model.compile


@contextlib.contextmanager
def uncompiled(model):
    """Within it, a model, and each in it, is described without what it was
    compiled with.

    That may hold functions and schedules that can't be serialized.
    """
    compiled = [each for each in _keras.submodels(model) if each.compiled]
    try:
        for each in compiled:
            each.compiled = False
        yield
    finally:
        for each in compiled:
            each.compiled = True


def reset_functions(model):
    """Drops the compiled functions of the model, and of those in it, as they
    were."""
    for each in _keras.submodels(model):
        for name in ("train", "test", "predict", "generate"):
            if getattr(each, f"{name}_function", None) is not None:
                setattr(each, f"{name}_function", None)


def new_optimizer(model):
    """The model's optimizer without its state, or `None` if it has none.

    Made before a change of the model: an optimizer may not be able to.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return None
    return _keras.optimizers.fresh_optimizer(optimizer)


def reset_compiled(model, optimizer):
    """Drops functions and optimizer state of the model as it was.

    `optimizer` is what `new_optimizer` returned before the change.
    """
    reset_functions(model)
    if optimizer is not None:
        model.optimizer = optimizer

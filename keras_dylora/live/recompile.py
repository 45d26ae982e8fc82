"""Compiling a model like another one, or again after a change."""

import contextlib
import inspect

import keras

from keras_dylora import _keras


def compile_as(model, other):
    """Compiles a model as a live one is, with an optimizer of its own.

    Nothing is serialized, so a loss function needn't be registered.
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
    if hasattr(other, "sampler"):  # a KerasHub `CausalLM`
        model.sampler = _fresh(other.sampler)


def _fresh(stateful):
    return type(stateful).from_config(stateful.get_config())


def compile_from(model, config):
    """Compiles a model with the `get_compile_config` of another one.

    Keras doesn't compile a model whose class has its own `compile`, which
    includes every KerasHub task. Its `fit` would continue with another
    optimizer.
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
    """Compiles a model; returns whether its `compile` takes the arguments.

    A class's own `compile` may take other arguments, or pass them on with its
    own. Keras then leaves the model uncompiled, and warns.
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
    """Describes a model and the models in it as uncompiled, in a `with` block.

    What they were compiled with may hold functions and schedules that can't be
    serialized.
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
    """Drops the compiled functions of a model and of the models in it."""
    for each in _keras.submodels(model):
        for name in ("train", "test", "predict", "generate", "own"):
            if getattr(each, f"{name}_function", None) is not None:
                setattr(each, f"{name}_function", None)


def new_optimizer(model):
    """The model's optimizer without its state, or `None` if it has none.

    It is made before a change of the model, as making it may fail.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return None
    return _keras.optimizers.fresh_optimizer(optimizer)


def reset_compiled(model, optimizer):
    """Drops the compiled functions of a model, and replaces its optimizer.

    `optimizer` is what `new_optimizer` returned before the change.
    """
    reset_functions(model)
    if optimizer is not None:
        model.optimizer = optimizer

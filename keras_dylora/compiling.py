"""Compiling a model as another one, and anew after a change."""

import inspect

import keras


def compile_like(model, config):
    """Compiles a model as the one whose `get_compile_config` this is.

    Keras leaves a model with a `compile` of its own uncompiled, and so every
    KerasHub task; its `fit` would go on with another optimizer.
    """
    config = dict(config)
    build_optimizer = config.pop("optimizer_built", True)
    arguments = keras.saving.deserialize_keras_object(config)
    try:
        inspect.signature(model.compile).bind(**arguments)
    except TypeError:
        keras.Model.compile_from_config(model, config)
        return
    model.compile(**arguments)
    if model.optimizer is not None and model.built and build_optimizer:
        model.optimizer.build(model.trainable_variables)


def reset_functions(model):
    """Drops the compiled functions of the model as it was."""
    for name in ("train", "test", "predict", "generate"):
        if getattr(model, f"{name}_function", None) is not None:
            setattr(model, f"{name}_function", None)


def reset_compiled(model):
    """Drops functions and optimizer state of the model as it was."""
    reset_functions(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        model.optimizer = type(optimizer).from_config(optimizer.get_config())

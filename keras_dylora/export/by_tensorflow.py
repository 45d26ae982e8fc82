"""Export by a child process, which rebuilds the model under TensorFlow.

It is needed if the running backend can't write an artifact, or if the model
mustn't be changed to write one.
"""

import builtins
import importlib.util
import json
import os
import pathlib
import sys
import tempfile

import keras

from keras_dylora.export import process
from keras_dylora.live.recompile import uncompiled

MODEL_NAME = "model"
REQUEST_NAME = "request.json"
STEP = "keras_dylora: step"  # the line that the child prints after each step


def write(model, folder, plan, on_step):
    """Writes the artifacts of a plan from any backend.

    Calls `on_step` after each of the `plan.steps`.

    Raises:
        ValueError: if TensorFlow can't rebuild or run the model.
        OSError: if the artifact can't be written.
        RuntimeError: if the process doesn't run to its end.
    """
    sampler = None
    if plan.generate:
        sampler = keras.saving.serialize_keras_object(model.sampler)
    modules = custom_modules(model, sampler)
    with tempfile.TemporaryDirectory(prefix="keras_dylora-") as temporary:
        temporary = pathlib.Path(temporary)
        with uncompiled(model):
            # Not zipped: Keras holds two copies of a zipped model while it
            # writes and one while it reads. A directory is handled layer by
            # layer.
            model.save(temporary / MODEL_NAME, zipped=False)
        request = {
            "folder": str(folder),
            "plan": plan.to_json(),
            "modules": modules,
            "sampler": sampler,
        }
        (temporary / REQUEST_NAME).write_text(json.dumps(request))
        environment = {
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join(x or os.getcwd() for x in sys.path),
        }
        try:
            process.run(
                [
                    "-m",
                    "keras_dylora.export.tensorflow.child",
                    str(temporary),
                ],
                temporary,
                environment,
                lambda line: on_step() if line == STEP else None,
            )
        except process.ChildError as error:
            raise _readable(error, model) from error


def _readable(error, model):
    """The exception that tells the user what to do about an error."""
    cls = getattr(builtins, error.kind, ValueError)
    if issubclass(cls, OSError):
        return OSError(str(error))
    if error.kind.startswith("exit code"):
        return RuntimeError(
            "The process that writes the artifact under TensorFlow must run "
            f"to its end. Received: {error}"
        )
    return ValueError(
        "TensorFlow must be able to rebuild and run the model: a custom layer "
        "computes with `keras.ops` and is registered with "
        "`keras.saving.register_keras_serializable` in a module that can be "
        f"imported. Received: {model.name}, which fails with {error}"
    )


def custom_modules(model, sampler=None):
    """The modules that define the classes and functions of a model.

    This includes those of its serialized `sampler`. Raises a `ValueError` if
    another process couldn't import one of them.
    """
    with uncompiled(model):
        config = keras.saving.serialize_keras_object(model)
    found = {}
    for item in _serialized([config, sampler]):
        is_function = item["class_name"] == "function"
        name = item["config" if is_function else "registered_name"]
        source = keras.saving.get_registered_object(name)
        module = item["module"] if source is None else source.__module__
        own = str(module).partition(".")[0] in ("builtins", "keras")
        if source is None and own:
            continue
        if source is None or not _can_import(module):
            inner = item["config"]
            layer = inner.get("name") if isinstance(inner, dict) else None
            raise ValueError(
                "Outside of the TensorFlow backend, the model is rebuilt in a "
                "process of its own, which must find its custom classes and "
                "functions. Register them with "
                "`keras.saving.register_keras_serializable` in a module that "
                "can be imported, or export under KERAS_BACKEND=tensorflow. "
                f"Received: {name!r}{f' (layer {layer!r})' if layer else ''}, "
                f"defined in {module!r}"
            )
        found[module] = None
    return list(found)


def _serialized(config):
    """The parts of a config that name a custom class or function."""
    if isinstance(config, dict):
        if config.get("registered_name") is not None:
            yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from _serialized(item)


def _can_import(module):
    if not module or module == "__main__":
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False

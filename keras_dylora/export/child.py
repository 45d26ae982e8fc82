"""Rebuilds a model under TensorFlow in a child process and exports it there.

The way out where the running backend can't write an artifact itself.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import traceback

import keras

from keras_dylora.export import process
from keras_dylora.export.plan import Plan

MODEL_NAME = "model.keras"
REQUEST_NAME = "request.json"


def write(model, folder, plan, on_step):
    """Writes the artifacts of a plan from any backend.

    Args:
        model: an enabled model.
        folder: `pathlib.Path`. An empty directory.
        plan: `Plan`.
        on_step: callable. Called after each of the `plan.steps`.

    Raises:
        ValueError: if TensorFlow can't rebuild or run the model.
        RuntimeError: if the process fails otherwise.
    """
    modules = custom_modules(model)
    with tempfile.TemporaryDirectory(prefix="keras_dylora-") as temporary:
        temporary = pathlib.Path(temporary)
        model.save(temporary / MODEL_NAME)
        sampler = None
        if plan.generate:
            sampler = keras.saving.serialize_keras_object(model.sampler)
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
                ["-m", "keras_dylora.export.child", str(temporary)],
                temporary,
                environment,
                on_step,
            )
        except process.ChildError as error:
            raise _readable(error, model) from error


def _readable(error, model):
    """The exception that tells the user what to do."""
    if error.kind.startswith("exit code") or error.kind.endswith("OSError"):
        return RuntimeError(
            "The process that writes the artifact under TensorFlow failed. "
            f"Received: {error}"
        )
    return ValueError(
        "TensorFlow must be able to rebuild the model: custom classes are "
        "registered with `keras.saving.register_keras_serializable` in a "
        "module that can be imported, and compute with `keras.ops`. "
        f"Received: {model.name}, which fails with {error}"
    )


def custom_modules(model):
    """The modules that define the classes and functions of a model.

    Raises:
        ValueError: if one of them is where no other process can import it.
    """
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    found = {}
    for item in _registered(config):
        name = item["registered_name"]
        source = keras.saving.get_registered_object(name)
        module = getattr(source, "__module__", "")
        if not _can_import(module):
            inner = item["config"]
            layer = inner.get("name") if isinstance(inner, dict) else None
            raise ValueError(
                "Outside of the TensorFlow backend, the model is rebuilt in a "
                "process of its own, which must find its custom classes and "
                "functions. Register them with "
                "`keras.saving.register_keras_serializable` in a module that "
                "can be imported, or export under KERAS_BACKEND=tensorflow. "
                f"Received: {item['class_name']} {name!r}"
                f"{f' (layer {layer!r})' if layer else ''}, defined in "
                f"{module or item['module']!r}"
            )
        found[module] = None
    return list(found)


def _registered(config):
    """The parts of a config that aren't Keras's own."""
    if isinstance(config, dict):
        if config.get("registered_name") is not None:
            yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from _registered(item)


def _can_import(module):
    if not module or module == "__main__":
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def main(folder):
    """What the child process does."""
    import tensorflow as tf

    from keras_dylora.export import artifacts

    # Tracing needs no GPU, and the parent may hold all of its memory.
    tf.config.set_visible_devices([], "GPU")
    request = json.loads((folder / REQUEST_NAME).read_text())
    for name in request["modules"]:
        importlib.import_module(name)
    # The file is the caller's own model, not one from elsewhere.
    model = keras.saving.load_model(
        folder / MODEL_NAME, compile=False, safe_mode=False
    )
    if request["sampler"]:
        model.sampler = keras.saving.deserialize_keras_object(
            request["sampler"]
        )
    plan = Plan.from_json(request["plan"])
    for _ in artifacts.write(model, pathlib.Path(request["folder"]), plan):
        print("step", flush=True)


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    try:
        main(target)
    except Exception as error:
        text = {"kind": type(error).__name__, "message": str(error)}
        with contextlib.suppress(OSError):
            (target / process.ERROR_NAME).write_text(json.dumps(text))
        traceback.print_exc()
        sys.exit(1)

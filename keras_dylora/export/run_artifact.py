"""Runs an artifact as a server would: in a process without keras_dylora.

This is a script, not a module of the package: it must not import keras_dylora.
"""

import importlib
import json
import pathlib
import sys
import traceback

import numpy as np


def main(folder):
    request = json.loads((folder / "request.json").read_text())
    for name in request["blocked"]:
        sys.modules[name] = None  # from now on, its import raises an error
    for name in request["imports"]:
        importlib.import_module(name)
    formats = {"saved_model": saved_model, "onnx": onnx, "litert": litert}
    run = formats[request["format"]]
    for call in request["calls"]:
        name = call["name"]
        with np.load(folder / f"{name}.inputs.npz") as file:
            inputs = dict(file)
        outputs = run(call["artifact"], call["signature"], inputs)
        np.savez(folder / f"{name}.outputs.npz", **outputs)


loaded: dict = {}


def saved_model(path, signature, inputs):
    import tensorflow as tf

    if path not in loaded:
        tf.config.set_visible_devices([], "GPU")
        loaded.clear()  # one artifact in memory at a time
        loaded[path] = tf.saved_model.load(path)
    function = loaded[path].signatures[signature]
    outputs = function(**{k: tf.constant(v) for k, v in inputs.items()})
    return {
        k: tf.cast(v, tf.float32) if v.dtype == tf.bfloat16 else v
        for k, v in outputs.items()
    }


def onnx(path, signature, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def litert(path, signature, inputs):
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(path)
    return interpreter.get_signature_runner(signature)(**inputs)


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    try:
        main(target)
    except Exception as error:
        text = {"kind": type(error).__name__, "message": str(error)}
        (target / "error.json").write_text(json.dumps(text))
        traceback.print_exc()
        sys.exit(1)

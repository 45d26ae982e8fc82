"""The child process of `by_tensorflow`: a `python -m` under TensorFlow."""

import contextlib
import importlib
import json
import pathlib
import sys
import traceback

import keras
import tensorflow as tf

from keras_dylora.export import by_tensorflow, process
from keras_dylora.export.plan import Plan
from keras_dylora.export.tensorflow import writers


def main(folder):
    # Tracing needs no GPU, and the parent may hold all of its memory.
    tf.config.set_visible_devices([], "GPU")
    request = json.loads((folder / by_tensorflow.REQUEST_NAME).read_text())
    for name in request["modules"]:
        importlib.import_module(name)
    # Safe: the file holds the caller's own model.
    model = keras.saving.load_model(
        folder / by_tensorflow.MODEL_NAME, compile=False, safe_mode=False
    )
    if request["sampler"]:
        model.sampler = keras.saving.deserialize_keras_object(
            request["sampler"]
        )
    plan = Plan.from_json(request["plan"])
    for _ in writers.write(model, pathlib.Path(request["folder"]), plan):
        print(by_tensorflow.STEP, flush=True)


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

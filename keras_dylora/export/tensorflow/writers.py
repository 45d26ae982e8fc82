"""Writes the artifacts of a plan; needs the TensorFlow backend."""

from keras_dylora.export.tensorflow import onnx_litert, saved_model


def write(model, folder, plan):
    """Writes the artifacts of a plan.

    Args:
        model: an enabled model, on the TensorFlow backend.
        folder: `pathlib.Path`. An empty directory.
        plan: `Plan`.

    Yields:
        `None` after each of the `plan.steps` pieces of work.
    """
    module = saved_model if plan.format == "saved_model" else onnx_litert
    yield from module.write(model, folder, plan)

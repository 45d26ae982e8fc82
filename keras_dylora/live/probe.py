"""Probes: the outputs of two models for the same few inputs, compared."""

import keras
import numpy as np
from keras import ops

from keras_dylora.layers.tree import Tree
from keras_dylora.live.inputs import Inputs

# The largest difference for outputs up to 1, by the coarsest number format in
# use: of parameters, of the computation, or of the matrix units of a GPU or
# TPU.
TOLERANCES = {
    "float32": 1e-5,
    "accelerator": 1e-2,
    "float16": 1e-2,
    "bfloat16": 5e-2,
    "quantized": 5e-2,
}


def tolerance(model, dtype=None):
    """The largest difference that is allowed for a copy of a model.

    `dtype` is that of the copy's parameters.
    """
    layers = Tree(model).every.values()
    found = {"float32", dtype or "float32"}
    found |= {x.compute_dtype for x in layers} & set(TOLERANCES)
    if any(getattr(x, "quantization_mode", None) for x in layers):
        found.add("quantized")
    # GPUs and TPUs may multiply in a shorter format, but an artifact is run on
    # the CPU.
    device = model.weights[0].value.device
    if "cpu" not in str(device).lower():
        found.add("accelerator")
    return max(TOLERANCES[x] for x in found)


def compare(expected, received, tolerance):
    """The largest difference, and the largest that is allowed."""
    if expected.shape != received.shape:
        return np.inf, 0.0
    if expected.dtype.kind != "f":
        return float(np.sum(expected != received)), 0.0
    expected = np.asarray(expected, "float64")
    with np.errstate(invalid="ignore"):
        difference = np.abs(expected - np.asarray(received, "float64"))
    # Equal infinities don't differ.
    difference = np.where(expected == received, 0.0, difference)
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    return float(difference.max(initial=0.0)), tolerance * scale


def outputs(model, inputs, tensors):
    """The outputs of a model as a dict of arrays, for a dict of arrays."""
    tensors = {k: ops.convert_to_tensor(v) for k, v in tensors.items()}
    return arrays(model(inputs.pack(tensors), training=False))


def arrays(outputs):
    """A dict of arrays, from a dict or another structure of tensors."""
    if not isinstance(outputs, dict):
        flat = keras.tree.flatten(outputs)
        outputs = {f"output_{i}": x for i, x in enumerate(flat)}
    return {k: _array(x) for k, x in outputs.items()}


def _array(tensor):
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = ops.cast(tensor, "float32")
    return ops.convert_to_numpy(tensor)


def check_merged(model, merged, ranks):
    """Raises a `RuntimeError` if a merged model differs from the live one.

    The models are compared on one made-up example, which changes no state of
    either. A model passes if it can't be called on it, or if its outputs are
    random.
    """
    with model._dylora.at(ranks), keras.StatelessScope():
        try:
            inputs = Inputs.of(model)
            tensors = inputs.samples(model, 1)
            live = outputs(model, inputs, tensors)
        except Exception:  # the model doesn't take these inputs
            return
        # A merged kernel is rounded once more, or isn't quantized any more.
        most = max(1e-4, 2 * tolerance(model))
        found = outputs(merged, inputs, tensors)
        for name, expected in live.items():
            difference, limit = compare(expected, found[name], most)
            if difference <= limit:
                continue
            again = outputs(model, inputs, tensors)[name]
            if np.array_equal(again, expected):
                raise RuntimeError(
                    "A merged model must compute what the live one does. If "
                    "another layer reads an adapted kernel (tied weights), "
                    "leave its layer out of `target_layers`. Received: a "
                    f"difference of {difference:.3g} in {name!r} of "
                    f"{model.name}, above {limit:.3g}"
                )

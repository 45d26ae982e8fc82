"""ONNX and LiteRT files: the merged SavedModel of each rank, converted.

They need the TensorFlow backend. ONNX also needs tf2onnx.
"""

import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow as tf

from keras_dylora.export.plan import FILE_NAMES
from keras_dylora.export.tensorflow import saved_model


def write(model, folder, plan):
    """Writes `rank_1/model.onnx` and so on, like `writers.write`."""
    convert = {"onnx": _to_onnx, "litert": _to_litert}[plan.format]
    with tempfile.TemporaryDirectory(prefix="keras_dylora-") as temporary:
        steps = saved_model.write(model, pathlib.Path(temporary), plan)
        for served, _ in zip(plan.ranks, steps, strict=True):
            source = pathlib.Path(temporary, served.name)
            target = folder / served.name
            target.mkdir()
            convert(source, target / FILE_NAMES[plan.format], plan)
            shutil.rmtree(source)
            yield


def _to_litert(source, target, plan):
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(source), signature_keys=["serve"]
    )
    target.write_bytes(converter.convert())


def _to_onnx(source, target, plan):
    import onnx
    import tf2onnx

    artifact = tf.saved_model.load(str(source))
    serve = artifact.signatures["serve"]
    held = [
        x if x.dtype == tf.resource else x.numpy()
        for x in serve.captured_inputs
    ]
    specs = [
        tf.TensorSpec(x.shape, x.dtype, name=x.name) for x in plan.inputs.specs
    ]

    @tf.function(input_signature=specs, autograph=False)
    def function(*tensors):
        names = [spec.name for spec in specs]
        # tf2onnx turns tensors that a function holds into inputs, such as a
        # table of positions.
        serve.set_external_captures([tf.convert_to_tensor(x) for x in held])
        return serve(**dict(zip(names, tensors, strict=True)))

    tf2onnx.convert.from_function(
        function,
        specs,
        custom_op_handlers={"Erfc": (_erfc, [])},
        output_path=str(target),
    )
    # tf2onnx leaves operations that it doesn't know unchanged.
    onnx.checker.check_model(str(target))


def _erfc(graph, node, name, arguments):
    """`1 - erf(x)`, which the exact GELU uses and tf2onnx doesn't know."""
    (output,) = node.output
    shape, dtype = graph.get_shape(output), graph.get_dtype(output)
    graph.remove_node(name)
    one = graph.make_const(f"{name}/one", np.ones((), "float32"))
    erf = graph.make_node("Erf", node.input)
    graph.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        name=name,
        outputs=[output],
        shapes=[shape],
        dtypes=[dtype],
    )

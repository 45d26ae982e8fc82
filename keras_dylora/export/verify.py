"""Compares artifacts with the live model at each rank, in a fresh process."""

import dataclasses
import json
import pathlib
import tempfile

import keras
import numpy as np
from keras import ops

from keras_dylora.export import process
from keras_dylora.export.plan import FILE_NAMES
from keras_dylora.live import probe

MAX_BATCH = 8  # the outputs at every rank are held at once
TEXTS = ["", "A fine film, and a short one.", "two words", "🙂 emoji"]


@dataclasses.dataclass
class _Call:
    """A call of a signature, and the live model's outputs for it."""

    artifact: str
    signature: str
    inputs: dict
    expected: dict


def verify(model, folder, plan):
    """Runs every artifact and compares its outputs with the live model's.

    Returns:
        A dict of signature or path to the largest difference.

    Raises:
        RuntimeError: if an output differs or the artifact doesn't run.
    """
    tolerance = probe.tolerance(model, plan.dtype)
    # Rounding may change the likeliest token, and with it all that follow.
    exact = tolerance == probe.TOLERANCES["float32"]
    active = model.active_adapter
    try:
        calls = list(_calls(model, folder, plan, exact))
    finally:
        model.set_adapter(active)
    differences = {}
    for call, outputs in zip(calls, _run(calls, plan), strict=True):
        name = str(pathlib.Path(call.artifact).relative_to(folder))
        name = f"{name}/{call.signature}".removeprefix("./")
        for key, expected in call.expected.items():
            difference, limit = probe.compare(expected, outputs[key], tolerance)
            if not difference <= limit:
                raise RuntimeError(
                    "The artifact must give the live model's outputs; nothing "
                    f"was written. Received: a difference of {difference:.3g} "
                    f"in {key!r} of {name}, above {limit:.3g}"
                )
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences


def _run(calls, plan):
    """The outputs of the calls, from a process without Keras."""
    request = {"format": plan.format, "calls": []}
    request["blocked"] = ["keras_dylora", "keras_hub"]
    # tensorflow-text has the tokenizer's operations, but imports Keras.
    request["imports"] = ["tensorflow_text"] if plan.text else []
    if not plan.text:
        request["blocked"].append("keras")
    with tempfile.TemporaryDirectory(prefix="keras_dylora-") as temporary:
        temporary = pathlib.Path(temporary)
        for i, call in enumerate(calls):
            np.savez(temporary / f"{i}.inputs.npz", **call.inputs)
            request["calls"].append(
                {
                    "name": str(i),
                    "artifact": call.artifact,
                    "signature": call.signature,
                }
            )
        (temporary / "request.json").write_text(json.dumps(request))
        script = pathlib.Path(__file__).with_name("run_artifact.py")
        try:
            # -P: modules in this folder mustn't hide others of the same name.
            process.run(["-P", str(script), str(temporary)], temporary)
        except process.ChildError as error:
            rule = (
                f"The artifact of format {plan.format!r} must run on the "
                "model's inputs"
            )
            if error.kind == "ModuleNotFoundError":
                rule = f"The artifact must run without {request['blocked']}"
            raise RuntimeError(
                f"{rule}; nothing was written. Received: {error}"
            ) from error
        for i in range(len(calls)):
            with np.load(temporary / f"{i}.outputs.npz") as file:
                yield dict(file)


def _calls(model, folder, plan, exact):
    """The calls to make, with the live model's outputs.

    Random tokens of a sampler can't be compared across backends.
    """
    batch = min(max(2, len(plan.choices)), MAX_BATCH)
    samples = {"serve": (plan.inputs.samples(model, batch), {})}
    if plan.text:
        texts = np.array([TEXTS[i % len(TEXTS)] for i in range(batch)])
        samples["serve_text"] = _tokens(model, texts), {"text": texts}
    if plan.generate and exact and not model.sampler.variables:
        never = {"end_token_id": np.array(-1, "int32")}
        samples["generate"] = _prompts(samples["serve"][0]), never
    for name, (tensors, extra) in samples.items():
        live = {
            (adapter, served.value): _live(
                model, plan, name, tensors, adapter, served
            )
            for adapter, served in plan.choices
        }
        given = extra if name == "serve_text" else {**tensors, **extra}
        for adapter, served in plan.choices:
            expected = live[adapter, served.value]
            if plan.layout == "merged":
                file = FILE_NAMES.get(plan.format, "")
                path = str(folder / served.name / file)
                yield _Call(path, name, given, expected)
            elif name != "serve_text":
                fixed = f"{name}_{served.name}".removeprefix("serve_")
                inputs = {**given, **_chosen(adapter)}
                yield _Call(str(folder), fixed, inputs, expected)
        if plan.layout == "shared":
            choices = list(live)
            rows = [choices[i * len(choices) // batch] for i in range(batch)]
            mixed = {
                key: np.stack([live[x][key][i] for i, x in enumerate(rows)])
                for key in live[rows[0]]
            }
            names, values = zip(*rows, strict=True)
            for adapter, rank, expected in (
                (names, values, mixed),
                (names[-1], values[-1], live[rows[-1]]),
            ):
                inputs = {"rank": np.array(rank, "int32"), **given}
                inputs |= _chosen(adapter if plan.adapters else None)
                yield _Call(str(folder), name, inputs, expected)


def _chosen(adapter):
    """The input that names an adapter, if there are adapters."""
    return {} if adapter is None else {"adapter": np.array(adapter)}


def _prompts(tensors):
    """The first half of each sample, as a prompt to continue."""
    ids, mask = tensors["token_ids"], tensors["padding_mask"]
    first = np.arange(ids.shape[1]) < ids.shape[1] // 2
    return {
        "token_ids": ids * first,
        "padding_mask": np.broadcast_to(first, mask.shape).astype(mask.dtype),
    }


def _tokens(model, texts):
    """The model's inputs, as `predict` makes them in a `tf.data` pipeline."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(len(texts))
    batch = next(dataset.map(model.preprocessor).as_numpy_iterator())
    return keras.utils.unpack_x_y_sample_weight(batch)[0]


def _live(model, plan, name, tensors, adapter, served):
    """The outputs of the live model, as a dict of arrays."""
    if adapter is not None:
        model.set_adapter(adapter)
    with model._dylora.at(served.ranks(model._dylora.layers)):
        if name != "generate":
            return probe.outputs(model, plan.inputs, tensors)
        tensors = {k: ops.convert_to_tensor(v) for k, v in tensors.items()}
        generate = model.make_generate_function()
        return probe.arrays(generate(tensors, stop_token_ids=None))

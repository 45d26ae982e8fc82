"""Adapter files: safetensors and JSON, truncated to the rank that is kept."""

import pathlib

import keras
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from keras_dylora import files
from keras_dylora import ranks
from keras_dylora import sidecar
from keras_dylora._keras import statistics
from keras_dylora.attach import enable_dylora
from keras_dylora.attachment import layer_paths
from keras_dylora.layers import ADAPTERS
from keras_dylora.low_rank import float32_array
from keras_dylora.model import DyLoRAModel
from keras_dylora.model import state_of
from keras_dylora.state import adapters_by_path

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "adapter_config.json"


def variable_paths(model):
    """Every weight of a model by its path.

    Named after the innermost layer that holds it, `pooled_dense/kernel`, so
    the same in every process.
    """
    names, taken = {}, {}
    for path, layer in reversed(layer_paths(model).items()):
        for variable in layer.weights:
            if id(variable) not in names:
                names[id(variable)] = f"{path}/{variable.name}"
    for variable in model.weights:
        name = names.get(id(variable), variable.name)
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken[unique] = variable
    return taken


def head_by_path(model):
    """The variables that are trained besides the adapters, by their path."""
    layers = state_of(model).layers
    adapters = {id(v) for x in layers for v in (x.down, x.up)}
    return _by_path(model, _trained(model) - adapters)


def statistics_by_path(model):
    """What training changes in the head without a gradient, by its path."""
    adapted = {id(layer) for layer in state_of(model).layers}
    trained = _trained(model)
    found = {
        id(v)
        for layer in layer_paths(model).values()
        if id(layer) not in adapted
        and (layer.trainable or any(id(v) in trained for v in layer.weights))
        for v in statistics(layer)
    }
    return _by_path(model, found)


def _trained(model):
    """Ids of the variables that are trained, or were and are frozen by now."""
    attachment = state_of(model).attachment
    trained = [] if attachment is None else attachment.trained
    return {id(v) for v in [*model.trainable_variables, *trained]}


def _by_path(model, ids):
    return {p: v for p, v in variable_paths(model).items() if id(v) in ids}


def save_adapter(model, directory, rank=None, overwrite=True):
    """Saves the adapters, cut to a rank, and the trained head.

    The directory holds `adapter.safetensors`, with
    `adapter/<layer path>/down`, `adapter/<layer path>/up` and
    `head/<variable path>` in float32, and `adapter_config.json`. At rank `b`
    the adapter tensors have `b` columns and rows, so the file is as small as
    that of an adapter trained at rank `b`.

    Args:
        model: an enabled model.
        directory: str or path. Written beside, then renamed.
        rank: int in `1..config.rank`. Defaults to `None`, the maximum.
        overwrite: bool. Whether an adapter that is there may be replaced.
            Defaults to `True`.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, or
            if the directory holds something else.

    Example:

    ```python
    keras_dylora.save_adapter(clf, "adapter/", rank=4)
    keras_dylora.load_adapter(other_clf, "adapter/")
    ```
    """
    config = state_of(model).config
    rank = ranks.as_rank(config.rank if rank is None else rank, 1, config.rank)
    tensors = {}
    for path, layer in adapters_by_path(model).items():
        tensors[f"adapter/{path}/down"] = float32_array(layer.down)[:, :rank]
        tensors[f"adapter/{path}/up"] = float32_array(layer.up)[:rank]
    head = head_by_path(model) | statistics_by_path(model)
    for path, variable in head.items():
        tensors[f"head/{path}"] = float32_array(variable)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    attachment = state_of(model).attachment
    described = attachment.named_config if attachment else config
    described = described.truncated(rank)
    written = files.together(WEIGHTS_NAME, CONFIG_NAME)
    with files.new_directory(directory, overwrite, written) as folder:
        safetensors.save_file(tensors, folder / WEIGHTS_NAME)
        sidecar.write(folder / CONFIG_NAME, folder / WEIGHTS_NAME, described)


def load_adapter(model, directory):
    """Loads what `save_adapter` wrote, in place.

    A model that isn't enabled yet is enabled with the configuration of the
    file. An enabled one must have the same rank, alpha and layers.

    Args:
        model: a built Keras or KerasHub model.
        directory: str or path.

    Returns:
        `model` itself.

    Raises:
        ValueError: if the files are missing, damaged or from a newer format,
            or if the rank, alpha, a layer or a shape differs, or if the head
            of the model is quantized. The message lists what is missing,
            extra or mis-shaped; the model is unchanged then.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.load_adapter(clf, "adapter/")
    ```
    """
    config, tensors = _read(directory)
    enabled = isinstance(model, DyLoRAModel)
    if enabled and state_of(model).config.rank != config.rank:
        raise ValueError(
            "An adapter must have the rank of the model it is loaded into. "
            f"Received: rank {config.rank} for a model of rank "
            f"{state_of(model).config.rank}"
        )
    if enabled and state_of(model).config.alpha != config.alpha:
        raise ValueError(
            "An adapter must have the alpha of the model it is loaded into. "
            f"Received: alpha={config.alpha} for a model of alpha="
            f"{state_of(model).config.alpha}"
        )
    check_shapes(_expected_shapes(model, config, tensors, enabled), tensors)
    weights = variable_paths(model)
    check_float_head(
        {k: v for k, v in weights.items() if f"head/{k}" in tensors}
    )
    if not enabled:
        targets = [
            key.removeprefix("adapter/").removesuffix("/down")
            for key in tensors
            if key.startswith("adapter/") and key.endswith("/down")
        ]
        enable_dylora(model, config, target_layers=targets)
    variables = {f"head/{path}": v for path, v in weights.items()}
    for path, layer in adapters_by_path(model).items():
        variables[f"adapter/{path}/down"] = layer.down
        variables[f"adapter/{path}/up"] = layer.up
    for key, value in tensors.items():
        variables[key].assign(value)
    return model


def _read(directory):
    """The config and the tensors of an adapter directory."""
    folder = pathlib.Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"An adapter directory must hold {CONFIG_NAME} and "
                f"{WEIGHTS_NAME}. Received: {str(folder)!r} without {name}"
            )
    config = sidecar.read(
        folder / CONFIG_NAME, folder / WEIGHTS_NAME, "save_adapter"
    )
    try:
        return config, safetensors.load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(
            f"{WEIGHTS_NAME} must be a safetensors file. "
            f"Received: {str(folder / WEIGHTS_NAME)!r} ({error})"
        ) from error


def _expected_shapes(model, config, tensors, enabled):
    """The tensors that the model needs, by key, with their shapes."""
    if enabled:
        layers = adapters_by_path(model)
        head = head_by_path(model)
        head |= {
            path: v
            for path, v in statistics_by_path(model).items()
            if f"head/{path}" in tensors
        }
    else:
        # The file says what to adapt; the model must have it.
        layers = {
            path: layer
            for path, layer in layer_paths(model).items()
            if type(layer) in ADAPTERS and f"adapter/{path}/down" in tensors
        }
        head = {
            path: v
            for path, v in variable_paths(model).items()
            if f"head/{path}" in tensors
        }
    shapes = {f"head/{path}": tuple(v.shape) for path, v in head.items()}
    for path, layer in layers.items():
        adapter = type(layer) if enabled else ADAPTERS[type(layer)]
        inputs, outputs = adapter.adapter_dims(layer)
        shapes[f"adapter/{path}/down"] = (int(np.prod(inputs)), config.rank)
        shapes[f"adapter/{path}/up"] = (config.rank, int(np.prod(outputs)))
    return shapes


def check_float_head(head):
    """Raises a `ValueError` for a quantized head.

    Args:
        head: dict of path to variable.
    """
    for path, variable in head.items():
        if not keras.backend.is_float_dtype(variable.dtype):
            raise ValueError(
                "The task head must be of floats: quantize the backbone "
                "alone, or the model once it is enabled. "
                f"Received: {path!r} of dtype {variable.dtype}"
            )


def check_shapes(shapes, tensors):
    """Raises a `ValueError` that lists what is missing, extra or mis-shaped."""
    wrong = [f"missing: {key}" for key in shapes if key not in tensors]
    wrong += [f"extra: {key}" for key in tensors if key not in shapes]
    wrong += [
        f"mis-shaped: {key} is {tensors[key].shape}, must be {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:20])
        more = f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(
            "The adapter must fit the model, tensor by tensor. Received an "
            f"adapter with\n  {shown}{more}"
        )

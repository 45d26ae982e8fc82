"""to_peft and from_peft: adapters in the Hugging Face PEFT format."""

import dataclasses
import warnings

import numpy as np

from keras_dylora import files
from keras_dylora import ranks
from keras_dylora.adapter import check_float_head
from keras_dylora.adapter import check_shapes
from keras_dylora.adapter import head_by_path
from keras_dylora.adapter import variable_paths
from keras_dylora.attach import enable_dylora
from keras_dylora.attachment import layer_paths
from keras_dylora.config import DyLoRAConfig
from keras_dylora.interop.layouts import layout_of
from keras_dylora.interop.peft_files import CONFIG_NAME
from keras_dylora.interop.peft_files import DYLORA_NAME
from keras_dylora.interop.peft_files import PREFIX
from keras_dylora.interop.peft_files import WEIGHTS_NAME
from keras_dylora.interop.peft_files import peft_config
from keras_dylora.interop.peft_files import read
from keras_dylora.interop.peft_files import write
from keras_dylora.layers import ADAPTERS
from keras_dylora.low_rank import float32_array
from keras_dylora.model import DyLoRAModel
from keras_dylora.model import attachment_of
from keras_dylora.model import state_of
from keras_dylora.state import adapters_by_path


def to_peft(model, directory, rank=None, overwrite=True):
    """Saves the adapters, cut to a rank, as a Hugging Face PEFT adapter.

    PEFT loads the directory onto the transformers model with the same base
    weights, and computes what `model` computes at that rank: `lora_alpha / r`
    is `alpha / rank`. The head of a classifier is in `modules_to_save`. A file
    of our own, `keras_dylora.json`, tells `from_peft` that the ranks have an
    order.

    GPT-2's query, key and value are one layer in transformers, so its adapter
    has the rank of all of theirs together and zeros outside of their blocks.
    KerasHub's BERT has GELU in its tanh form, so the transformers one needs
    `hidden_act="gelu_pytorch_tanh"` to agree to the last digits.

    Args:
        model: an enabled KerasHub `RobertaTextClassifier`,
            `BertTextClassifier`, `GPT2CausalLM`, `LlamaCausalLM` or
            `Llama3CausalLM`, or the backbone of one.
        directory: str or path. Written beside, then renamed.
        rank: int in `1..config.rank`. Defaults to `None`, the maximum.
        overwrite: bool. Whether an adapter that is there may be replaced.
            Defaults to `True`.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled or
            of another class, if adapters or trained weights have no place in
            a PEFT adapter, or if the directory holds something else.

    Example:

    ```python
    keras_dylora.to_peft(clf, "peft/", rank=4)

    base = transformers.RobertaForSequenceClassification.from_pretrained(...)
    peft.PeftModel.from_pretrained(base, "peft/")
    ```

    Reference:

    - [PEFT checkpoint format](
        https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    config = state_of(model).config
    layout = layout_of(model)
    rank = ranks.as_rank(config.rank if rank is None else rank, 1, config.rank)
    modules = layout.modules(model)
    adapters = adapters_by_path(model)
    _check_exportable(model, layout, modules, adapters)
    counts, tensors = {}, {}
    for module, paths in modules.items():
        layers = [adapters.get(path) for path in paths]
        counts[module] = len(layers) - layers.count(None)
        if counts[module]:
            down, up = _fuse(layers, rank)
            tensors[f"{module}.lora_A.weight"] = down.T
            tensors[f"{module}.lora_B.weight"] = up.T
    variables = variable_paths(model)
    for name, path in layout.head.items():
        tensors[name] = float32_array(variables[path]).T
    described = dataclasses.replace(
        attachment_of(model).named_config.truncated(rank),
        target_layers=list(adapters),
    )
    written = files.together(DYLORA_NAME, CONFIG_NAME, WEIGHTS_NAME)
    with files.new_directory(directory, overwrite, written) as folder:
        write(
            folder, tensors, described, peft_config(layout, counts, described)
        )


def _head(model, paths):
    variables = variable_paths(model)
    return {path: variables[path] for path in paths}


def _check_exportable(model, layout, modules, adapters):
    known = {path for paths in modules.values() for path in paths}
    other = sorted(set(adapters) - known)
    if other:
        raise ValueError(
            "A PEFT adapter can adapt the linear layers of the backbone. "
            f"Received: adapters at {other}"
        )
    other = sorted(set(head_by_path(model)) - set(layout.head.values()))
    if other:
        raise ValueError(
            "A PEFT adapter can hold adapters and the task head, and nothing "
            f"else that is trained. Received: trained weights {other}"
        )
    head = _head(model, layout.head.values())
    check_float_head(head)
    for path, variable in head.items():
        width = model.backbone.hidden_dim
        if variable.shape[0] != width and len(variable.shape) == 2:
            raise ValueError(
                "In transformers, the task head is as wide as the backbone, "
                f"{width}. Received: {path!r} of shape {variable.shape}"
            )


def _fuse(layers, rank):
    """One adapter for Keras layers that are one layer in transformers.

    Args:
        layers: list of adapted layers, `None` where there is no adapter.
        rank: int. The rank to cut each adapter to.

    Returns:
        `down`, with the columns of all adapters side by side, and `up`, with
        a block for each and zeros elsewhere.
    """
    blocks = [(i, x) for i, x in enumerate(layers) if x is not None]
    width = blocks[0][1].up.shape[1]
    up = np.zeros((len(blocks) * rank, len(layers) * width), dtype="float32")
    for n, (i, layer) in enumerate(blocks):
        rows = slice(n * rank, (n + 1) * rank)
        up[rows, i * width : (i + 1) * width] = float32_array(layer.up)[:rank]
    down = [float32_array(layer.down)[:, :rank] for _, layer in blocks]
    return np.concatenate(down, axis=1), up


def from_peft(model, directory):
    """Loads a Hugging Face PEFT adapter of plain LoRA kind, in place.

    A model that isn't enabled yet is enabled for the layers of the adapter.
    What `to_peft` saved comes back as the DyLoRA adapter that it was. Any
    other adapter is loaded at its one rank, so `min_rank` is `rank`. Its
    scale is kept at every `alpha` of the model, and the adapter of GPT-2's
    `c_attn` becomes one each for query, key and value.

    Args:
        model: a KerasHub `RobertaTextClassifier`, `BertTextClassifier`,
            `GPT2CausalLM`, `LlamaCausalLM` or `Llama3CausalLM`, or the
            backbone of one, with the base weights that the adapter is for.
        directory: str or path, with `adapter_config.json` and
            `adapter_model.safetensors`.

    Returns:
        `model` itself.

    Raises:
        TypeError: if a number in the configuration has the wrong type.
        ValueError: if a file is missing or damaged, if the adapter isn't a
            plain LoRA or is for other layers, shapes or another rank, or if
            the model is of another class or its head is quantized. The model
            is unchanged then.

    Warns:
        UserWarning: if the ranks of the adapter have no order, as it doesn't
            come from DyLoRA. Cutting it to a lower rank is meaningless.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.from_peft(clf, "peft/")
    ```

    Reference:

    - [PEFT checkpoint format](
        https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    layout = layout_of(model)
    adapter = read(directory)
    modules = _adapted(layout.modules(model), adapter)
    check_shapes(
        _expected_shapes(model, layout, modules, adapter), adapter.tensors
    )
    loaded = [
        x for n, x in layout.head.items() if PREFIX + n in adapter.tensors
    ]
    check_float_head(_head(model, loaded))
    config = _config(modules, adapter)
    targets = [path for paths in modules.values() for path in paths if path]
    _check_enabled(model, config, targets)
    if adapter.dylora is None:
        warnings.warn(
            "The ranks of this LoRA adapter have no order, as no "
            "keras_dylora wrote it: use it at its full rank of "
            f"{config.rank}. Cutting it to a lower one is meaningless.",
            stacklevel=2,
        )
    if not isinstance(model, DyLoRAModel):
        enable_dylora(model, config, target_layers=targets)
    _assign(model, layout, modules, adapter)
    return model


def _adapted(modules, adapter):
    """The layers that an adapter is for.

    A dict of module name to the paths of its Keras layers, `None` for those
    without an adapter.
    """
    if adapter.dylora is None:
        return {m: paths for m, paths in modules.items() if adapter.adapts(m)}
    targets = adapter.dylora.target_layers
    found = {
        module: tuple(path if path in targets else None for path in paths)
        for module, paths in modules.items()
    }
    return {module: paths for module, paths in found.items() if any(paths)}


def _expected_shapes(model, layout, modules, adapter):
    """The tensors that the model needs, by name, with their shapes."""
    shapes = {}
    layers = layer_paths(model)
    for module, paths in modules.items():
        layer = layers[next(filter(None, paths))]
        adapter_class = ADAPTERS.get(type(layer), type(layer))
        inputs, outputs = map(np.prod, adapter_class.adapter_dims(layer))
        rank = adapter.rank(module)
        shapes[f"{module}.lora_A.weight"] = (rank, int(inputs))
        shapes[f"{module}.lora_B.weight"] = (len(paths) * int(outputs), rank)
    if adapter.config.get("modules_to_save") or any(
        f"{PREFIX}{name}" in adapter.tensors for name in layout.head
    ):
        variables = variable_paths(model)
        for name, path in layout.head.items():
            shapes[name] = tuple(variables[path].shape)[::-1]
    return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}


def _config(modules, adapter):
    """The `DyLoRAConfig` that an adapter asks for."""
    if not modules:
        raise ValueError(
            "The adapter must adapt layers of the model. "
            f"Received: an adapter with tensors {sorted(adapter.tensors)}"
        )
    sizes = {m: (adapter.rank(m), adapter.alpha(m)) for m in modules}
    if adapter.dylora is None:
        rank, alpha = max(sizes.values())
        return DyLoRAConfig(
            rank=rank,
            min_rank=rank,
            alpha=alpha,
            dropout=adapter.config.get("lora_dropout", 0.0),
        )
    for module, paths in modules.items():
        rank = adapter.dylora.rank * (len(paths) - paths.count(None))
        if sizes[module][0] != rank:
            raise ValueError(
                f"{CONFIG_NAME} must give the rank that {DYLORA_NAME} does. "
                f"Received: {sizes[module][0]} instead of {rank} for {module}"
            )
    return adapter.dylora


def _check_enabled(model, config, targets):
    if not isinstance(model, DyLoRAModel):
        return
    if model.dylora_config.rank != config.rank:
        raise ValueError(
            "An adapter must have the rank of the model it is loaded into. "
            f"Received: rank {config.rank} for a model of rank "
            f"{model.dylora_config.rank}"
        )
    enabled = adapters_by_path(model)
    missing = sorted(set(enabled) - set(targets))
    extra = sorted(set(targets) - set(enabled))
    if missing or extra:
        raise ValueError(
            "An adapter must be for the layers that the model is enabled for. "
            f"Received: an adapter without {missing} and with {extra}"
        )


def _assign(model, layout, modules, adapter):
    config = model.dylora_config
    layers = adapters_by_path(model)
    for module, paths in modules.items():
        down = adapter.tensors[f"{PREFIX}{module}.lora_A.weight"].T
        up = adapter.tensors[f"{PREFIX}{module}.lora_B.weight"].T
        # One if the model has the adapter's own alpha and rank.
        scale = adapter.alpha(module) / adapter.rank(module)
        up = up * np.float32(scale / (config.alpha / config.rank))
        for path, part in _split(down, up, paths, adapter.dylora).items():
            rest = config.rank - part[0].shape[1]  # where ranks differ
            layers[path].down.assign(np.pad(part[0], ((0, 0), (0, rest))))
            layers[path].up.assign(np.pad(part[1], ((0, rest), (0, 0))))
    variables = variable_paths(model)
    for name, path in layout.head.items():
        if f"{PREFIX}{name}" in adapter.tensors:
            variables[path].assign(adapter.tensors[f"{PREFIX}{name}"].T)


def _split(down, up, paths, dylora):
    """Undoes `_fuse`; a dict of path to `down` and `up`.

    What no `_fuse` wrote has no blocks: every part needs the whole `down`.
    """
    parts = {}
    width = up.shape[1] // len(paths)
    for i, path in enumerate(paths):
        if path is None:
            continue
        rows = slice(None)
        if dylora is not None:
            rows = slice(
                len(parts) * dylora.rank, (len(parts) + 1) * dylora.rank
            )
        columns = slice(i * width, (i + 1) * width)
        parts[path] = down[:, rows], up[rows, columns]
    return parts

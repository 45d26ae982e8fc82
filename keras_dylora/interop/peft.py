"""to_peft and from_peft: adapters in the format of Hugging Face PEFT."""

import json
import math
import numbers
import pathlib
import re
import warnings

# Lets NumPy know the dtype bfloat16, which PEFT's files may have.
import ml_dtypes  # noqa: F401
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from keras_dylora import files
from keras_dylora import ranks
from keras_dylora.adapter import adapters_by_path
from keras_dylora.adapter import head_by_path
from keras_dylora.attach import enable_dylora
from keras_dylora.attachment import layer_paths
from keras_dylora.config import DyLoRAConfig
from keras_dylora.interop.layouts import layout_of
from keras_dylora.layers import ADAPTERS
from keras_dylora.layers import LowRankAdapter
from keras_dylora.model import DyLoRAModel
from keras_dylora.model import state_of

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
SIDE_NAME = "keras_dylora.json"
FORMAT_VERSION = 1
PREFIX = "base_model.model."

# Settings of PEFT that don't change what a trained adapter computes, or that
# are read here. Any other one that is set makes another kind of adapter.
KNOWN_SETTINGS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# The other initializations change the base weights too.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")


def to_peft(model, directory, rank=None, overwrite=True):
    """Writes the adapters of one rank as a Hugging Face PEFT adapter.

    The directory holds `adapter_config.json` and `adapter_model.safetensors`,
    which `peft.PeftModel.from_pretrained` loads onto the Hugging Face model,
    and `keras_dylora.json`, which lets `from_peft` restore the DyLoRA
    configuration. At rank `b` the adapter's scale is `alpha / b`. A
    classifier's head is written in any case, other layers if they are trained
    in full.

    GPT-2's query, key and value are one module in Hugging Face's model. The
    adapters of `k` of them become one of rank `k * b` with as many times
    `alpha`, which computes the same.

    Args:
        model: an enabled `keras_hub.models` task: `RobertaTextClassifier`,
            `BertTextClassifier`, `GPT2CausalLM`, `LlamaCausalLM` or
            `Llama3CausalLM`.
        directory: str or path. Written beside, then renamed.
        rank: int in `1..config.rank`. Defaults to `None`, the maximum.
        overwrite: bool. Whether an adapter that is there may be replaced.
            Defaults to `True`.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, if
            its architecture or one of its trained layers has no counterpart,
            or if the directory holds something else.

    Example:

    ```python
    to_peft(clf, "adapter/", rank=4)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        "roberta-base", num_labels=2
    )
    peft.PeftModel.from_pretrained(base, "adapter/")
    ```

    Reference:

    - [PEFT checkpoint format](
      https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    config = state_of(model).config
    layout = layout_of(model)
    rank = ranks.as_rank(config.rank if rank is None else rank, 1, config.rank)
    modules = layout.modules_of(model)
    saved = _trained_modules(model, layout, modules)
    tensors, module_ranks = {}, {}
    for module, group in modules.items():
        parts = [x for x in group.values() if isinstance(x, LowRankAdapter)]
        if parts:
            down, up = _join(group.values(), rank)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down.T
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up.T
            module_ranks[module] = len(parts) * rank
    paths = layer_paths(model)
    for module in saved:
        for name, path in layout.saved[module].items():
            key = PREFIX + ".".join(filter(None, (module, name)))
            tensors[f"{key}.weight"] = _array(paths[path].kernel).T
            tensors[f"{key}.bias"] = _array(paths[path].bias)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    adapter_config = _peft_config(config, layout, rank, module_ranks, saved)
    attachment = state_of(model).attachment
    described = attachment.get_config()["config"] if attachment else (
        config.get_config()
    )  # fmt: skip
    described = DyLoRAConfig.from_config(described).truncated(rank)
    with files.new_directory(directory, overwrite, CONFIG_NAME) as folder:
        safetensors.save_file(
            tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"}
        )
        side = {
            "format_version": FORMAT_VERSION,
            "config": described.get_config(),
            "layers": list(adapters_by_path(model)),
            "sha256": files.sha256(folder / WEIGHTS_NAME),
        }
        (folder / CONFIG_NAME).write_text(json.dumps(adapter_config, indent=2))
        (folder / SIDE_NAME).write_text(json.dumps(side, indent=2))


def _array(variable):
    return np.asarray(ops.convert_to_numpy(variable), dtype="float32")


def _dims(layer):
    """Sizes of the input side and the output side, adapted or not."""
    adapted = isinstance(layer, LowRankAdapter)
    cls = type(layer) if adapted else ADAPTERS[type(layer)]
    return tuple(int(np.prod(side)) for side in cls.adapter_dims(layer))


def _trained_modules(model, layout, modules):
    """The modules to save in full; raises if a layer has no counterpart."""
    known = {path for group in modules.values() for path in group}
    adapted = set(adapters_by_path(model))
    trained = {path.rpartition("/")[0] for path in head_by_path(model)}
    heads = {
        module: set(layers.values()) for module, layers in layout.saved.items()
    }
    in_head = set().union(*heads.values()) if heads else set()
    unknown = sorted(adapted - known)
    if unknown:
        raise ValueError(
            "An adapted layer must have a counterpart in the Hugging Face "
            f"model, as these have: {sorted(known)}. Received: {unknown}"
        )
    unknown = sorted(trained - in_head)
    if unknown:
        raise ValueError(
            "A layer that is trained in full must have a counterpart in the "
            f"Hugging Face model, as these have: {sorted(in_head)}. "
            f"Received: {unknown}"
        )
    both = sorted(trained & adapted)
    if both:
        raise ValueError(
            "PEFT takes a layer that is adapted or one that is trained in "
            f"full, not both. Received: {both}"
        )
    paths = layer_paths(model)
    for path in in_head:
        _check_head(path, paths[path])
    # No base checkpoint holds a classifier, so that is always written.
    return [
        module
        for module, layers in heads.items()
        if module == "classifier" or layers & trained
    ]


def _check_head(path, layer):
    if layer.quantization_mode is not None:
        raise ValueError(
            "A quantized layer can't be saved or loaded in full. Received: "
            f"{path} with quantization_mode={layer.quantization_mode}"
        )
    if path == "pooled_dense" and len(set(_dims(layer))) > 1:
        raise ValueError(
            "The pooled layer must be as wide as the backbone, as in the "
            f"Hugging Face model. Received: {path} of shape {_dims(layer)}"
        )


def _join(group, rank):
    """One adapter for the layers of a module, exact: blocks of theirs."""
    downs, ups = [], []
    parts = [x for x in group if isinstance(x, LowRankAdapter)]
    for layer in group:
        block = np.zeros((rank * len(parts), _dims(layer)[1]), "float32")
        if isinstance(layer, LowRankAdapter):
            start = rank * len(downs)
            block[start : start + rank] = _array(layer.up)[:rank]
            downs.append(_array(layer.down)[:, :rank])
        ups.append(block)
    return np.concatenate(downs, axis=1), np.concatenate(ups, axis=1)


def _number(value):
    return int(value) if float(value).is_integer() else float(value)


def _peft_config(config, layout, rank, module_ranks, saved):
    # Where several layers share a module, its rank and alpha are as many
    # times as large, so that every scale is alpha / rank.
    top = max(module_ranks.values())
    odd = {module: r for module, r in module_ranks.items() if r != top}
    return {
        "peft_type": "LORA",
        "task_type": layout.task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": top,
        "lora_alpha": _number(top // rank * config.alpha),
        "lora_dropout": config.dropout,
        # Whole names: `output.dense` alone would match two modules of BERT.
        "target_modules": list(module_ranks),
        "rank_pattern": odd,
        "alpha_pattern": {
            module: _number(r // rank * config.alpha)
            for module, r in odd.items()
        },
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": layout.fan_in_fan_out,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def from_peft(model, directory):
    """Loads a Hugging Face PEFT LoRA adapter, in place.

    What `to_peft` wrote comes back bit for bit, with its configuration. Any
    other LoRA adapter comes with a warning: PEFT trains one rank, so its
    columns and rows have no order and a lower rank of it means nothing.

    A model that isn't enabled yet is enabled: with the configuration that
    `to_peft` wrote, or else with `rank` and `min_rank` of the adapter's rank
    (fixed-rank LoRA). An enabled one must have the same rank, scale and
    layers.

    Args:
        model: a built `keras_hub.models` task, of an architecture that
            `to_peft` knows, with the weights of the base checkpoint.
        directory: str or path. Holds `adapter_config.json` and
            `adapter_model.safetensors`.

    Returns:
        `model` itself.

    Raises:
        ValueError: if the files are missing, damaged or from a newer format,
            if the adapter isn't plain LoRA of one rank, if the architecture
            or a layer has no counterpart, or if the rank, the scale, a layer
            or a shape differs. The model is unchanged then.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "hf://FacebookAI/roberta-base", num_classes=2
    )
    from_peft(clf, "adapter/")
    ```

    Reference:

    - [PEFT checkpoint format](
      https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    layout = layout_of(model)
    settings, tensors, side = _read(directory)
    modules = layout.modules_of(model)
    adapters, heads = _by_module(model, layout, modules, settings, tensors)
    values, scales = _values(modules, settings, adapters, side)
    rank, alpha = _rank_and_alpha(values, scales)
    paths = layer_paths(model)
    head_values = {
        path: value for group in heads.values() for path, value in group.items()
    }
    config = _config(layout, settings, side, rank, alpha, values, heads)
    if isinstance(model, DyLoRAModel):
        _check_enabled(model, config, values, heads)
    if side is None:
        warnings.warn(
            "This adapter was trained at one rank, so its columns and rows "
            f"have no order. It works at rank {rank}; truncating it isn't "
            "meaningful.",
            stacklevel=2,
        )
    if not isinstance(model, DyLoRAModel):
        enable_dylora(model, config, target_layers=list(values))
    for path, (down, up) in values.items():
        paths[path].down.assign(down)
        paths[path].up.assign(up)
    for path, (kernel, bias) in head_values.items():
        paths[path].kernel.assign(kernel)
        paths[path].bias.assign(bias)
    return model


def _read(directory):
    """The settings, the tensors and the side file, `None` if there is none."""
    folder = pathlib.Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"A PEFT adapter directory must hold {CONFIG_NAME} and "
                f"{WEIGHTS_NAME}. Received: {str(folder)!r} without {name}"
            )
    settings = _read_json(folder / CONFIG_NAME)
    _check_settings(settings)
    side = None
    if (folder / SIDE_NAME).exists():
        side = _read_side(folder)
    try:
        tensors = safetensors.load_file(folder / WEIGHTS_NAME)
        tensors = {k: np.asarray(v, "float32") for k, v in tensors.items()}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{WEIGHTS_NAME} must be a safetensors file of floats. "
            f"Received: {str(folder / WEIGHTS_NAME)!r} ({error})"
        ) from error
    return settings, tensors, side


def _read_json(path):
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path.name} must be a JSON file. Received: {str(path)!r} "
            f"({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name} must hold a JSON object. Received: {str(path)!r} "
            f"with {content!r}"
        )
    return content


def _read_side(folder):
    """The config and the layers that `to_peft` noted."""
    content = _read_json(folder / SIDE_NAME)
    try:
        version = int(content["format_version"])
        if version <= FORMAT_VERSION:
            config = DyLoRAConfig.from_config(content["config"])
            layers = frozenset(content["layers"])
            expected = content["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{SIDE_NAME} must be one that `to_peft` wrote. "
            f"Received: {str(folder / SIDE_NAME)!r} ({error!r})"
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The adapter must be of format version {FORMAT_VERSION} or "
            "older; a newer keras_dylora wrote it. "
            f"Received: format_version={version}"
        )
    received = files.sha256(folder / WEIGHTS_NAME)
    if received != expected:
        raise ValueError(
            f"{WEIGHTS_NAME} must have the SHA-256 that {SIDE_NAME} names; "
            "the file is damaged, or was trained on by PEFT. In the second "
            f"case, delete {SIDE_NAME} to load it as plain LoRA. "
            f"Received: {received} instead of {expected}"
        )
    return config, layers


def _check_settings(settings):
    """Raises unless the adapter is plain LoRA."""

    def refuse(rule, name):
        raise ValueError(
            f"{rule}. Received: {name}={settings.get(name)!r} in {CONFIG_NAME}"
        )

    if settings.get("peft_type") != "LORA":
        refuse("Only LoRA adapters can be loaded", "peft_type")
    if settings.get("bias", "none") != "none":
        refuse("An adapter with trained biases can't be loaded", "bias")
    if settings.get("init_lora_weights", True) not in PLAIN_INITIALIZATIONS:
        refuse(
            "An adapter whose initialization changes the base weights can't "
            "be loaded",
            "init_lora_weights",
        )
    for name in settings:
        if name not in KNOWN_SETTINGS and settings[name]:
            refuse("Only plain LoRA adapters can be loaded", name)
    for name in ("r", "lora_alpha"):
        if not _is_positive(settings.get(name)):
            refuse(f"`{name}` must be a positive number", name)
    for name in ("rank_pattern", "alpha_pattern"):
        if not _is_pattern(settings.get(name) or {}):
            refuse(f"`{name}` must map expressions to positive numbers", name)
    dropout = settings.get("lora_dropout", 0.0)
    if (
        isinstance(dropout, bool)
        or not isinstance(dropout, numbers.Real)
        or not 0 <= dropout < 1
    ):
        refuse("`lora_dropout` must be in [0, 1)", "lora_dropout")


def _is_positive(value):
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


def _is_pattern(pattern):
    if not isinstance(pattern, dict):
        return False
    try:
        for key in pattern:
            re.compile(key)
    except re.error:
        return False
    return all(_is_positive(value) for value in pattern.values())


def _setting(settings, name, pattern, module):
    """A setting of one module, looked up as PEFT does."""
    for key, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return settings[name]


def _by_module(model, layout, modules, settings, tensors):
    """The tensors by module, in Keras's order of axes, all shapes checked."""
    shapes, adapters, heads = {}, {}, {}
    for module, group in modules.items():
        keys = [f"{PREFIX}{module}.lora_{x}.weight" for x in "AB"]
        if not any(key in tensors for key in keys):
            continue
        rank = _setting(settings, "r", "rank_pattern", module)
        dims = [_dims(layer) for layer in group.values()]
        shapes[keys[0]] = (rank, dims[0][0])
        shapes[keys[1]] = (sum(outputs for _, outputs in dims), rank)
        adapters[module] = keys
    paths = layer_paths(model)
    for module, layers in layout.saved.items():
        keys = {}
        for name, path in layers.items():
            key = PREFIX + ".".join(filter(None, (module, name)))
            keys[path] = (f"{key}.weight", f"{key}.bias")
        if not any(key in tensors for pair in keys.values() for key in pair):
            continue
        for path, (kernel, bias) in keys.items():
            _check_head(path, paths[path])
            shapes[kernel] = _dims(paths[path])[::-1]
            shapes[bias] = shapes[kernel][:1]
        heads[module] = keys
    wrong = [f"missing: {key}" for key in shapes if key not in tensors]
    wrong += [f"unknown: {key}" for key in tensors if key not in shapes]
    wrong += [
        f"mis-shaped: {key} is {tensors[key].shape}, must be {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if wrong or not adapters:
        shown = "\n  ".join(wrong[:20]) or "none of these modules"
        more = f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(
            "The adapter must fit the model, tensor by tensor; the modules "
            f"that can be loaded are {_names(modules, layout)}. "
            f"Received an adapter with\n  {shown}{more}"
        )
    return (
        {m: tuple(tensors[k].T for k in keys) for m, keys in adapters.items()},
        {
            module: {
                path: (tensors[kernel].T, tensors[bias])
                for path, (kernel, bias) in keys.items()
            }
            for module, keys in heads.items()
        },
    )


def _names(modules, layout):
    names = [layout.block.format("*") + f".{m}" for m in layout.block_modules]
    return ", ".join([*names, *layout.modules, *layout.saved])


def _values(modules, settings, adapters, side):
    """`down` and `up` by Keras path, and the scale of each."""
    values, scales = {}, {}
    for module, (down, up) in adapters.items():
        rank = down.shape[1]
        alpha = _setting(settings, "lora_alpha", "alpha_pattern", module)
        root = settings.get("use_rslora", False)
        scale = alpha / (math.sqrt(rank) if root else rank)
        group = modules[module]
        if len(group) == 1:
            split = {next(iter(group)): (down, up)}
        else:
            split = _split(group, down, up, side)
        values.update(split)
        scales.update(dict.fromkeys(split, scale))
    if side is not None and set(values) != side[1]:
        raise ValueError(
            f"The adapter must hold the layers that {SIDE_NAME} names. "
            f"Received: {sorted(values)} instead of {sorted(side[1])}"
        )
    order = [path for group in modules.values() for path in group]
    return {path: values[path] for path in order if path in values}, scales


def _split(group, down, up, side):
    """The adapters of the layers that one module is made of."""
    sizes = [_dims(layer)[1] for layer in group.values()]
    ups = dict(zip(group, np.split(up, np.cumsum(sizes)[:-1], 1), strict=True))
    if side is not None:
        subsets = [[path for path in group if path in side[1]]]
    else:
        paths = list(group)
        subsets = [
            [p for i, p in enumerate(paths) if bits >> i & 1]
            for bits in sorted(range(1, 8), key=lambda b: -b.bit_count())
        ]
    for subset in subsets:
        blocks = _blocks(subset, down, ups)
        # A block of zeros could belong to any structure.
        if blocks and (side or all(up.any() for _, up in blocks.values())):
            return blocks
    if side is not None:
        raise ValueError(
            "An adapter of several layers must consist of their blocks. "
            f"Received: one that isn't made of {subsets[0]}"
        )
    # Trained by PEFT: all layers share the projection down.
    return {path: (down, up) for path, up in ups.items()}


def _blocks(subset, down, ups):
    """What `_join` joined for these layers; `None` if it isn't that."""
    if not subset or down.shape[1] % len(subset):
        return None
    rank = down.shape[1] // len(subset)
    found = {}
    for path, up in ups.items():
        rest = up
        if path in subset:
            start = rank * subset.index(path)
            own = slice(start, start + rank)
            found[path] = (down[:, own], up[own])
            rest = np.delete(up, own, axis=0)
        if rest.any():
            return None
    return {path: found[path] for path in subset}


def _rank_and_alpha(values, scales):
    by_path = {path: down.shape[1] for path, (down, _) in values.items()}
    if len(set(by_path.values())) > 1:
        raise ValueError(
            "All layers of an adapter must have one rank, and so no "
            f"`rank_pattern`. Received: {by_path}"
        )
    rank = next(iter(by_path.values()))
    scale = next(iter(scales.values()))
    if not all(math.isclose(scale, other) for other in scales.values()):
        raise ValueError(
            "All layers of an adapter must have one scale, and so no "
            f"`alpha_pattern`. Received: {scales}"
        )
    return rank, scale * rank


def _config(layout, settings, side, rank, alpha, values, heads):
    """The `DyLoRAConfig` of a model that is enabled for the adapter."""
    if side is not None:
        config, _ = side
        if config.rank != rank or not math.isclose(config.alpha, alpha):
            raise ValueError(
                f"{CONFIG_NAME} must agree with {SIDE_NAME}. Received: "
                f"rank {rank} and alpha {alpha} instead of {config.rank} and "
                f"{config.alpha}"
            )
        return config
    head = [path for group in layout.saved.values() for path in group.values()]
    in_backbone = set(heads) - {"classifier"}
    return DyLoRAConfig(
        rank=rank,
        min_rank=rank,
        alpha=alpha,
        dropout=float(settings.get("lora_dropout", 0.0)),
        target_layers=list(values),
        trainable_layers=head if in_backbone else None,
    )


def _check_enabled(model, config, values, heads):
    """Raises unless an enabled model is the one that the adapter fits."""
    own = state_of(model).config
    for name in ("rank", "alpha"):
        expected, received = getattr(own, name), getattr(config, name)
        if not math.isclose(expected, received):
            raise ValueError(
                f"An adapter must have the {name} of the model it is loaded "
                f"into. Received: {name} {received} for a model of {name} "
                f"{expected}"
            )
    adapted = set(adapters_by_path(model))
    if adapted != set(values):
        raise ValueError(
            "An adapter must have the layers of the model it is loaded into. "
            f"Received: missing {sorted(adapted - set(values))}, extra "
            f"{sorted(set(values) - adapted)}"
        )
    trained = {path.rpartition("/")[0] for path in head_by_path(model)}
    saved = {
        path
        for module, group in heads.items()
        for path in group
        if module != "classifier"
    }
    if not saved <= trained:
        raise ValueError(
            "A layer of the backbone that the adapter holds in full must be "
            f"trained in the model. Received: {sorted(saved - trained)}"
        )

"""The files of a PEFT adapter: read, checked, understood and written."""

import collections
import dataclasses
import json
import math
import numbers
import pathlib

import ml_dtypes  # noqa: F401  NumPy's bfloat16
import numpy as np
import safetensors
from safetensors.numpy import save_file

from keras_dylora import files, ranks
from keras_dylora.adapters import metadata
from keras_dylora.adapters.identity import Identity
from keras_dylora.adapters.peft import fields
from keras_dylora.adapters.peft.layout import OUTPUT
from keras_dylora.adapters.peft.tensors import to_factors
from keras_dylora.config import DyLoRAConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# A file beside PEFT's own, as PEFT warns of unknown keys in its config.
DYLORA_NAME = "keras_dylora.json"
CARD_NAME = "README.md"
# Ours first: if it is there, we wrote the others too.
NAMES = (DYLORA_NAME, CONFIG_NAME, WEIGHTS_NAME)
PREFIX = "base_model.model."
# Its content if it keeps no ranks, to show that the files are ours.
SERVER = {"layout": "server"}


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """The content of an adapter directory.

    If `to_peft` wrote it, there are the config and the identity of a model, and
    the ranks of its layers if they differ. `prefixes` are the prefix of layers
    in the configuration, and that in the model.
    """

    config: dict
    tensors: dict[str, np.ndarray]
    dylora: DyLoRAConfig | None
    identity: Identity | None
    ranks: dict[str, int] | None
    prefixes: tuple[str, str] = ("", "")

    @property
    def layer_ranks(self):
        """Dict of path to rank, or `None` if `to_peft` didn't write this."""
        if self.dylora is None:
            return None
        high = self.dylora.rank
        given = high if self.ranks is None else self.ranks
        return ranks.by_layer(
            given, dict.fromkeys(self.dylora.target_layers, high)
        )

    def rank(self, module):
        """int. The rank of the adapter of a linear layer."""
        rank = self._of(module, "rank_pattern", "r")
        return ranks.as_rank(rank, 1, name="r")

    def alpha(self, module):
        """float. The scale of the adapter of a layer, times its rank."""
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
            raise TypeError(
                f"`lora_alpha` must be a number. Received: lora_alpha={alpha!r}"
            )
        if self.config.get("use_rslora"):
            return alpha * math.sqrt(self.rank(module))
        return alpha

    def tensor(self, name):
        """A tensor, by its name without PEFT's prefix."""
        return self.tensors[f"{PREFIX}{name}"]

    def without_head(self):
        """A copy with only the tensors of LoRA."""
        tensors = {k: x for k, x in self.tensors.items() if ".lora_" in k}
        config = self.config | {"modules_to_save": None}
        return dataclasses.replace(self, config=config, tensors=tensors)

    def moved(self, old, new):
        """A copy whose layers have another prefix, such as `"roberta."`."""

        tensors = {
            f"{PREFIX}{_renamed(k.removeprefix(PREFIX), old, new)}": x
            for k, x in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors, prefixes=(old, new))

    def in_config(self, module):
        """The name that a layer has in the configuration."""
        return _renamed(module, *self.prefixes[::-1])

    def factors(self, module, names):
        """The adapter of a layer as `Factors`, by the names of its tensors."""
        scale = self.alpha(module) / self.rank(module)
        return to_factors(*map(self.tensor, names), scale)

    def _of(self, module, pattern, default):
        return fields.pattern(
            self.config, pattern, self.in_config(module), default
        )

    def adapts(self, module, names):
        """Whether the adapter is for a layer, by its tensors or its name.

        Raises a `ValueError` if there are tensors of a layer that the
        configuration leaves out, as PEFT wouldn't adapt it.
        """
        if not any(f"{PREFIX}{name}" in self.tensors for name in names):
            return fields.targets(self.config, self.in_config(module))
        field = fields.left_out_by(self.config, self.in_config(module))
        if field is not None:
            raise ValueError(
                f"An adapter must have tensors only of layers that `{field}` "
                f"in {CONFIG_NAME} allows. "
                f"Received: {field}={self.config[field]!r} and tensors of "
                f"{module}"
            )
        return True


def _renamed(name, old, new):
    return new + name.removeprefix(old) if name.startswith(old) else name


def read(directory):
    """The `PeftAdapter` in a directory.

    Raises a `ValueError` if a file is missing or damaged, or if the adapter
    isn't a plain LoRA.
    """
    folder = pathlib.Path(directory)
    pickled = folder / "adapter_model.bin"
    if pickled.is_file() and not (folder / WEIGHTS_NAME).exists():
        raise ValueError(
            f"A PEFT adapter must hold {WEIGHTS_NAME}, as reading a `.bin` "
            "file runs code. If you trust the file, load it by "
            "`peft.PeftModel.from_pretrained` and write it by its "
            f"`save_pretrained`. Received: {str(pickled)!r}"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"A PEFT adapter must hold {CONFIG_NAME} and {WEIGHTS_NAME}. "
                f"Received: {str(folder)!r} without {name}"
            )
    config = files.read_json(folder / CONFIG_NAME)
    fields.check(config, CONFIG_NAME)
    tensors = {
        name: value
        for name, value in _load(folder / WEIGHTS_NAME).items()
        if not name.endswith(fields.OF_TRAINING)
    }
    return PeftAdapter(config, tensors, *_dylora_config(folder))


def _load(path):
    """Reads float32 arrays, as NumPy's own loader doesn't know bfloat16."""
    tensors = {}
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path.name} must be a safetensors file. "
            f"Received: {str(path)!r} ({error})"
        ) from error
    for name, tensor in stored:
        data, dtype = tensor["data"], tensor["dtype"]
        if dtype == "BF16":  # the upper half of a float32
            bits = np.frombuffer(data, "<u2").astype("uint32") << 16
            values = bits.view("float32")
        elif dtype in ("F16", "F32", "F64"):
            width = int(dtype[1:]) // 8
            values = np.frombuffer(data, f"<f{width}").astype("float32")
        else:
            raise ValueError(
                "The tensors of an adapter must be floating point. "
                f"Received: {name} of type {dtype}"
            )
        tensors[name] = values.reshape(tensor["shape"])
    return tensors


def _dylora_config(folder):
    """The result of `metadata.read` for `to_peft`'s own file, or `None`s."""
    path = folder / DYLORA_NAME
    if not path.is_file() or files.read_json(path) == SERVER:
        return None, None, None
    config, identity, ranks = metadata.read(
        path,
        folder / WEIGHTS_NAME,
        "to_peft",
        f"Delete {DYLORA_NAME} to load a plain LoRA that was trained since. ",
    )
    if not isinstance(config.target_layers, list):
        raise ValueError(
            f"{DYLORA_NAME} must be one that `to_peft` wrote. "
            f"Received: target_layers={config.target_layers!r}"
        )
    return config, identity, ranks


def write(folder, tensors, config, adapter, dtype, card):
    """Writes the files of a PEFT adapter.

    The names of `tensors` are without PEFT's prefix. `config` is PEFT's
    configuration, and `card` the text of the model card. `adapter` is the
    `AdapterWeights`, whose config and identity PEFT's files can't hold, or
    `None` for servers.
    """
    _save(folder / WEIGHTS_NAME, tensors, dtype)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    if adapter is None:
        (folder / DYLORA_NAME).write_text(json.dumps(SERVER))
    else:
        metadata.write(folder / DYLORA_NAME, folder / WEIGHTS_NAME, adapter)


def _save(path, tensors, dtype):
    """Writes tensors in a dtype, if their values are in its range."""
    stored = {}
    for name, value in tensors.items():
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(value).astype(np.dtype(dtype))
        if not np.isfinite(array).all() and np.isfinite(value).all():
            raise ValueError(
                f"The values of {name} must be within {dtype}'s. "
                f"Received: {np.abs(value).max():.4g}"
            )
        stored[PREFIX + name] = array
    save_file(stored, path, metadata={"format": "pt"})


def peft_config(layout, fused, tables, dylora, base):
    """PEFT's configuration, for a dict of module to `Factors` or `None`.

    `tables` has the names of embeddings that were trained in full.
    """
    rslora = dylora.scaling == "sqrt"
    sizes = {
        module: (x.rank, _lora_alpha(x, rslora))
        for module, x in fused.items()
        if x is not None
    }
    # PEFT ties embeddings of this name.
    tying = _last(layout.embedding) == "embed_tokens" and (
        OUTPUT in fused or len(tables) > len(set(tables.values()))
    )
    # Few layers in the patterns, as not every program reads them.
    (rank, alpha), _ = collections.Counter(sizes.values()).most_common(1)[0]
    other = {k: size for k, size in sizes.items() if size != (rank, alpha)}
    return {
        "peft_type": "LORA",
        "task_type": layout.task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {k: r for k, (r, _) in other.items() if r != rank},
        "alpha_pattern": {k: a for k, (_, a) in other.items() if a != alpha},
        "use_rslora": rslora,
        "lora_dropout": dylora.dropout,
        "bias": "none",
        "fan_in_fan_out": layout.transposed,
        "target_modules": _target_modules(layout, fused),
        "modules_to_save": sorted(
            {k.split(".")[0] for k in layout.head}
            | {_last(k.removesuffix(".weight")) for k in tables}
        )
        or None,
        **({"ensure_weight_tying": True} if tying else {}),
    }


def _lora_alpha(x, rslora=False):
    """The `lora_alpha` for the scale of `x`, in as few digits as possible.

    PEFT divides it by r, or by the root of r if `rslora`.
    """
    divisor = math.sqrt(x.rank) if rslora else x.rank
    alpha = x.scale * divisor
    found = (float(f"{alpha:.{digits}g}") for digits in range(1, 18))
    alpha = next((a for a in found if a / divisor == x.scale), alpha)
    return int(alpha) if alpha.is_integer() else alpha


def _target_modules(layout, fused):
    """The adapted layers, by a short name if no other layer has it."""
    in_block = collections.Counter(_last(name) for name in layout.linear)
    plain = {_last(module) for module, x in fused.items() if x is None}
    targets = set()
    for module in (module for module, x in fused.items() if x is not None):
        short = _last(module)
        unique = in_block[short] == 1 and short not in plain and layout.alone
        targets.add(short if unique else module)
    return sorted(targets)


def _last(module):
    return module.rpartition(".")[2]

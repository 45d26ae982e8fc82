"""The fields of PEFT's `LoraConfig`: ignored, read or refused."""

import re

# Fields that don't change what a trained adapter computes.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# The ending of tensors that such fields save only for training.
OF_TRAINING = ".lora_velora_embed"

# Fields that are read here, with the types that PEFT writes. Fields with
# `object` are checked where they are used.
READ = {
    "alpha_pattern": dict,
    "ensure_weight_tying": bool,
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "layers_to_transform": (int, list),
    "lora_alpha": object,
    "lora_dropout": object,
    "modules_to_save": list,
    "r": object,
    "rank_pattern": dict,
    "target_modules": (str, list),
    "trainable_token_indices": (list, dict),
    "use_rslora": bool,
}

_MERGE = (
    "PEFT's `merge_and_unload` puts this into the base; save that, and "
    "KerasHub's `from_preset` reads it"
)
_CONVERT = (
    "`save_pretrained(…, path_initial_model_for_weight_conversion=…)` of PEFT "
    f"writes one, or {_MERGE}"
)
_ANEW = "Train one without this"

# Other fields that change the arithmetic, and what to do about them.
REFUSED = {
    "alora_invocation_tokens": _ANEW,
    "arrow_config": _ANEW,
    "bias": _MERGE,
    "init_lora_weights": _CONVERT,
    "kasa_config": _MERGE,
    "layer_replication": _ANEW,
    "lora_bias": _MERGE,
    "monteclora_config": _MERGE,
    "peft_type": "`peft.save_as_lora` turns many other kinds into a LoRA",
    "target_parameters": _MERGE,
    "use_bdlora": _MERGE,
    "use_dora": _MERGE,
    "use_qalora": _ANEW,
}

# Values that leave an adapter a plain one. Other values of `init_lora_weights`
# also change the base weights.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (
        None, True, False, "gaussian", "eva", "orthogonal", "mica",
    ),
}  # fmt: skip


def check(config, file):
    """Raises a `ValueError` if a configuration asks for an unknown feature.

    PEFT switches on its additions to LoRA by a bool, or by a list or dict that
    isn't empty. So a field that isn't known is refused if it has such a value.
    """
    wrong = {
        key: value
        for key, value in config.items()
        if key not in IGNORED | READ.keys() | _PLAIN.keys()
        and (value is True or (value and isinstance(value, (dict, list))))
    }
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            wrong[key] = config.get(key)
    if wrong:
        ways = dict.fromkeys(REFUSED.get(key, _ANEW) for key in wrong)
        raise ValueError(
            f"The adapter must be a plain LoRA. {'. '.join(ways)}. Received: "
            + ", ".join(f"{k}={v!r}" for k, v in wrong.items())
        )
    for key, types in READ.items():
        value = config.get(key)
        if value is not None and not isinstance(value, types):
            raise ValueError(
                f"`{key}` in {file} must be as PEFT writes it. "
                f"Received: {key}={value!r}"
            )
        for expression in _expressions(key, value):
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"`{key}` in {file} must have regular expressions. "
                    f"Received: {expression!r} ({error})"
                ) from error


def _expressions(key, value):
    """The parts of a field's value that are read as regular expressions."""
    if key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        return value or ()
    if key == "layers_pattern" and isinstance(value, list):
        return value
    return [value] if isinstance(value, str) else ()


# PEFT's rules for the names of layers.


def pattern(config, field, module, default):
    """The value for a layer in `rank_pattern` or `alpha_pattern`.

    It is that of the first regular expression that matches the end of the
    layer's name.
    """
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(default)


def left_out_by(config, module):
    """The field that leaves a layer out, even if it is a target, or `None`."""
    if _names(config.get("exclude_modules"), module):
        return "exclude_modules"
    for name in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", module):
            return "modules_to_save"
    numbers = config.get("layers_to_transform")
    if numbers is None or numbers == [] or not _by_ending(config, module):
        return None
    number = _number(module, config.get("layers_pattern"))
    numbers = [numbers] if isinstance(numbers, int) else numbers
    return None if number in numbers else "layers_to_transform"


def targets(config, module):
    """Whether the configuration adapts a layer."""
    named = _names(config.get("target_modules"), module)
    return named and left_out_by(config, module) is None


def saves(config, module):
    """Whether `modules_to_save` names a layer or a parent of it."""
    path = module.split(".")
    around = [".".join(path[: i + 1]) for i in range(len(path))]
    names = tuple(config.get("modules_to_save") or ())
    return any(name.endswith(names) for name in around)


def _names(names, module):
    """Whether a regular expression or a list of endings names a layer."""
    if isinstance(names, str):
        return bool(names and re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names or ())


def _by_ending(config, module):
    """Whether `layers_to_transform` may leave out a layer.

    It may not if the targets are an expression, or name the layer in full.
    """
    names = config.get("target_modules")
    return not isinstance(names, str) and module not in (names or ())


def _number(module, patterns):
    """The number of the block that a layer is in, or `None`."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        every = (
            re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module)
            for name in patterns
        )
        found = next(filter(None, every), None)
    return found and int(found[1])

"""The fields of PEFT's `LoraConfig`: left alone, read here, or refused."""

import re

# Of no effect on what a trained adapter computes.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# What is saved of them for the training alone.
OF_TRAINING = ".lora_velora_embed"

# Read here, with the types that PEFT writes; others are checked where they
# are used.
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
    "`merge_and_unload` of PEFT puts this into the base, which `from_preset` "
    "of KerasHub reads once it is saved"
)
_CONVERT = (
    "`save_pretrained(…, path_initial_model_for_weight_conversion=…)` of PEFT "
    f"writes one, or {_MERGE}"
)
_ANEW = "Train one without this"

# What else changes the arithmetic, and the way out.
REFUSED = {
    "alora_invocation_tokens": _ANEW,
    "arrow_config": _ANEW,
    "bias": _MERGE,
    "init_lora_weights": _CONVERT,
    "kasa_config": _MERGE,
    "layer_replication": _ANEW,
    "lora_bias": _MERGE,
    "monteclora_config": _MERGE,
    "peft_type": (
        "`peft.save_as_lora` writes a LoRA of what many other kinds compute"
    ),
    "target_parameters": _MERGE,
    "use_bdlora": _MERGE,
    "use_dora": _MERGE,
    "use_qalora": _ANEW,
}

# What leaves an adapter a plain one. Other values of `init_lora_weights`
# change the base weights too.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (
        None, True, False, "gaussian", "eva", "orthogonal", "mica",
    ),
}  # fmt: skip


def check(config, file):
    """Raises a `ValueError` if a configuration asks for what isn't here.

    PEFT switches on what it adds to LoRA by a bool or by a list or dict that
    isn't empty, so a field that isn't known is refused if it is one of these.
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
    """What is read as a regular expression in the value of a field."""
    if key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        return value or ()
    if key == "layers_pattern" and isinstance(value, list):
        return value
    return [value] if isinstance(value, str) else ()


# PEFT's rules for the names of layers.


def pattern(config, field, module, default):
    """The value of a layer in `rank_pattern` or `alpha_pattern`.

    That of the first regular expression for the end of its name.
    """
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(default)


def left_out_by(config, module):
    """The field that leaves a layer out, whatever the targets, or `None`."""
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
    """Whether `modules_to_save` names a layer, or one that it is in."""
    path = module.split(".")
    around = [".".join(path[: i + 1]) for i in range(len(path))]
    names = tuple(config.get("modules_to_save") or ())
    return any(name.endswith(names) for name in around)


def _names(names, module):
    """A regular expression, or a list of endings."""
    if isinstance(names, str):
        return bool(names and re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names or ())


def _by_ending(config, module):
    """Whether targets leave it to `layers_to_transform` to choose a layer.

    They don't if they name it in full, or are an expression.
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

"""enable_dylora and disable_dylora: find the layers, upgrade them, freeze."""

import dataclasses
import re
import warnings

import keras

from keras_dylora.adaptation import Adaptation, restore, trainable_flags
from keras_dylora.config import DyLoRAConfig
from keras_dylora.layers import ADAPTED_CLASSES
from keras_dylora.live_class import to_dylora_class, to_original_class
from keras_dylora.low_rank import LowRankAdapter
from keras_dylora.model import DyLoRAModel, adaptation_of
from keras_dylora.paths import layer_paths

QUERY_AND_VALUE = r"(query|value|[qv]_proj)(_dense|_projection)?"


def _select(paths, patterns, argument):
    """The entries of `paths` that the user's patterns name, in order."""
    if callable(patterns):
        return {p: x for p, x in paths.items() if patterns(p, x)}
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            f"`{argument}` must be a string, a list of strings or a "
            f"callable. Received: {argument}={patterns!r}"
        )
    chosen = set()
    for pattern in patterns:
        found = {p for p, x in paths.items() if _matches(pattern, p, x)}
        if not found:
            raise ValueError(
                f"`{argument}` must name layers of the model. "
                f"Received: {pattern!r}, which matches none of "
                f"{_listing(paths)}"
            )
        chosen |= found
    return {p: x for p, x in paths.items() if p in chosen}


def _matches(pattern, path, layer):
    if pattern in (path, layer.name) or path.endswith(f"/{pattern}"):
        return True
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            "A layer pattern must be a name or a regular expression. "
            f"Received: {pattern!r} ({error})"
        ) from error
    return bool(expression.fullmatch(path) or expression.fullmatch(layer.name))


def _listing(paths):
    names = list(paths)
    shown = ", ".join(repr(name) for name in names[:24])
    more = len(names) - 24
    return f"[{shown}{f', … and {more} more' if more > 0 else ''}]"


def _trained_layers(model, paths, config):
    """The layers that are trained in full, each with the variables that are.

    Weights that a task head shares with its backbone (tied embeddings) stay
    frozen.
    """
    backbone = getattr(model, "backbone", None)
    if config.trainable_layers is not None:
        layers = _select(paths, config.trainable_layers, "trainable_layers")
        return {p: _variables_if_trained(layer) for p, layer in layers.items()}
    if not isinstance(backbone, keras.Model):
        return {}
    inside = {id(x) for x in [backbone, *layer_paths(backbone).values()]}
    shared = {id(v) for v in backbone.variables}
    return {
        path: [v for v in layer.trainable_variables if id(v) not in shared]
        for path, layer in paths.items()
        if id(layer) not in inside
    }


def _variables_if_trained(layer):
    """The variables of a layer that are trained if it isn't frozen."""
    flags = trainable_flags(layer)
    layer.trainable = True
    try:
        return list(layer.trainable_variables)
    finally:
        restore(flags)


def _targets(model, config):
    """The layers to adapt, all checked, and those to train in full."""
    paths = layer_paths(model)
    trained_layers = _trained_layers(model, paths, config)
    linear = {
        path: layer
        for path, layer in paths.items()
        if isinstance(layer, tuple(ADAPTED_CLASSES))
    }
    # What is trained in full is adapted only if asked for by name.
    body = {p: x for p, x in linear.items() if p not in trained_layers}
    if config.target_layers is None:
        chosen = {
            path: layer
            for path, layer in body.items()
            if re.fullmatch(QUERY_AND_VALUE, layer.name)
        }
    elif config.target_layers == "all-linear":
        chosen = body
    else:
        chosen = _select(linear, config.target_layers, "target_layers")
    if not chosen:
        wanted = config.target_layers or "query and value projections"
        raise ValueError(
            "`target_layers` must match at least one `Dense` or "
            f"`EinsumDense` layer. Received: {wanted!r}, which matches none of "
            f"{_listing(linear)}"
        )
    for path, layer in chosen.items():
        if not layer.built:
            raise ValueError(
                "A model must be built before it is enabled: call it on data "
                f"once. Received: a model whose layer {path!r} isn't built"
            )
        if type(layer) not in ADAPTED_CLASSES:
            raise ValueError(
                "Only layers that are exactly `Dense` or `EinsumDense` can "
                f"be adapted. Received: {path!r}, a {type(layer).__name__}"
            )
        try:
            ADAPTED_CLASSES[type(layer)].check_base(layer)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from error
    return chosen, trained_layers


def _warn_of_quantized(model, trained_layers):
    paths = layer_paths(model)
    quantized = [
        p for p in trained_layers if paths[p].quantization_mode is not None
    ]
    if quantized:
        warnings.warn(
            "No gradient reaches a quantized kernel, so the layers that are "
            "trained in full should be float: quantize the model after it is "
            "enabled, or its backbone alone. "
            f"Received: quantized layers {_listing(quantized)}",
            stacklevel=3,
        )


def enable_dylora(model, config=None, **overrides):
    """Upgrades a built Keras or KerasHub model to DyLoRA, in place.

    The target layers get an adapter (no base weight is copied), the backbone
    is frozen, the task head stays trainable. The model keeps its identity and
    its class, and becomes a `DyLoRAModel` too.

    Args:
        model: a built `keras.Model`, such as a
            `keras_hub.models.RobertaTextClassifier`.
        config: `DyLoRAConfig` or `None`. Defaults to `None`, the defaults.
        **overrides: fields of `DyLoRAConfig`, which take precedence.

    Returns:
        `model` itself. Compile it again to choose the optimizer; a model that
        was compiled keeps its settings, with a new optimizer state.

    Raises:
        TypeError: if `model` isn't a `keras.Model` or a field is unknown.
        ValueError: if the model isn't built or was enabled before, if no
            layer matches, or if a matched layer can't be adapted. The model
            is unchanged then.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.enable_dylora(clf, rank=8, alpha=16)
    clf.compile(keras.optimizers.AdamW(4e-4), loss="...")
    clf.fit(texts, labels)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    if config is not None and not isinstance(config, DyLoRAConfig):
        raise TypeError(
            "`config` must be a `DyLoRAConfig`. "
            f"Received: config={config!r} (of type {type(config).__name__})"
        )
    config = dataclasses.replace(config or DyLoRAConfig(), **overrides)
    if not model.built:
        raise ValueError(
            "A model must be built before it is enabled: call it on data "
            f"once. Received: {model.name}, which isn't built"
        )
    nested = [
        path
        for path, layer in layer_paths(model).items()
        if isinstance(layer, (LowRankAdapter, DyLoRAModel))
    ]
    if isinstance(model, DyLoRAModel) or nested:
        raise ValueError(
            "A model can be enabled once. Call `disable_dylora` first. "
            f"Received: {model.name}, with adapters at {_listing(nested)}"
        )
    layers, trained_layers = _targets(model, config)
    _warn_of_quantized(model, trained_layers)
    adaptation = Adaptation(model, config, layers, trained_layers)
    try:
        adaptation.apply()
        to_dylora_class(model, adaptation, DyLoRAModel)
    except BaseException:
        to_original_class(model)
        adaptation.undo()
        raise
    return model


def disable_dylora(model):
    """Takes the adapters off again: the original model, bit for bit.

    The trained head keeps its values. To keep the adapter too, use `merge`.

    Args:
        model: a model that `enable_dylora` returned.

    Returns:
        `model` itself, of its original class.

    Raises:
        ValueError: if the model wasn't enabled.

    Example:

    ```python
    keras_dylora.enable_dylora(clf, rank=8)
    keras_dylora.disable_dylora(clf)
    ```
    """
    adaptation = adaptation_of(model)
    if not adaptation.upgraded:
        raise ValueError(
            "The model must come from `enable_dylora`. Received: "
            f"{model.name}, which was built from DyLoRA layers"
        )
    to_original_class(model)
    adaptation.undo()
    return model

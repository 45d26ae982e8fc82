"""Which layers of a model are adapted, and which are trained in full."""

import dataclasses
import functools
import gc
import re
import sys
import warnings

import keras

from keras_dylora.adaptation import restore, trainable_flags
from keras_dylora.calls import never_called
from keras_dylora.layers import ADAPTED_CLASSES
from keras_dylora.paths import layer_paths

ALL_LINEAR = "all-linear"
# In KerasHub's families; fused projections too.
QUERY_AND_VALUE = (
    r"(query|value|receptance)(_dense|_projection|_proj|_projector)?"
    r"|[qv]_proj(_dense|_projection)?|[qv]_dense_layer"
    r"|(attention_|in_proj_)?qkv(_proj)?|query_key_value"
)
# Which expert takes a token isn't an adapter's to change.
ROUTER = (
    r"(.*_)?router(_.*)?|sparse_feedforward_gate_dense"
    r"|shared_expert_gate(_dense)?"
)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What `enable_dylora` adapts and trains; layers by their paths."""

    adapted: dict
    # Trained in full: each layer with its variables that are.
    trained: dict
    # Linear layers that aren't adapted although they were meant, with why.
    left_out: dict


def find_targets(model, config):
    """The `Targets` that a config names in a built model, all checked.

    Raises a `ValueError` if there is none or one can't be adapted.
    """
    paths = layer_paths(model)
    told = config.trainable_layers is not None
    backbones = [] if told else _backbones(model, paths)
    trained = _trained_layers(paths, backbones, config)
    linear = {
        path: layer
        for path, layer in paths.items()
        if isinstance(layer, tuple(ADAPTED_CLASSES))
    }
    # What is trained in full is adapted only if asked for by name.
    body = {p: x for p, x in linear.items() if p not in trained}
    left_out = {}
    if config.target_layers is None:
        chosen = {
            path: layer
            for path, layer in body.items()
            if re.fullmatch(QUERY_AND_VALUE, layer.name)
        }
    elif config.target_layers == ALL_LINEAR:
        left_out = {
            path: "chooses experts"
            for path, layer in body.items()
            if re.fullmatch(ROUTER, layer.name)
        }
        chosen = {p: x for p, x in body.items() if p not in left_out}
    else:
        chosen = _select(linear, config.target_layers, "target_layers")
    if not chosen:
        raise ValueError(_no_target(config.target_layers, linear))
    unused = never_called(model, chosen)
    for path, layer in chosen.items():
        if path not in unused:
            _check(path, layer)
    if unused:
        message = (
            "An adapter needs a layer that the model calls; this one reads "
            "the kernel alone, or doesn't use it. "
            f"Received: {listing(unused)}"
        )
        if len(unused) == len(chosen):
            raise ValueError(message)
        warnings.warn(f"{message}, which are left out", stacklevel=3)
        left_out |= dict.fromkeys(unused, "the model never calls")
        chosen = {p: x for p, x in chosen.items() if p not in left_out}
    untold = not told and not backbones
    if untold and not is_backbone(type(model)):
        _warn_of_frozen_output(model, paths, chosen)
    return Targets(chosen, trained, left_out)


def _no_target(wanted, linear):
    if wanted is None:
        wanted = (
            "None, query and value projections by the names "
            f"{QUERY_AND_VALUE!r}"
        )
    else:
        wanted = repr(wanted)
    names = sorted({layer.name for layer in linear.values()})
    return (
        "`target_layers` must match at least one `Dense` or `EinsumDense` "
        f"layer. Received: target_layers={wanted}, which matches none of "
        f"{listing(linear)}. Name some, such as "
        f"target_layers={names[:3]!r}, or use {ALL_LINEAR!r}"
        if names
        else "A model must have a `Dense` or an `EinsumDense` layer to adapt. "
        "Received: a model without one"
    )


def _check(path, layer):
    """Raises a `ValueError` if a layer can't take an adapter."""
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
            meant = pattern.replace("_", "-").lower() == ALL_LINEAR
            hint = f" (did you mean {ALL_LINEAR!r}?)" if meant else ""
            raise ValueError(
                f"`{argument}` must name layers of the model. "
                f"Received: {pattern!r}{hint}, which matches none of "
                f"{listing(paths)}"
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


def listing(paths):
    """Paths for a message, the first of many."""
    names = list(paths)
    shown = ", ".join(repr(name) for name in names[:24])
    more = len(names) - 24
    return f"[{shown}{f', … and {more} more' if more > 0 else ''}]"


def _trained_layers(paths, backbones, config):
    """The layers that are trained in full, each with the variables that are.

    By default those outside of the backbones. Weights that a task head shares
    with them (tied embeddings) stay frozen.
    """
    if config.trainable_layers is not None:
        layers = _select(paths, config.trainable_layers, "trainable_layers")
        return {p: _variables_if_trained(layer) for p, layer in layers.items()}
    if not backbones:
        return {}
    inside = {
        id(x)
        for backbone in backbones
        for x in [backbone, *layer_paths(backbone).values()]
    }
    shared = {id(v) for backbone in backbones for v in backbone.variables}
    return {
        path: [v for v in layer.trainable_variables if id(v) not in shared]
        for path, layer in paths.items()
        if id(layer) not in inside
    }


def _backbones(model, paths):
    """The pretrained bodies within a model; what is outside is its head.

    A task's, or those of KerasHub that a model is built around. None of a
    backbone itself, whose own attribute `backbone` would be a part of it.
    """
    if is_backbone(type(model)):
        return []
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.Model):
        return [backbone]
    within = [x for x in paths.values() if is_backbone(type(x))]
    if "keras_hub" in sys.modules:
        within += _taken_apart(paths)
    return within


def _taken_apart(paths):
    """The backbones of which a functional model has the layers alone.

    `keras.Model(backbone.input, head(backbone.output))` doesn't know of the
    backbone, but the program that made it does, as long as it keeps it.
    """
    gc.collect()  # what isn't kept any more doesn't count
    ids = {id(layer) for layer in paths.values()}
    return [
        x
        for x in gc.get_objects()
        if is_backbone(type(x)) and any(id(y) in ids for y in x.layers)
    ]


@functools.cache
def is_backbone(cls):
    """Whether a class is one of KerasHub's pretrained bodies."""
    return any(
        x.__name__ == "Backbone" and x.__module__.startswith("keras_hub.")
        for x in cls.__mro__
    )


def _warn_of_frozen_output(model, paths, adapted):
    """Says that the last layer of a model stays frozen, which may be new."""
    *_, last = (path for path, layer in paths.items() if layer.weights)
    if last not in adapted:
        warnings.warn(
            "Nothing but the adapters is trained: the model has no backbone "
            "of KerasHub's to tell a new head from. Name the layers that are "
            f"new in `trainable_layers`, such as [{last!r}]; `()` says that "
            f"none is. Received: {model.name} with trainable_layers=None",
            stacklevel=4,
        )


def _variables_if_trained(layer):
    """The variables of a layer that are trained if it isn't frozen."""
    flags = trainable_flags(layer)
    layer.trainable = True
    try:
        return list(layer.trainable_variables)
    finally:
        restore(flags)

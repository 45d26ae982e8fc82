"""The layers of a model that are adapted, and those trained in full."""

import dataclasses
import re
import warnings

import keras

from keras_dylora import _keras
from keras_dylora.hints import meant
from keras_dylora.layers.kinds import (
    ADAPTED_CLASSES,
    CONVOLUTIONS,
    LINEAR,
    adapted_class,
)
from keras_dylora.layers.tree import Tree
from keras_dylora.live.calls import never_called
from keras_dylora.live.tokens import TokenRows, find_tokens

ALL_LINEAR, ALL_CONV = "all-linear", "all-conv"
# The names in KerasHub's families, including fused projections.
QUERY_AND_VALUE = (
    r"(query|value|receptance)(_dense|_projection|_proj|_projector)?"
    r"|[qv]_proj(_dense|_projection)?|[qv]_dense_layer"
    r"|(attention_|in_proj_)?qkv(_proj)?|query_key_value"
)
# An adapter shouldn't change which expert takes a token.
ROUTER = (
    r"(.*_)?router(_.*)?|sparse_feedforward_gate_dense"
    r"|shared_expert_gate(_dense)?"
)


@dataclasses.dataclass(frozen=True)
class Targets:
    """The layers that `enable_dylora` adapts and trains, by path."""

    adapted: dict
    # Layers that are trained in full, each with its variables that are trained.
    trained: dict
    # Linear layers that were meant but can't be adapted, with the reason.
    left_out: dict
    # The maximum rank of each adapted layer.
    max_ranks: dict
    tokens: TokenRows | None = None


def find_targets(tree, config, backbone=None):
    """The `Targets` that a config names in a built model, all checked.

    Raises a `ValueError` if there are none, or if one can't be adapted.
    """
    model, paths = tree.model, tree.layers
    backbones = _backbones(tree, backbone)
    trained = _trained_layers(tree, backbones, config)
    known = {
        path: layer
        for path, layer in paths.items()
        if isinstance(layer, tuple(ADAPTED_CLASSES))
    }
    # Layers of other kinds, and layers that are trained in full, are adapted
    # only if they are named.
    body = {p: x for p, x in known.items() if p not in trained}
    linear = {p: x for p, x in body.items() if isinstance(x, LINEAR)}
    left_out = {}
    if config.target_layers is None:
        chosen = {
            path: layer
            for path, layer in linear.items()
            if re.fullmatch(QUERY_AND_VALUE, layer.name)
        }
    elif config.target_layers == ALL_LINEAR:
        left_out = {
            path: "chooses experts"
            for path, layer in linear.items()
            if re.fullmatch(ROUTER, layer.name)
        }
        chosen = {p: x for p, x in linear.items() if p not in left_out}
    elif config.target_layers == ALL_CONV:
        chosen = {p: x for p, x in body.items() if type(x) in CONVOLUTIONS}
    else:
        chosen = _select(known, config.target_layers, "target_layers")
    if not chosen:
        raise ValueError(_no_target(config.target_layers, known))
    unused = never_called(tree, chosen)
    _check_layers({p: x for p, x in chosen.items() if p not in unused})
    if unused:
        if len(unused) == len(chosen):
            raise ValueError(_not_called(unused))
        warnings.warn(
            f"{_not_called(unused)}, which are left out", stacklevel=3
        )
        left_out |= dict.fromkeys(unused, "the model never calls")
        chosen = {p: x for p, x in chosen.items() if p not in left_out}
    tokens = find_tokens(tree, config.trainable_tokens, chosen)
    untold = config.trainable_layers is None and not backbones
    if untold and not _is_backbone(model):
        _warn_of_frozen_output(model, paths, chosen)
    ranks = _max_ranks(chosen, config)
    return Targets(chosen, trained, left_out, ranks, tokens)


def _max_ranks(chosen, config):
    """Dict of path to maximum rank, from the first pattern that matches."""
    found = {}
    for pattern, rank in (config.rank_pattern or {}).items():
        named = _select(chosen, pattern, "rank_pattern")
        if named.keys() <= found.keys():
            raise ValueError(
                "The first pattern of `rank_pattern` that matches a layer "
                "counts, so put narrow patterns before wide ones. Received: "
                f"{pattern!r} after others that match its {len(named)} layers"
            )
        found = dict.fromkeys(named, rank) | found
    ranks = {path: found.get(path, config.rank) for path in chosen}
    highest = max(ranks.values())
    if highest < config.rank:
        raise ValueError(
            "`rank` is the maximum rank of at least one layer. "
            f"Received: rank={config.rank}, and a `rank_pattern` that gives "
            f"all {len(ranks)} layers at most {highest}; use rank={highest}"
        )
    return ranks


def _no_target(wanted, known):
    if wanted is None:
        wanted = (
            "None, query and value projections by the names "
            f"{QUERY_AND_VALUE!r}"
        )
    else:
        wanted = repr(wanted)
    names = sorted({layer.name for layer in known.values()})
    return (
        "`target_layers` must match at least one layer that can be adapted. "
        f"Received: target_layers={wanted}, which matches none of "
        f"{listing(known)}. Name some, such as "
        f"target_layers={names[:3]!r}, or use {ALL_LINEAR!r}"
        if names
        else "A model must have a layer that can be adapted. "
        "Received: a model without one"
    )


def check_targets(tree, chosen):
    """Raises a `ValueError` if one of the layers can't take an adapter."""
    _check_layers(chosen)
    unused = never_called(tree, chosen)
    if unused:
        raise ValueError(_not_called(unused))


def _not_called(paths):
    return (
        "An adapter needs a layer that the model calls; the model reads only "
        "the kernels of these layers, or doesn't use them. "
        f"Received: {listing(paths)}"
    )


def _check_layers(chosen):
    """Raises a `ValueError` unless all are built and can be adapted."""
    for path, layer in chosen.items():
        if not layer.built:
            raise ValueError(
                "A model must be built before it is enabled: call it on data "
                f"once. Received: a model whose layer {path!r} isn't built"
            )
        cls = adapted_class(layer)
        if cls is None:
            raise ValueError(
                "Only layers that are exactly `Dense`, `EinsumDense`, "
                "`Embedding`, `ReversibleEmbedding` or `Conv1D` to `Conv3D` "
                "can be adapted. "
                f"Received: {path!r}, a {type(layer).__name__}"
            )
        try:
            cls.check_base(layer)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from error


def _select(paths, patterns, argument):
    """The entries of `paths` that match the user's patterns, in order."""
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
            names = [ALL_LINEAR, ALL_CONV, *(x.name for x in paths.values())]
            hint = meant(pattern, names)
            if pattern in (ALL_LINEAR, ALL_CONV):
                hint = " (only `target_layers` takes it, and not in a list)"
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
    """Formats paths for a message; shows the first of many."""
    names = list(paths)
    shown = ", ".join(repr(name) for name in names[:24])
    more = len(names) - 24
    return f"[{shown}{f', … and {more} more' if more > 0 else ''}]"


def trained_by_default(tree, backbone=None):
    """The `Targets.trained` of a config that names no trained layers."""
    return _trained_outside(tree, _backbones(tree, backbone))


def _trained_layers(tree, backbones, config):
    """The layers that are trained in full, each with its trained variables.

    By default, these are the layers outside of the backbones.
    """
    if config.trainable_layers is None:
        return _trained_outside(tree, backbones)
    named = _select(tree.layers, config.trainable_layers, "trainable_layers")
    return {
        path: [v for x in tree.below(layer) for v in _keras.trained_weights(x)]
        for path, layer in named.items()
    }


def _trained_outside(tree, backbones):
    """The unfrozen layers outside of backbones, each with its variables.

    Weights that a task head shares with a backbone (tied embeddings) stay
    frozen.
    """
    if not backbones:
        return {}
    inside = {id(x) for each in backbones for x in _layers_of(each, tree)}
    shared = {id(v) for each in backbones for v in each.variables}
    return {
        path: [
            v
            for v in _keras.own_weights(layer)
            if v.trainable and id(v) not in shared
        ]
        for path, layer in tree.layers.items()
        if id(layer) not in inside and layer.trainable
    }


def _layers_of(backbone, tree):
    if id(backbone) in tree.paths:
        return tree.below(backbone)
    return Tree(backbone).every.values()


def _backbones(tree, backbone):
    """The pretrained parts of a model; the rest is its head.

    They are the user's `backbone`, the backbone of a task, or the KerasHub
    backbones that a model is built around. A model that is a backbone itself
    has none, as its own attribute `backbone` would be a part of it.
    """
    if backbone is not None:
        ids = {id(x) for x in getattr(backbone, "layers", ())}
        if not ids & tree.paths.keys():
            raise ValueError(
                "`backbone` must be the `keras.Model` around whose layers the "
                f"model is built. Received: backbone={backbone!r}"
            )
        return [backbone]
    if _is_backbone(tree.model):
        return []
    own = getattr(tree.model, "backbone", None)
    if isinstance(own, keras.Model):
        return [own]
    return [x for x in tree.layers.values() if _is_backbone(x)]


def _is_backbone(layer):
    """Whether a layer is one of KerasHub's backbones."""
    return any(
        x.__name__ == "Backbone" and x.__module__.startswith("keras_hub.")
        for x in type(layer).__mro__
    )


def _warn_of_frozen_output(model, paths, adapted):
    """Warns that the last layer of a model stays frozen, as it may be new."""
    *_, last = (path for path, layer in paths.items() if layer.weights)
    if last not in adapted:
        warnings.warn(
            "Nothing but the adapters is trained: the model doesn't show which "
            "part is pretrained and which layers are new. Give the pretrained "
            "part as `backbone`, or name the new layers in `trainable_layers`, "
            f"such as [{last!r}]; `()` says that none is new. "
            f"Received: {model.name} with trainable_layers=None",
            stacklevel=4,
        )

"""Summaries of an adapted model: a line, tables, and its sizes by rank."""

import math

from rich import box
from rich.table import Table

from keras_dylora import _keras
from keras_dylora.layers.kinds import LINEAR, matrix_shape
from keras_dylora.ranks import by_layer
from keras_dylora.tables import text

BYTES = 4  # of a float32, which everything that is trained is


def parameters(model, rank):
    """The number of trained parameters at a rank, or at a rank for each layer.

    It counts the columns and rows of the adapters up to the rank, and all that
    is trained in full.
    """
    layers = model._dylora.layers
    ranks = by_layer(rank, {path: x.rank for path, x in layers.items()})
    adapters = {id(v) for x in layers.values() for v in (x.down, x.up)}
    full = [v for v in model.trainable_variables if id(v) not in adapters]
    return sum(math.prod(v.shape) for v in full) + sum(
        ranks[path] * sum(matrix_shape(x)) for path, x in layers.items()
    )


def announcement(tree, targets):
    """A line on what `enable_dylora` did to a model, with its `Targets`."""
    model, adapted = tree.model, targets.adapted
    config, spec = model.dylora_config, model._dylora.spec
    linear = [
        path
        for path, layer in tree.layers.items()
        if path in adapted or isinstance(layer, LINEAR)
    ]
    # Custom weights count too: experts, for example, aren't `Dense` layers.
    adapters = {id(v) for x in adapted.values() for v in (x.down, x.up)}
    body = sum(
        math.prod(v.shape)
        for path, layer in tree.layers.items()
        if path in adapted
        or path not in spec.trained
        and not type(layer).__name__.endswith("Embedding")
        for v in _keras.own_weights(layer)
        if len(v.shape) > 1 and id(v) not in adapters
    )
    covered = sum(math.prod(matrix_shape(x)) for x in adapted.values())
    at_all, in_full = parameters(model, config.rank), parameters(model, 0)
    ranks = f"ranks {config.min_rank} to {config.rank}"
    if config.min_rank == config.rank:
        ranks = f"rank {config.rank}"
    line = (
        f"{model.name} has adapters of {ranks} on {len(adapted)} of "
        f"{len(linear)} linear layers, {covered / body:.0%} of its matrices; "
        f"{at_all:,} parameters are trained"
    )
    if in_full:
        full = ", ".join(path for path, names in spec.trained.items() if names)
        line += f", {in_full:,} of them in full: {full}"
    reasons = {}
    for path, reason in targets.left_out.items():
        reasons.setdefault(reason, []).append(path)
    for reason, left_out in reasons.items():
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        line += f"; left out: {left_out[0]}{more}, which {reason}"
    return line


def tables(model):
    """Tables of the adapted layers and of the sizes by rank, as text."""
    layers = Table(box=box.SIMPLE_HEAD)
    layers.add_column("adapted layer", overflow="fold")
    for name in ("matrix", "rank", "parameters"):
        layers.add_column(name, justify="right")
    for path, layer in model._dylora.layers.items():
        inputs, outputs = matrix_shape(layer)
        size = f"{layer.rank * (inputs + outputs):,}"
        layers.add_row(path, f"{inputs} x {outputs}", str(layer.rank), size)
    by_rank = Table(box=box.SIMPLE_HEAD)
    for name in ("rank", "trained parameters", "bytes"):
        by_rank.add_column(name, justify="right")
    named, shown = model._dylora.named, [layers, by_rank]
    if named.cuts:
        by_rank.add_column("cut")
    for b in range(1, model.dylora_config.rank + 1):
        size = parameters(model, b)
        tuned = b <= named.max_rank and model._dylora.tuned_cut(b) is not None
        cut = [("tuned" if tuned else "")] if named.cuts else []
        by_rank.add_row(str(b), f"{size:,}", f"{BYTES * size:,}", *cut)
    if not named.is_plain:
        adapters = Table(box=box.SIMPLE_HEAD)
        adapters.add_column("adapter", overflow="fold")
        adapters.add_column("highest rank", justify="right")
        for name in named.names:
            active = " (active)" if name == named.active else ""
            adapters.add_row(f"{name}{active}", str(named.max_rank_of(name)))
        shown.insert(0, adapters)
    return text(*shown)

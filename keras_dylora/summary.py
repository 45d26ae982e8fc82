"""What was done to a model, in a line and in tables; its sizes by rank."""

import math

from rich import box
from rich.table import Table

from keras_dylora import _keras
from keras_dylora.layers import ADAPTED_CLASSES, matrix_shape
from keras_dylora.paths import layer_paths, without_adapters
from keras_dylora.ranks import by_layer
from keras_dylora.tables import text

BYTES = 4  # of a float32; all that is trained is of those


def parameters(model, rank):
    """The number of trained parameters at a rank, or one for each layer.

    Columns and rows of the adapters up to it, and all that is trained in full.
    """
    layers = model._dylora.layers
    ranks = by_layer(rank, layers, model.dylora_config.rank)
    full = without_adapters(model.trainable_variables, layers.values())
    return sum(math.prod(v.shape) for v in full) + sum(
        ranks[path] * sum(matrix_shape(x)) for path, x in layers.items()
    )


def announcement(model, targets):
    """One line on what `enable_dylora` did to a model, by its `Targets`."""
    config, adapted = model.dylora_config, targets.adapted
    paths = layer_paths(model)
    linear = [
        path
        for path, layer in paths.items()
        if path in adapted or isinstance(layer, tuple(ADAPTED_CLASSES))
    ]
    # Custom weights count: experts, for one, are no `Dense` layers.
    body = sum(
        math.prod(v.shape)
        for path, layer in paths.items()
        if path not in targets.trained
        and not type(layer).__name__.endswith("Embedding")
        for v in without_adapters(_keras.own_weights(layer), adapted.values())
        if len(v.shape) > 1
    )
    covered = sum(math.prod(x.kernel.shape) for x in adapted.values())
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
        full = [path for path, trained in targets.trained.items() if trained]
        line += f", {in_full:,} of them in full: {', '.join(full)}"
    reasons = {}
    for path, reason in targets.left_out.items():
        reasons.setdefault(reason, []).append(path)
    for reason, left_out in reasons.items():
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        line += f"; left out: {left_out[0]}{more}, which {reason}"
    return line


def tables(model):
    """The adapted layers of a model, and its sizes by rank, as text."""
    layers = Table(box=box.SIMPLE_HEAD)
    layers.add_column("adapted layer", overflow="fold")
    for name in ("matrix", "rank", "parameters"):
        layers.add_column(name, justify="right")
    rank = model.dylora_config.rank
    for path, layer in model._dylora.layers.items():
        inputs, outputs = matrix_shape(layer)
        size = f"{rank * (inputs + outputs):,}"
        layers.add_row(path, f"{inputs} x {outputs}", str(rank), size)
    by_rank = Table(box=box.SIMPLE_HEAD)
    for name in ("rank", "trained parameters", "bytes"):
        by_rank.add_column(name, justify="right")
    for b in range(1, rank + 1):
        size = parameters(model, b)
        by_rank.add_row(str(b), f"{size:,}", f"{BYTES * size:,}")
    named, shown = model._dylora.named, [layers, by_rank]
    if not named.is_plain:
        adapters = Table(box=box.SIMPLE_HEAD)
        adapters.add_column("adapter", overflow="fold")
        adapters.add_column("highest rank", justify="right")
        for name in named.names:
            active = " (active)" if name == named.active else ""
            adapters.add_row(f"{name}{active}", str(named.rank_of(name)))
        shown.insert(0, adapters)
    return text(*shown)

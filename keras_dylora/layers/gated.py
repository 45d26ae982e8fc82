"""The bottleneck `x @ down`, times its gate or its core."""

from keras import ops


def gated(layer, bottleneck, gate, kept):
    """`bottleneck * gate`, or `bottleneck @ core`, as a matrix.

    Args:
        layer: the adapted layer, which a message names.
        bottleneck: `(rows, rank)`.
        gate: a gate or a core, as `GateRow.value` gives it.
        kept: the axes of the input that aren't multiplied. The rows of the
            bottleneck are these axes, flattened.
    """
    rank = bottleneck.shape[-1]
    if len(gate.shape) == 1:
        return bottleneck * gate
    tuned = len(gate.shape) == 3
    if tuned and gate.shape[0] == 1:
        return bottleneck @ gate[0]
    gate = _of_examples(layer, gate, kept)
    if tuned:
        shape = (ops.shape(gate)[0], -1, rank)
        bottleneck = ops.reshape(bottleneck, shape) @ gate
    else:
        gate = ops.reshape(gate, (-1, *(1,) * (len(kept) - 1), rank))
        bottleneck = ops.reshape(bottleneck, (*kept, rank)) * gate
    return ops.reshape(bottleneck, (-1, rank))


def _of_examples(layer, gate, kept):
    """The gate or core of each row of an input, from those of the examples.

    An input may have several rows for each example, next to one another: beam
    search folds its beams into the batch, and other models fold their windows
    or tokens.
    """
    size, rows = ops.shape(gate)[0], kept[0]
    if isinstance(size, int) and isinstance(rows, int):
        size = max(size, 1)
        if rows % size:
            raise ValueError(
                "With a rank for each example, the input of every adapted "
                "layer must have the examples along its first axis. Use "
                "`draw='step'` or other `target_layers`. Received: an "
                f"input of shape {(*kept, *layer._geometry.inputs)} of "
                f"{layer.path} for {size} examples"
            )
        copies = rows // size
        if copies > 1:
            layer._gate.warn_of_rows(layer.path, kept, size)
    else:
        copies = rows // ops.maximum(size, 1)
    if not isinstance(copies, int) or copies > 1:
        gate = ops.repeat(gate, copies, axis=0)
    return gate

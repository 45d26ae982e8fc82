"""The gates of an artifact: of each rank, and of each adapter."""

import numpy as np
import tensorflow as tf

from keras_dylora.export.plan import Served
from keras_dylora.layers.tuned import find


class Gates:
    """The gates of a plan's ranks: one for all layers, or one for each.

    If a rank is tuned, cores replace the gates; see `TunedCut`.

    If several adapters are served, the layers hold the columns of all side by
    side, and a gate opens those of one adapter.

    Args:
        plan: `Plan`.
        scale: the `Scale` of the model.
        layers: dict of path to adapted layer.
        cuts: list of the `TunedCut`s of each adapter.
    """

    def __init__(self, plan, scale, layers, cuts):
        self.plan, self.paths = plan, list(layers)
        every = [Served("", b, b) for b in range(1, plan.highest + 1)]
        ranks = {x.value: x.ranks(layers) for x in [*every, *plan.ranks]}
        tuned = {
            (i, b): find(own, each)
            for i, own in enumerate(cuts)
            for b, each in ranks.items()
        }
        self.tuned = any(tuned.values())
        self.by_layer = (
            plan.by_layer
            or self.tuned
            or any(x.rank < scale.rank for x in layers.values())
        )
        self.names = [x.name for x in plan.adapters]
        widths = [x.rank for x in plan.adapters] or [scale.rank]
        self.own = [x.value for x in plan.ranks if x.by_layer]
        gates = {
            b: scale.gate([*each.values()] if self.by_layer else b)
            for b, each in ranks.items()
        }
        shape = (sum(widths),)
        if self.by_layer:
            shape = len(layers), *shape
        if self.tuned:
            shape = *shape, *shape[1:]
        size = len(widths), max(gates) + 1
        self.shape = shape
        self.table = np.zeros((*size, *shape), "float32")
        self.known = np.zeros(size, bool)
        start = 0
        for i, width in enumerate(widths):
            for b, gate in gates.items():
                gate = np.asarray(gate)
                if gate[..., width:].any():
                    continue  # above the rank of this adapter
                self.known[i, b] = True
                own = slice(start, start + width)
                if self.tuned:
                    cores = gate[..., None] * np.eye(scale.rank)
                    if (cut := tuned[i, b]) is not None:
                        cores = np.stack([cut.core(p, scale) for p in layers])
                    self.table[i, b, :, own, own] = cores[:, :width, :width]
                else:
                    self.table[i, b, ..., own] = gate[..., :width]
            start += width

    def by_path(self, gate, batched):
        """Dict of path to what its layer reads, from one row of the table.

        If `batched`, `gate` has a row for each example.
        """
        axes = 2 if self.tuned else 1
        found = {}
        for i, path in enumerate(self.paths):
            each = gate[(..., i, *[slice(None)] * axes)]
            alone = self.tuned and not batched
            found[path] = each[None] if alone else each
        return found

    def of(self, served):
        """The gate at a rank of the only adapter, in NumPy."""
        return self.table[0, served.value]

    def highest(self, index):
        """The highest served rank of the adapter of each example."""
        largest = [
            [x.value for x in self.plan.ranks if self.known[i, x.value]][-1]
            for i in range(len(self.known))
        ]
        return tf.gather(tf.constant(largest, tf.int32), index)

    def index(self, adapter, batch):
        """The index of the adapter of each example, from one name or several.

        If `adapter` is `None`, there is only one adapter.
        """
        if adapter is None:
            return tf.zeros([batch], tf.int32)
        adapter = tf.reshape(adapter, [-1])
        found = tf.equal(adapter[:, None], tf.constant(self.names))
        checks = [
            tf.debugging.Assert(
                tf.reduce_all(tf.reduce_any(found, axis=-1)),
                [f"`adapter` must be one of {self.names}. Received:", adapter],
            ),
            _one_or_each("adapter", adapter, batch),
        ]
        with tf.control_dependencies(checks):
            index = tf.argmax(found, axis=-1, output_type=tf.int32)
            return tf.broadcast_to(index, [batch])

    def rows(self, rank, index, batch):
        """The gates of the examples, from a scalar rank or one per example."""
        rank, high = tf.reshape(rank, [-1]), self.plan.highest
        checks = [_one_or_each("rank", rank, batch)]
        with tf.control_dependencies(checks):
            rank = tf.broadcast_to(rank, [batch])
        inside = (rank >= 0) & (rank < self.known.shape[1])
        place = tf.stack([index, tf.where(inside, rank, 0)], axis=-1)
        rule = f"between 1 and {high}"
        if self.own:
            rule += f" or one of {self.own}"
        if self.names:
            rule += ", and not above the rank of its adapter"
        known = tf.gather_nd(tf.constant(self.known), place)
        check = tf.debugging.Assert(
            tf.reduce_all(known & inside),
            [f"`rank` must be {rule}. Received:", rank],
        )
        with tf.control_dependencies([check]):
            return tf.gather_nd(tf.constant(self.table), place)


def _one_or_each(name, values, batch):
    size = tf.size(values)
    return tf.debugging.Assert(
        (size == 1) | (size == batch),
        [f"`{name}` must be a scalar or one for each example. Received:",
         size, f"values of `{name}` for a batch of", batch],
    )  # fmt: skip

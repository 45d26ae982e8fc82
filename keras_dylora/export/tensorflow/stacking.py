"""Several adapters of a model as one, with all columns side by side."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf

from keras_dylora import _keras
from keras_dylora.config import AdapterArguments
from keras_dylora.export.tensorflow import stored_variables
from keras_dylora.layers.factors import float32_array
from keras_dylora.layers.gate import GateRow, RankGate
from keras_dylora.layers.tree import Tree
from keras_dylora.live.model import adaptation_of


def stack(model, adapters, dtype):
    """Stacks the adapters of a model, which can't be used or trained then.

    Args:
        model: an enabled model.
        adapters: tuple of `ServedAdapter`.
        dtype: str or `None`. The dtype in which wider parameters of a head are
            stored.

    Returns:
        `Heads`, the other weights in which the adapters differ.
    """
    adaptation = adaptation_of(model)
    layers = adaptation.layers.values()
    tree = Tree(model)
    head = adaptation.spec.head(tree)
    factors, values = [], []
    for each in adapters:
        model.set_adapter(each.name)
        factors.append([x.factors(each.rank).padded(each.rank) for x in layers])
        values.append([float32_array(v) for v in head.values()])
    rank = sum(each.rank for each in adapters)
    config = dataclasses.replace(adaptation.config, rank=rank)
    gate = RankGate([rank] * len(layers), config.scale)
    for i, (layer, own) in enumerate(
        zip(layers, zip(*factors, strict=True), strict=True)
    ):
        row = GateRow(gate, i)
        layer.truncate(AdapterArguments.of(config), row, layer.factors(0))
        layer.down.assign(np.hstack([x.down for x in own]))
        layer.up.assign(np.vstack([x.up for x in own]))
    stacked = {
        id(variable): (variable, tf.cast(np.stack(each), variable.dtype))
        for variable, each in zip(
            head.values(), zip(*values, strict=True), strict=True
        )
        if any(np.any(x != each[0]) for x in each)
    }
    return Heads(tree, stacked, dtype)


class Heads:
    """The layers that are trained in full, once for each adapter.

    Each layer is called with the weights of every adapter. Each example gets
    the outputs of its own adapter.
    """

    def __init__(self, tree, stacked, dtype):
        self._variables = {
            key: (variable, tf.Variable(stored_variables.narrowed(x, dtype)))
            for key, (variable, x) in stacked.items()
        }
        self._owners = [
            layer
            for layer in tree.layers.values()
            if any(id(v) in stacked for v in _keras.own_weights(layer))
        ]

    @contextlib.contextmanager
    def of(self, index, stored):
        """Within a `with` block, each example is called with its own head.

        `index` is the index of its adapter. `stored` has the values that are
        read instead of other variables.
        """
        for layer in self._owners:
            call = functools.partial(self._call, layer.call, index, stored)
            layer.__dict__["call"] = functools.wraps(layer.call)(call)
        try:
            yield
        finally:
            for layer in self._owners:
                del layer.__dict__["call"]

    def _call(self, call, index, stored, *args, **kwargs):
        outputs = []
        some = next(iter(self._variables.values()))[1]
        for i in range(some.shape[0]):
            own = {k: (v, x[i]) for k, (v, x) in self._variables.items()}
            with stored_variables.reading({**stored, **own}):
                outputs.append(call(*args, **kwargs))
        return keras.tree.map_structure(
            lambda *each: _chosen(tf.stack(each), index), *outputs
        )


def _chosen(outputs, index):
    """Selects from `(adapters, rows, …)` the rows of each example's adapter.

    An example may have several rows, as beam search folds its beams into the
    batch.
    """
    rows = tf.shape(outputs)[1]
    index = tf.repeat(index, rows // tf.maximum(tf.size(index), 1))
    return tf.gather_nd(outputs, tf.stack([index, tf.range(rows)], axis=-1))

"""The gates that adapted layers read: one variable, one row per layer."""

import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from keras_dylora import ranks
from keras_dylora.layers.torch_product import ON_TORCH, GateRows


class RankGate:
    """The gates of the adapted layers of a model, one row per layer.

    All rows are in one variable, so a change of ranks neither retraces nor
    recompiles anything. The variable isn't a weight, as it is state that isn't
    learned. `max_ranks` is a list of the maximum rank of each layer. `scale` is
    the `Scale` of all layers; its rank is at least each of `max_ranks`.
    """

    def __init__(self, max_ranks, scale):
        self.max_ranks, self.scale = max_ranks, scale
        self.override = {}  # by row, the value that a layer reads instead
        self.chosen = False  # whether a step or a `rank_scope` set the rank
        self.folds = False  # whether a step had more rows than examples
        self.read = set()  # the rows that a call has read
        self.tuned = True  # whether layers read the cores, if there are any
        self.changed = None  # called without arguments after `set_rank`
        self.cores = None  # a variable, once there is a tuned cut
        self.variable = keras.Variable(
            # Callable, as a layer may be built while JAX traces.
            lambda shape, dtype: scale.gate(max_ranks),
            shape=(len(max_ranks), scale.rank),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="gate",
        )
        self._rows = GateRows() if ON_TORCH else None
        self._core_rows = GateRows() if ON_TORCH else None

    @property
    def variables(self):
        """Dict of name to variable."""
        found = {"gate": self.variable}
        return found if self.cores is None else {**found, "core": self.cores}

    @property
    def active_ranks(self):
        """The rank of each layer, a list of int.

        The ranks are read from the variable, as a checkpoint may set it. Traced
        functions can't read them.
        """
        gates = ops.convert_to_numpy(self.variable)
        return np.count_nonzero(gates, axis=1).tolist()

    def set_rank(self, rank):
        """Sets one rank for all layers, up to the maximum of each."""
        self.set_ranks([min(rank, most) for most in self.max_ranks])

    def set_ranks(self, active_ranks):
        """Sets the rank of each layer, a list of int in `0..maximum`."""
        self.assign_ranks(active_ranks)
        if self.changed is not None:
            self.changed()

    def assign_ranks(self, active_ranks):
        """Sets the ranks without calling `changed`, as the caller does more."""
        checked = [
            ranks.as_rank(b, 0, most)
            for b, most in zip(active_ranks, self.max_ranks, strict=True)
        ]
        self.variable.assign(self.scale.gate(checked))

    def set_cores(self, cores):
        """Sets the cores that layers use instead of the gates.

        `cores` is `(layers, rank, rank)`.
        """
        if self.cores is None:
            self.cores = keras.Variable(
                cores,
                dtype="float32",
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name="core",
            )
        else:
            self.cores.assign(cores)

    def rescale(self, scale):
        """Takes another `Scale` of the same rank, and keeps the ranks."""
        active_ranks, self.scale = self.active_ranks, scale
        self.set_ranks(active_ranks)

    def row(self, index, dtype):
        """The gate or core of one layer, as `GateRow.value` describes it.

        Its shape is `(rank,)`, or `(1, rank, rank)` with cores. Traced
        functions can read it.
        """
        if self.cores is not None and self.tuned:
            return _read(self.cores, self._core_rows, index, dtype)[None]
        return _read(self.variable, self._rows, index, dtype)

    def newest(self, index):
        """A mask `(rank,)`, true at the column of the rank of one layer."""
        if self._rows:
            return self._rows.newest(self.variable, index)
        return ranks.newest(ops.convert_to_tensor(self.variable)[index])

    def assign(self, rows):
        """Sets the gates of a step, a list of a `(rank,)` for each layer."""
        if all(row is rows[0] for row in rows):
            value = ops.broadcast_to(rows[0], self.variable.shape)
        else:
            value = ops.stack(rows)
        self.variable.assign(value)


@dataclasses.dataclass(frozen=True)
class GateRow:
    """The row of a `RankGate` that one layer reads."""

    gate: RankGate
    index: int = 0

    def value(self, dtype):
        """The gate of the layer, or the core that replaces it.

        A gate is `(rank,)`, or `(batch, rank)` if each example has a rank of
        its own. A core is `(1, rank, rank)`, or `(batch, rank, rank)`. `rank`
        is the maximum of the layer.
        """
        self.gate.read.add(self.index)
        if self.override is not None:
            value = ops.cast(self.override, dtype)
        else:
            value = self.gate.row(self.index, dtype)
        most = self.gate.max_ranks[self.index]
        if most == self.gate.scale.rank:
            return value
        own = slice(most)
        return (
            value[..., own, own] if len(value.shape) == 3 else value[..., own]
        )

    def newest(self):
        """A mask `(rank,)`, true at the column of the active rank."""
        if self.override is not None:
            found = ranks.newest(self.override)
        else:
            found = self.gate.newest(self.index)
        return found[: self.gate.max_ranks[self.index]]

    @property
    def override(self):
        """The value that the layer reads instead of its row, or `None`."""
        return self.gate.override.get(self.index)

    @property
    def active_rank(self):
        return self.gate.active_ranks[self.index]

    def warn_unless_chosen(self, path):
        """Warns once if a layer trains and nobody chose its rank."""
        if self.gate.chosen or self.override is not None:
            return
        self.gate.chosen = True
        warnings.warn(
            "Only a model that is enabled itself, or is a `DyLoRAModel`, "
            "draws ranks in `fit`; in a training loop of your own, "
            "`model.draw_ranks` does. A model around an enabled one doesn't: "
            "use `disable_dylora`, then enable the outer model. Received: "
            f"a training call of {path}, which trains at its active rank alone",
            stacklevel=2,
        )

    def warn_of_rows(self, path, axes, examples):
        """Warns once if a step has more rows than examples."""
        if not self.gate.chosen or self.gate.folds:
            return
        self.gate.folds = True
        warnings.warn(
            "With a rank for each example, more rows than examples are taken "
            "as windows or tokens: all rows of the first example, then all of "
            "the second. If the rows are several batches, one after another, "
            "such as chosen and rejected texts, use `draw='step'`. "
            "Received: an input of axes "
            f"{tuple(axes)} of {path} for {examples} examples",
            stacklevel=2,
        )

    def set_rank(self, rank):
        """Sets the rank of only this layer."""
        active_ranks = self.gate.active_ranks
        active_ranks[self.index] = rank
        self.gate.set_ranks(active_ranks)


def _read(variable, rows, index, dtype):
    if rows:
        return rows.row(variable, index, dtype)
    return ops.cast(ops.convert_to_tensor(variable)[index], dtype)

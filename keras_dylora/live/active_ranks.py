"""ActiveRanks: the ranks that the layers of a model compute at."""

import contextlib
import warnings
from typing import Any

import numpy as np
from keras import ops

from keras_dylora import _keras, training
from keras_dylora import ranks as rank_functions
from keras_dylora.cuts import are_ordered, users_line, warn_of_cut
from keras_dylora.layers.tuned import find
from keras_dylora.live.recompile import reset_functions
from keras_dylora.training.full_rank import at_full_rank


class ActiveRanks:
    """The part of an `Adaptation` that reads and sets the ranks of layers.

    A rank is an int for all layers, or a dict of path to int.
    """

    model: Any
    config: Any
    layers: dict[str, Any]
    named: Any
    training: bool
    ranks_drawn: Any

    @property
    def max_rank(self):
        """int. The maximum rank of the live adapter."""
        return self.named.max_rank

    @property
    def max_ranks(self):
        """Dict of path to the maximum rank of the layer in the live adapter."""
        highest = self.max_rank
        return {p: min(x.rank, highest) for p, x in self.layers.items()}

    def by_layer(self, ranks, low=0):
        """Dict of path to rank, checked; see `ranks.by_layer`."""
        return rank_functions.by_layer(ranks, self.max_ranks, low)

    def by_maximum(self, gate_of):
        """Dict of path to the result of a function of the layer's maximum rank.

        The function is called once for each maximum.
        """
        found = {b: gate_of(b) for b in {x.rank for x in self.layers.values()}}
        return {path: found[x.rank] for path, x in self.layers.items()}

    @property
    def lowest_trained(self):
        """int. The lowest trained rank: the maximum in `full_rank_steps`.

        In a run whose other steps all tune, it is the maximum too.
        """
        # The position is read last, as reading it waits for the device.
        begun = at_full_rank(self) and ops.convert_to_numpy(self.ranks_drawn)
        lowest = self.config.min_rank
        if begun or not self.config.draws_ranks:
            lowest = self.config.rank
        return min(lowest, self.max_rank)

    @property
    def is_ordered(self):
        """Whether a cut to any rank is a good one."""
        return are_ordered(self._factors())

    def warn_of_cut(self, *ranks):
        """Warns if a rank, or the rank of one layer, is a bad cut.

        All functions that compute or write at ranks from the user call this
        first. It raises what `ranks.by_layer` raises. `None` is the maximum.
        """
        training.write_back(self.model)
        by_layer = [self.by_layer(rank) for rank in ranks if rank is not None]
        highest = self.max_ranks
        every = (
            b
            for each in by_layer
            if find(self.named.cuts, each) is None
            for path, b in each.items()
            if b < highest[path]
        )
        warn_of_cut(every, self.lowest_trained, self._factors)

    def _factors(self):
        return [layer.factors() for layer in self.layers.values()]

    def tuned_cut(self, ranks):
        """The `TunedCut` of ranks, or `None`."""
        return find(self.named.cuts, self.by_layer(ranks))

    def set_tuned_cuts(self, cuts):
        """Replaces the tuned cuts of the live adapter.

        From the first cut on, the layers read cores. Functions that were traced
        before read gates, so they are made anew.
        """
        self.named.cuts, self.named.tuning = list(cuts), ()
        for gate in self.gates if cuts else ():
            gate.tuned = True
        if cuts and any(gate.cores is None for gate in self.gates):
            for gate in self.gates:
                gate.set_cores(_diagonal(gate.variable))
                gate.changed = self._set_cores
            _keras.track_for_torch(self.model)
            reset_functions(self.model)
        self._set_cores()

    def has_stale_cuts(self):
        """Whether there are tuned cuts whose columns training would move."""
        return bool(self.named.cuts) and any(
            v.trainable for x in self.layers.values() for v in (x.down, x.up)
        )

    def drop_tuned_cuts(self):
        """Drops the tuned cuts of the live adapter, and warns.

        No variable changes, so a traced function can call this.
        """
        warnings.warn(
            "Training moves the columns that cuts are tuned for, so tuned cuts "
            "are dropped: call `tune_ranks` once more after training. "
            f"Received: a step of a model with {len(self.named.cuts)} cuts",
            stacklevel=users_line(),
        )
        self.named.cuts, self.named.tuning = [], ()
        for gate in self.gates:
            gate.tuned = False
        reset_functions(self.model)

    def _set_cores(self, ranks=None):
        """Sets the cores to the cut of ranks, by default the current ones."""
        if all(gate.cores is None for gate in self.gates):
            return
        cut = find(self.named.cuts, self.ranks if ranks is None else ranks)
        if cut is None:
            for gate in self.gates:
                gate.set_cores(_diagonal(gate.variable))
            return
        cores = {p: cut.core(p, self.config.scale) for p in self.layers}
        for gate, rows in self.by_gate(cores).items():
            gate.set_cores(np.stack(rows))

    def factors(self, ranks):
        """Dict of path to the `Factors` of a layer at some ranks."""
        ranks = self.by_layer(ranks)
        cut, scale = find(self.named.cuts, ranks), self.config.scale
        return {
            p: x.factors().cut(ranks[p], scale, cut and cut.sides(p))
            for p, x in self.layers.items()
        }

    def gates_at(self, ranks):
        """Dict of path to a layer's gate or core at ranks, for `overridden`."""
        ranks, scale = self.by_layer(ranks), self.config.scale
        cut = None if self.training else find(self.named.cuts, ranks)
        if cut is not None:
            cores = {p: cut.core(p, scale)[None] for p in self.layers}
            return {p: ops.convert_to_tensor(x) for p, x in cores.items()}
        gates = {b: scale.gate(b) for b in set(ranks.values())}
        return {path: gates[b] for path, b in ranks.items()}

    @contextlib.contextmanager
    def at(self, ranks):
        """Sets the ranks of the layers within a `with` block."""
        training.write_back(self.model)
        state = [v for x in self.gates for v in x.variables.values()]
        before = [(v, ops.copy(v)) for v in state]
        try:
            self.set_ranks(ranks)
            with self.rank_chosen():
                yield
        finally:
            training.write_back(self.model)
            for variable, value in before:
                variable.assign(value)

    @property
    def gates(self):
        """The `RankGate` of all layers, or one for each hand-built layer."""
        gates = [layer._gate.gate for layer in self.layers.values()]
        return list({id(gate): gate for gate in gates}.values())

    @property
    def ranks(self):
        """The rank that each layer computes at, a dict of path to int."""
        gates = {id(gate): gate.active_ranks for gate in self.gates}
        rows = {path: layer._gate for path, layer in self.layers.items()}
        return {p: gates[id(x.gate)][x.index] for p, x in rows.items()}

    def set_ranks(self, ranks):
        """Sets the ranks: a dict of path to int, or one int for all."""
        ranks = self.by_layer(ranks)
        for gate, rows in self.by_gate(ranks).items():
            gate.assign_ranks(rows)
        self._set_cores(ranks)

    def assign_gates(self, gates):
        """Sets the gates of a step, a dict of path to `(rank,)`."""
        for gate, rows in self.by_gate(gates).items():
            gate.assign(rows)

    def overridden(self, value):
        """Within a `with` block, layers read a tensor instead of their gates.

        The tensor is like `GateRow.value`. It can also be a dict of path to
        such tensors.
        """
        if not isinstance(value, dict):
            value = dict.fromkeys(self.layers, value)
        rows = self.by_gate(value)
        rows = {gate: dict(enumerate(each)) for gate, each in rows.items()}
        return self._gates_with("override", rows)

    def untuned(self):
        """Within a `with` block, layers read their gates, as in training."""
        return self._gates_with("tuned", dict.fromkeys(self.gates, False))

    def rank_chosen(self):
        """Within a `with` block, layers know that their rank is intended."""
        return self._gates_with("chosen", dict.fromkeys(self.gates, True))

    def by_gate(self, values):
        """Dict of gate to the list of values of its layers, in their order.

        `values` is a dict of path to value.
        """
        found = {}
        for path, layer in self.layers.items():
            row = layer._gate
            found.setdefault(row.gate, {})[row.index] = values[path]
        return {
            g: [rows[i] for i in range(len(rows))] for g, rows in found.items()
        }

    @contextlib.contextmanager
    def _gates_with(self, attribute, values):
        before = [(gate, getattr(gate, attribute)) for gate in values]
        for gate, value in values.items():
            setattr(gate, attribute, value)
        try:
            yield
        finally:
            for gate, previous in before:
                setattr(gate, attribute, previous)


def _diagonal(variable):
    """Gates `(layers, rank)` as diagonal cores."""
    gates = ops.convert_to_tensor(variable)
    return gates[:, :, None] * ops.eye(gates.shape[-1], dtype="float32")

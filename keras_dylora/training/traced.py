"""A step on torch that is traced whole: a graph without Python, replayed.

Nothing here knows about ranks. A model's own `train_step`, with its `backward`
and its optimizer, is traced as JAX would do it: all variables are inputs and
outputs. `docs/traced.md` explains how.
"""

import linecache
import traceback
import warnings

import keras
import numpy as np
import torch
import torch._inductor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from keras_dylora._keras.tracing import (
    changed_besides,
    storage,
    traceable,
    written,
)
from keras_dylora.training.graph import fold, simplify

SHAPES = 8  # the number of shapes of batches; steps on others are eager


class TracedStep:
    """A function of a batch that changes variables, as a replayed graph.

    It is traced again for a batch of other shapes, dtypes or structure, and if
    other variables are trained. A value that changes, such as a rank or a
    learning rate, needs no new trace.

    Args:
        step: function of `[batch]` that returns logs or predictions.
        variables: list of all variables that the step may read or change.
        name: str. The name of the model, for warnings.
        compiled: bool. Whether Inductor, torch's compiler, compiles the graph,
            which takes a minute and makes it faster. Defaults to `False`: it
            runs the operations of the eager step, one after another.
    """

    def __init__(self, step, variables, name, compiled=False):
        self.step = step
        self.variables = variables
        self.name = name
        self.compiled = compiled
        self.traces = {}  # by all that a trace depends on; `None` is eager

    def __call__(self, data):
        # Leaves that are `None`, such as sample weights, are left out.
        leaves, structure = _pytree.tree_flatten(data[0])
        places = tuple(i for i, x in enumerate(leaves) if x is not None)
        batch, structure = [leaves[i] for i in places], (structure, places)
        if not all(map(is_array, batch)):
            return self.step(data)
        # A graph relies on the strides of what it was traced with.
        batch = [keras.ops.convert_to_tensor(x).contiguous() for x in batch]
        key = (
            structure,
            *((x.shape, x.dtype, x.device) for x in batch),
            self.variables[0].value.device,
            *(v.trainable for v in self.variables),
        )
        if key not in self.traces:
            self.traces[key] = self._trace(batch, structure)
        trace = self.traces[key]
        return self.step(data) if trace is None else trace(batch)

    def _trace(self, batch, structure):
        if len(self.traces) >= SHAPES:
            if len(self.traces) == SHAPES:
                warnings.warn(
                    "Steps on further shapes of batches run eagerly: pad "
                    "batches, or sort them into a few lengths. Received: "
                    f"{[tuple(x.shape) for x in batch]} after {SHAPES} others",
                    stacklevel=2,
                )
            return None
        try:
            return _Trace(
                self.step, batch, structure, self.variables, self.compiled
            )
        except (RuntimeError, TypeError, ValueError) as error:
            warnings.warn(
                "A step that can't be traced runs eagerly. "
                f"Received: {self.name}{_place(error)}: "
                f"{type(error).__name__}: {str(error).strip()[:300]}",
                stacklevel=2,
            )
        return None


class _Trace:
    """A graph of one step, which is called with the tensors of a batch."""

    def __init__(self, step, batch, structure, state, compiled):
        self.values = [v.value for v in state]

        def traced(*tensors):
            leaves = [
                x.detach().requires_grad_() if v.trainable else x.detach()
                for v, x in zip(state, tensors[: len(state)], strict=True)
            ]
            batch = tensors[len(state) :]
            pairs = list(zip(state, leaves, strict=True))
            with (
                keras.StatelessScope(
                    # Such as losses of activity regularization.
                    collect_losses=True,
                    state_mapping=pairs,
                ) as scope,
                written() as storages,
            ):
                logs = step([_batch(batch, *structure)])
            if changed_besides(scope, state):
                raise ValueError("a variable that the model doesn't list")
            after = [scope.get_current_value(v) for v in state]
            if any(x.grad is not None for x in leaves) and not any(
                x is not leaf or storage(leaf) in storages
                for v, x, leaf in zip(state, after, leaves, strict=True)
                if v.trainable
            ):
                raise ValueError(
                    "gradients that no Keras optimizer of the model applies"
                )
            taken = {storage(x) for x in leaves}
            logs, self.structure = _pytree.tree_flatten(logs)
            self.logs = len(logs)
            for x in logs:
                if not isinstance(x, torch.Tensor):
                    raise TypeError(f"a result that is no tensor: {x!r}")
            # A variable that is changed in place is still the leaf.
            new = [
                (value, x)
                for value, x, leaf in zip(
                    self.values, after, leaves, strict=True
                )
                if x is not leaf
            ]
            self.changed = [value for value, _ in new]
            return [_apart(x, taken) for x in (*logs, *(x for _, x in new))]

        with traceable(state):
            graph = make_fx(
                traced, tracing_mode="fake", _allow_non_fake_inputs=True
            )(*self.values, *batch)
        _check_constants(graph, state)
        fold(graph)
        self.graph = graph
        self.call = self._compile if compiled else self._as_it_is()

    def _compile(self, *tensors):
        """The first call, which compiles the graph for later calls."""
        try:
            # As `torch.compile` does, but what it would guard is known here.
            self.call = torch._inductor.compile(self.graph, list(tensors))
        except Exception as error:  # of any part of the compiler
            warnings.warn(
                "A step that can't be compiled runs as it is traced. "
                f"Received: {type(error).__name__}: {str(error).strip()[:300]}",
                stacklevel=2,
            )
            self.call = self._as_it_is()
        return self.call(*tensors)

    def _as_it_is(self):
        simplify(self.graph)
        return self.graph

    def __call__(self, batch):
        with torch.no_grad():
            found = self.call(*self.values, *batch)
            logs, after = found[: self.logs], found[self.logs :]
            if self.changed:
                torch._foreach_copy_(self.changed, after)
        return _pytree.tree_unflatten(logs, self.structure)


def _batch(tensors, structure, places):
    leaves = [None] * structure.num_leaves
    for i, x in zip(places, tensors, strict=True):
        leaves[i] = x
    return _pytree.tree_unflatten(leaves, structure)


def is_array(x):
    return isinstance(x, torch.Tensor) or (
        isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biuf"
    )


def _place(error):
    """The innermost layer that an error comes from, and the line in it."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, keras.Layer) and "call" in frame.f_code.co_name:
            code = linecache.getline(frame.f_code.co_filename, line).strip()
            place = f", `{code}` in {layer.path}"
    return place


def _apart(x, taken):
    """A result that shares no memory with the state, which will change."""
    x = x.detach()
    return x.clone() if storage(x) in taken else x


def _check_constants(graph, state):
    """Raises a `ValueError` if a constant of a graph is a variable's value.

    All steps would use the value of now.
    """
    own = {v.value.untyped_storage().data_ptr(): v.path for v in state}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        if not isinstance(value, torch.Tensor):
            continue
        path = own.get(value.untyped_storage().data_ptr())
        if path is not None or isinstance(value, torch.nn.Parameter):
            raise ValueError(
                f"a weight that is read past Keras's variables: {path}"
            )

"""Steps of Keras on torch without work on the host, so they can be traced.

Three functions of Keras's backend read values: `cond` is a Python `if`,
`int(tensor)` seeds a generator of random numbers, and a tensor says where a
`slice` begins.
"""

import contextlib
import threading

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope


@contextlib.contextmanager
def traceable(variables):
    """In a `with` block, a step reads no value on the host, in this thread.

    Both branches of a `cond` are computed, on copies of the variables, and what
    they return and assign is selected. Random numbers come from torch's own
    generator; Keras's seeds advance as usual.

    Args:
        variables: list of variables that a branch may assign.
    """
    import torch
    from keras.src.backend.torch import core, random

    own_cond, own_generator = core.cond, random.torch_seed_generator
    own_slice = core.slice
    thread = threading.get_ident()

    def cond(pred, true_fn, false_fn):
        here = threading.get_ident() == thread
        if not here or not isinstance(pred, torch.Tensor):
            return own_cond(pred, true_fn, false_fn)
        scope = get_stateless_scope()
        now = [scope.get_current_value(v) for v in variables]
        pred = pred.bool()
        (on, with_it), (off, without) = (
            _branch(function, variables, now)
            for function in (true_fn, false_fn)
        )
        for variable, value, a, b in zip(
            variables, now, with_it, without, strict=True
        ):
            if a is not None or b is not None:
                chosen = torch.where(
                    pred,
                    (value if a is None else a).detach(),
                    (value if b is None else b).detach(),
                )
                scope.add_update((variable, chosen.to(value.dtype)))
        if on is None:
            return None
        return keras.tree.map_structure(
            lambda a, b: torch.where(
                pred, torch.as_tensor(a), torch.as_tensor(b)
            ),
            on,
            off,
        )

    def generator(seed):
        if threading.get_ident() != thread:
            return own_generator(seed)
        random.draw_seed(seed)
        return None  # torch's own

    def slice_(inputs, start_indices, shape):
        here = threading.get_ident() == thread
        if not here or all(isinstance(x, int) for x in start_indices):
            return own_slice(inputs, start_indices, shape)
        found = core.convert_to_tensor(inputs)
        for axis, (start, size) in enumerate(
            zip(start_indices, shape, strict=True)
        ):
            places = torch.arange(size, device=found.device) + start
            found = torch.index_select(found, axis, places)
        return found

    core.cond, random.torch_seed_generator = cond, generator
    core.slice = slice_
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        core.cond, random.torch_seed_generator = own_cond, own_generator
        core.slice = own_slice


def _branch(function, variables, now):
    """The outputs of a branch, and the new values of variables, if any."""
    start = [value.detach().clone() for value in now]
    pairs = list(zip(variables, start, strict=True))
    with (
        written() as storages,
        keras.StatelessScope(state_mapping=pairs) as scope,
    ):
        outputs = function()
    after = [scope.get_current_value(v) for v in variables]
    return outputs, [
        None if x is value and storage(x) not in storages else x
        for x, value in zip(after, start, strict=True)
    ]


def changed_besides(scope, variables):
    """Whether a `StatelessScope` has values of other variables."""
    return bool(scope.state_mapping.keys() - {id(v) for v in variables})


def storage(tensor):
    """An id that tensors share if they share memory, even traced ones."""
    return tensor.untyped_storage()._cdata


def written():
    """A context that yields the `storage` of each tensor changed in place."""
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Writes(TorchDispatchMode):
        def __enter__(self):
            super().__enter__()
            self.storages = set()
            return self.storages

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            given = dict(zip(func._schema.arguments, args, strict=False))
            for argument in func._schema.arguments:
                if argument.alias_info and argument.alias_info.is_write:
                    value = given.get(argument, kwargs.get(argument.name))
                    for x in _pytree.tree_leaves(value):
                        self.storages.add(storage(x))
            return func(*args, **kwargs)

    return Writes()

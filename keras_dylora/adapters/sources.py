"""The adapters to combine: read, given the paths of one model, compared."""

import dataclasses
import functools
import pathlib

import numpy as np

from keras_dylora.adapters import native
from keras_dylora.adapters.identity import Identity
from keras_dylora.adapters.peft import files as peft_files
from keras_dylora.adapters.peft import load as peft_load
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.live.model import DyLoRAModel, adaptation_of
from keras_dylora.live.targets import listing


def read(key, tree, head):
    """Reads the adapter that a key names, at the rank at which it counts."""
    enabled = tree is not None and isinstance(tree.model, DyLoRAModel)
    names = tree.model.adapter_names if enabled else []
    if key in names:
        whole = AdapterWeights.of(tree, key)
        ranks = adaptation_of(tree.model).named.ranks_of(key)
        return whole.cut(ranks) if len(set(ranks.values())) > 1 else whole
    folder = pathlib.Path(key)
    if enabled and not folder.exists():
        raise ValueError(
            "A key must be the name of an adapter of the model, or a "
            f"directory. Received: {key!r}, which isn't one of {names}"
        )
    if not (folder / peft_files.WEIGHTS_NAME).exists():
        return native.read(folder)
    if tree is None:
        raise ValueError(
            "A PEFT adapter has the names of another model, so it needs "
            f"`model`. Received: {str(key)!r} without one"
        )
    return peft_load.read(tree, folder, strict=True, head=head)


def of_one_model(adapters, tree):
    """Gives adapters the paths of one model: the tree's, or the first one's.

    Their layers get the order of the model, whatever the file.
    """
    if tree is None:
        identity = next(iter(adapters.values())).identity
        places = functools.partial(_paths_to, identity)
    else:
        head = {p for x in adapters.values() for p in x.trained}
        if isinstance(tree.model, DyLoRAModel):
            head |= adaptation_of(tree.model).spec.head(tree).keys()
        identity = Identity.of(tree, head)
        places = functools.partial(_paths_in, tree)
    found = {}
    for key, adapter in adapters.items():
        try:
            paths = places(adapter.identity)
        except ValueError as error:
            raise ValueError(
                "Adapters must be of one model and base to be combined. "
                f"Received: {key!r}. {error}"
            ) from error
        adapter = adapter.renamed(paths)
        order = [path for path, _ in identity.layers if path in adapter.layers]
        layers = {path: adapter.layers[path] for path in order} | adapter.layers
        found[key] = dataclasses.replace(
            adapter, layers=layers, identity=identity
        )
    return found


def _paths_to(wanted, identity):
    if identity is None or wanted is None:
        raise ValueError(
            "Files of the first version don't say which model they are of, "
            "so `model` is needed."
        )
    return identity.paths_to(wanted)


def _paths_in(tree, identity):
    if identity is None:  # there are only the paths
        return {}
    paths = identity.paths_in(tree)
    identity.check_base(tree, paths)
    return paths


def check_layers(adapters):
    """Raises a `ValueError` if adapters don't match, or have diverged."""
    (one, first), *others = adapters.items()
    for key, other in others:
        without = [p for p in first.layers if p not in other.layers]
        more = [p for p in other.layers if p not in first.layers]
        if without or more:
            raise ValueError(
                "Adapters must be of the same layers to be combined. "
                f"Received: {key!r} without {listing(without)} and with "
                f"{listing(more)}, beside {one!r}"
            )
        shapes = {
            p: (_shape(x), _shape(other.layers[p]))
            for p, x in first.layers.items()
            if _shape(x) != _shape(other.layers[p])
        }
        if shapes:
            raise ValueError(
                "Adapters must be of layers of the same sizes to be combined. "
                f"Received: {shapes} of {one!r} and {key!r}"
            )
    for key, adapter in adapters.items():
        diverged = [
            path
            for path, x in adapter.layers.items()
            if not (np.isfinite(x.down).all() and np.isfinite(x.up).all())
        ]
        if diverged:
            raise ValueError(
                "Adapters must be finite to be combined. Received: NaN or "
                f"infinity in {key!r} at {listing(diverged)}"
            )


def _shape(factors):
    return factors.down.shape[0], factors.up.shape[1]

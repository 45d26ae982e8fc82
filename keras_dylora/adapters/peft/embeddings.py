"""The embeddings of tokens in a PEFT adapter: adapted, trained or tied."""

import dataclasses

import numpy as np

from keras_dylora.adapters.peft import files as peft_files
from keras_dylora.adapters.peft.layout import OUTPUT
from keras_dylora.layers.factors import float32_array

# The names of transformers for embeddings of tokens, and for those of the
# output.
EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight")
OUTPUT_EMBEDDINGS = f"{OUTPUT}.weight"


def without_output(tree, layout, adapter):
    """The adapter without that of an output that is tied to the embedding.

    Raises a `ValueError` if only one side has it, or if the two differ, as our
    adapter is that of both.
    """
    tied = layout.tied(tree)
    if tied is None:
        return adapter
    names = {x: layout.tensor_names(x) for x in (tied, OUTPUT)}
    present = [
        module
        for module, pair in names.items()
        if all(f"{peft_files.PREFIX}{x}" in adapter.tensors for x in pair)
    ]
    if not present:
        return adapter
    received = f"an adapter of {present[0]} alone"
    if len(present) == 2:
        ours, other = (adapter.factors(x, pair) for x, pair in names.items())
        other = other.transposed()
        if (
            np.array_equal(ours.down, other.down)
            and np.array_equal(ours.up, other.up)
            and ours.scale == other.scale
        ):
            received = None
        else:
            received = f"another adapter of {OUTPUT} than of {tied}"
    if received is not None:
        raise ValueError(
            "The output of the model is tied to the embedding, so an adapter "
            "must have the same on both, as `ensure_weight_tying` of PEFT "
            f"does. Received: {received}"
        )
    keys = [f"{peft_files.PREFIX}{x}" for x in names[OUTPUT]]
    tensors = {k: x for k, x in adapter.tensors.items() if k not in keys}
    return dataclasses.replace(adapter, tensors=tensors)


def without_tables(tree, layout, adapter):
    """The adapter without the tables that PEFT saves with an adapted embedding.

    Raises a `ValueError` if such a table isn't that of the model.
    """
    modules = {f"{layout.prefix}{layout.embedding}"}
    if layout.tied(tree):
        modules.add(OUTPUT)
    for module in modules:
        adapter = _without_base(tree, layout, adapter, module)
    return adapter


def _without_base(tree, layout, adapter, module):
    name = f"{module}.base_layer.weight"
    key = f"{peft_files.PREFIX}{name}"
    if key not in adapter.tensors:
        return adapter
    tensors = dict(adapter.tensors)
    table = tensors.pop(key)
    own = float32_array(layout.token_embedding(tree).embeddings)
    if table.shape != own.shape or not np.allclose(table, own, atol=1e-2):
        raise ValueError(
            "The table of an adapted embedding must be the model's own, as "
            "only its adapter is trained. Received: another "
            f"{name} of shape {table.shape}"
        )
    return dataclasses.replace(adapter, tensors=tensors)


def trained(model, adapter, every):
    """The embeddings that PEFT saves if tokens were added.

    Returns a dict of the tensor's name to the value and the path of our weight.
    Raises a `ValueError` if the vocabulary is another one.
    """
    layer = getattr(getattr(model, "backbone", model), "token_embedding", None)
    found = {}
    for key in adapter.tensors if layer is not None else ():
        name = key.removeprefix(peft_files.PREFIX)
        if name == key:
            continue
        variable, value = layer.embeddings, adapter.tensor(name)
        if name == OUTPUT_EMBEDDINGS and not getattr(
            layer, "tie_weights", True
        ):
            variable, value = layer.reverse_embeddings, value.T
        elif name != OUTPUT_EMBEDDINGS and not name.endswith(EMBEDDINGS):
            continue
        if value.shape != tuple(variable.shape):
            raise ValueError(
                "The embeddings of an adapter must be of the vocabulary of "
                f"the model. Received: {name} of shape {value.shape}, must be "
                f"{tuple(variable.shape)}"
            )
        path = next(p for p, v in every.items() if v is variable)
        found[name] = value, path
    by_path = {}
    for name, (value, path) in found.items():
        alone = (
            len(found) == 1
            and hasattr(model, "generate")
            and getattr(layer, "tie_weights", True)
            and not np.array_equal(value, float32_array(every[path]))
        )
        if alone or not np.array_equal(by_path.setdefault(path, value), value):
            raise ValueError(
                "The embeddings of the model are tied, so an adapter must have "
                "the same on both sides, as `ensure_weight_tying` of PEFT "
                f"does. Received: another {name}" + " alone" * alone
            )
    return found


def in_full(tree, layout):
    """The tables of tokens that a PEFT adapter may hold in full.

    Returns a dict of the tensor's name to our path. A table that is tied to the
    output has two names.
    """
    if not layout.embedding:
        return {}
    layer = layout.token_embedding(tree)
    path = tree.paths[id(layer)]
    found = {f"{layout.prefix}{layout.embedding}.weight": f"{path}/embeddings"}
    if layout.tied(tree):
        found[OUTPUT_EMBEDDINGS] = f"{path}/embeddings"
    elif not getattr(layer, "tie_weights", True):
        found[OUTPUT_EMBEDDINGS] = f"{path}/reverse_embeddings"
    return found

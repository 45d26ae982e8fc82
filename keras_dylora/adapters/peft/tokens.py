"""Trained tokens in the form of PEFT: `trainable_token_indices`."""

import dataclasses

import numpy as np

from keras_dylora.adapters.peft.files import PREFIX
from keras_dylora.layers.factors import float32_array
from keras_dylora.layers.tokens import NAME

KEY = "trainable_token_indices"
TENSOR = "token_adapter.trainable_tokens_delta"


def of_model(tree, layout):
    """PEFT's config entry and tensors for trained tokens; empty without any.

    PEFT stores the rows themselves. We store what is added to them.
    """
    rows = tree.model._dylora.tokens
    if rows is None:
        return {}, {}
    embedding = _embedding(tree, layout)
    table = tree.model._dylora.table.table()
    ids = list(rows.tokens)
    return (
        {KEY: {embedding.rpartition(".")[2]: ids}},
        {f"{embedding}.{TENSOR}": table[ids]},
    )


def taken_out(tree, layout, adapter):
    """The adapter without its trained tokens; their ids; and their update.

    The update is a dict of path to array. Without trained tokens, the ids are
    `None` and the update is empty.
    """
    found = {k: x for k, x in adapter.tensors.items() if k.endswith(TENSOR)}
    if not found:
        return adapter, None, {}
    embedding = _embedding(tree, layout)
    given = adapter.config.get(KEY)
    if isinstance(given, dict):
        names = [x for x in given if f".{embedding}".endswith(f".{x}")]
        given = given[names[0]] if len(names) == len(given) == 1 else None
    key = f"{PREFIX}{embedding}.{TENSOR}"
    if key not in found or not isinstance(given, list):
        raise ValueError(
            f"The trained tokens of an adapter must be those of {embedding}. "
            f"Received: {KEY}={adapter.config.get(KEY)!r} and tensors "
            f"{sorted(found)}"
        )
    # If the output is tied, PEFT may store its rows too.
    if any(not np.array_equal(x, found[key]) for x in found.values()):
        raise ValueError(
            "The output of the model is tied to its table of tokens, so an "
            "adapter must have the same rows for both. "
            f"Received: other rows in {sorted(found)}"
        )
    layer = layout.token_embedding(tree)
    rows, table = found[key], float32_array(layer.embeddings)
    outside = [i for i in given if not 0 <= i < len(table)]
    if outside or rows.shape != (len(given), table.shape[1]):
        raise ValueError(
            "The trained tokens of an adapter must be rows of the model's "
            f"table, of shape {table.shape}. Received: ids {outside[:8]} "
            f"outside of it, and rows of shape {rows.shape} for {len(given)} "
            "ids"
        )
    order = np.argsort(given)
    ids = [given[i] for i in order]
    path = f"{tree.paths[id(layer)]}/{NAME}"
    update = {path: rows[order] - table[ids]}
    tensors = {k: x for k, x in adapter.tensors.items() if k not in found}
    return dataclasses.replace(adapter, tensors=tensors), ids, update


def _embedding(tree, layout):
    """The name of the table of tokens in transformers."""
    if not layout.embedding:
        raise ValueError(
            "Trained tokens can be exchanged with PEFT for models whose "
            "table of tokens has a name in keras_dylora/adapters/peft/"
            f"families.py. Received: a {type(tree.model).__name__}"
        )
    return f"{layout.prefix}{layout.embedding}"

"""Tokens whose rows of the table are trained in full, including new ones."""

import dataclasses

import keras
import numpy as np

from keras_dylora import _keras
from keras_dylora.layers.factors import float32_array
from keras_dylora.layers.tokens import NAME, tokens_class
from keras_dylora.layers.tree import Tree

NEW = "new"
TABLE = "token_embedding"  # KerasHub's name


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of a model's table of tokens that are trained in full.

    Args:
        path: str. The path of the embedding.
        tokens: tuple of int. The ids of the tokens.
        rows: int. The number of rows after enabling, which is higher than
            before if the tokenizer has grown.
        rows_before: int. The number of rows before enabling.
        width: int. The size of a row.
    """

    path: str
    tokens: tuple[int, ...]
    rows: int
    rows_before: int
    width: int

    @classmethod
    def of(cls, path, layer, tokens, rows):
        """The `TokenRows` of an embedding as it is now."""
        return cls(path, tokens, rows, layer.input_dim, layer.output_dim)

    @property
    def shape(self):
        """The shape of the trained weight."""
        return len(self.tokens), self.width

    @property
    def weight(self):
        """The path of the trained weight."""
        return f"{self.path}/{NAME}"

    def apply(self, tree):
        """Makes the rows of the embedding trainable; the table may grow."""
        layer = tree.layers[self.path]
        if self.rows != self.rows_before:
            _resize(tree.model, layer, self.rows)
        tokens_class(type(layer)).upgrade(layer, self.tokens)

    def undo(self, model, layer):
        """Restores the embedding of a model as it was."""
        layer.downgrade()
        if self.rows != self.rows_before:
            _resize(model, layer, self.rows_before)


def find_tokens(tree, wanted, adapted):
    """The `TokenRows` of a config's `trainable_tokens`, checked.

    Args:
        tree: `Tree` of a model that isn't enabled.
        wanted: `None`, `"new"` or a tuple of int.
        adapted: dict whose keys are the paths of layers that get an adapter.

    Returns:
        `TokenRows`, or `None` if no token is wanted.

    Raises:
        ValueError: if the model has no table for the tokens.
    """
    if wanted is None:
        return None
    path = _table(tree)
    layer = tree.layers[path]
    if path in adapted:
        raise ValueError(
            "A table of tokens takes an adapter or `trainable_tokens`, not "
            f"both. Received: {path!r} among the target layers, and "
            f"trainable_tokens={wanted!r}"
        )
    if layer.quantization_mode is not None or layer.lora_enabled:
        raise ValueError(
            "The table of `trainable_tokens` must be a float layer without "
            f"Keras's own LoRA. Received: {path!r} with quantization_mode="
            f"{layer.quantization_mode}, lora_enabled={layer.lora_enabled}"
        )
    if layer.embeddings_constraint is not None or (
        layer.mask_zero and type(layer) is not keras.layers.Embedding
    ):
        raise ValueError(
            "The table of `trainable_tokens` must have no constraint, and no "
            f"mask that its call sets. Received: {path!r}"
        )
    known = _tokens_known(tree.model)
    rows = max(layer.input_dim, known or 0)
    if wanted == NEW:
        if rows == layer.input_dim:
            raise ValueError(
                "`trainable_tokens='new'` needs a tokenizer with more tokens "
                "than the table has rows; otherwise, name the ids. "
                f"Received: a tokenizer of {known} tokens and a table of "
                f"{layer.input_dim} rows"
            )
        wanted = tuple(range(layer.input_dim, rows))
    outside = [i for i in wanted if i >= rows]
    if outside:
        raise ValueError(
            "The ids of `trainable_tokens` must be rows of the table of "
            f"tokens. Received: {outside[:8]} for {path!r} of {rows} rows"
        )
    if rows > layer.input_dim:
        _check_growth(tree.model, layer)
    return TokenRows.of(path, layer, tuple(wanted), rows)


def _table(tree):
    """The path of the embedding of the tokens."""
    tables = {p: x for p, x in tree.layers.items() if tokens_class(type(x))}
    named = [p for p, x in tables.items() if x.name == TABLE]
    found = named or list(tables)
    if len(found) != 1:
        raise ValueError(
            "`trainable_tokens` need one table of tokens: the embedding "
            f"called {TABLE!r}, or the only one. Received: embeddings {found}"
        )
    return found[0]


def _tokens_known(model):
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    return None if tokenizer is None else tokenizer.vocabulary_size()


def _check_growth(model, layer):
    """Raises a `ValueError` if other weights have the size of the table."""
    size, own = layer.input_dim, {id(v) for v in layer.weights}
    others = [
        v.path for v in model.weights if size in v.shape and id(v) not in own
    ]
    if others or not _sized(model, layer):
        raise ValueError(
            "A table of tokens can grow only in a KerasHub model with a "
            "`vocabulary_size`, and only if no other weight has its size. "
            "Received: "
            f"{model.name} with a table of {size} rows, and {others[:4]}"
        )


def _sized(model, layer):
    """The layers and models whose `vocabulary_size` is that of the table."""
    return [
        x
        for x in Tree(model).every.values()
        if getattr(x, "vocabulary_size", None) == layer.input_dim
    ]


def _resize(model, layer, rows):
    """Gives a table another number of rows; new ones are the mean of all."""
    for each in _sized(model, layer):
        each.vocabulary_size = rows
    layer.input_dim = rows
    for name, axis in (("_embeddings", 0), ("reverse_embeddings", 1)):
        variable = getattr(layer, name, None)
        if variable is None:
            continue
        value = float32_array(variable)
        more = rows - value.shape[axis]
        if more > 0:
            mean = value.mean(axis, keepdims=True).repeat(more, axis)
            value = np.concatenate([value, mean], axis)
        value = value.take(range(rows), axis)
        _keras.forget(layer, name)
        with _keras.unlocked(layer):
            new = layer.add_weight(
                shape=value.shape, dtype=variable.dtype, name=variable.name
            )
            setattr(layer, name, new)
        new.assign(value)

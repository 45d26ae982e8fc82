"""Embeddings that train the rows of some tokens in full."""

import functools
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.layers.embedding import logits_with, reversible_class
from keras_dylora.layers.factors import float32_array

if TYPE_CHECKING:
    # The class that this one is mixed into.
    from keras.layers import Embedding as _Base
else:
    _Base = object

NAME = "trained_tokens"


@_keras.loads_any_number
class TrainedTokens(_Base):
    """An embedding that adds an update to the rows of some tokens.

    It computes `embeddings[id] + trained_tokens[i]` for the `i`-th of the
    tokens, and the plain row for all others. In reverse, a tied embedding adds
    `x @ trained_tokens.T` to the logits of these tokens. `trained_tokens` is
    `(tokens, output_dim)`, in float32, and starts at zero.
    """

    original_class: type
    trained_tokens: keras.Variable

    @classmethod
    def upgrade(cls, layer: keras.Layer, tokens: tuple[int, ...]) -> None:
        """Turns a built embedding into this class, in place."""
        _keras.set_class(layer, cls)
        layer._token_places = np.full(layer.input_dim, len(tokens), "int32")
        layer._token_places[list(tokens)] = np.arange(len(tokens))
        with _keras.unlocked(layer):
            layer.trained_tokens = layer.add_weight(
                shape=(len(tokens), layer.output_dim),
                initializer="zeros",
                dtype="float32",
                name=NAME,
            )

    def downgrade(self) -> None:
        """Turns the layer back into its base layer."""
        _keras.forget(self, NAME)
        self.__dict__.pop("_token_places", None)
        _keras.set_class(self, self.original_class)

    def table(self) -> np.ndarray:
        """The table, with the trained rows of the tokens."""
        rows = float32_array(self.embeddings)
        own = self._token_places < self.trained_tokens.shape[0]
        places = self._token_places[own]
        rows[own] += float32_array(self.trained_tokens)[places]
        return rows

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return logits_with(self, inputs, lambda: self._reversed(inputs))
        # A plain `Embedding` takes no `reverse`.
        outputs = super().call(inputs)
        ids = ops.cast(inputs, "int32")
        places = ops.take(self._token_places, ids)
        update = ops.take(self._extended(), places, axis=0)
        return outputs + ops.cast(update, outputs.dtype)

    def _reversed(self, inputs):
        rows = ops.transpose(self._extended())
        update = ops.cast(inputs, self.compute_dtype) @ rows
        return ops.take(update, self._token_places, axis=-1)

    def _extended(self):
        """The update, and a last row of zeros for all other tokens."""
        update = ops.cast(self.trained_tokens, self.compute_dtype)
        return ops.pad(update, [[0, 1], [0, 0]])

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store[NAME] = self.trained_tokens

    def load_own_variables(self, store: Any) -> None:
        if NAME not in store.keys():
            raise ValueError(
                f"The file holds no trained tokens for layer '{self.path}'. "
                "Load the weights of a base model before you enable DyLoRA."
            )
        super().load_own_variables(store)
        self.trained_tokens.assign(store[NAME])


@functools.cache
def tokens_class(original: Any) -> type[TrainedTokens] | None:
    """The class that trains tokens of an embedding, or `None` if none does."""
    if original is not keras.layers.Embedding and not reversible_class(
        original
    ):
        return None
    return type(
        f"TrainedTokens{original.__name__}",
        (TrainedTokens, original),
        {"original_class": original},
    )

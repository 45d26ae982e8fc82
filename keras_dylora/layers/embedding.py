"""DyLoRAEmbedding: an `Embedding` layer with a nested adapter."""

import functools
from typing import Any

import keras
from keras import ops

from keras_dylora import _keras
from keras_dylora.layers.gated import gated
from keras_dylora.layers.geometry import Geometry
from keras_dylora.layers.low_rank import LowRankAdapter


class EmbeddingAdapter(LowRankAdapter):
    """The part that all adapters of embeddings share: ids select rows."""

    kernel_name = "embeddings"
    takes_quantized = False

    @staticmethod
    def geometry_of(layer: keras.Layer) -> Geometry:
        return Geometry((layer.input_dim,), (layer.output_dim,))

    @staticmethod
    def _initial_down(seed=None):
        """The limits of a `Dense` layer with one input, which an id is."""
        return keras.initializers.RandomUniform(-1.0, 1.0, seed)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._call_adapted("call", inputs, training)

    def _project(self, inputs, down, training):
        ids = ops.reshape(inputs, (-1,))
        return ops.take(down, ids, axis=0), ops.shape(inputs)


@keras.saving.register_keras_serializable(package="keras_dylora")
class DyLoRAEmbedding(EmbeddingAdapter, keras.layers.Embedding):
    """An `Embedding` layer with a low-rank adapter that works at every rank.

    At rank `b`, the layer computes (Eq. 7)

    `embeddings[ids] + (alpha / b) * down[ids, :b] @ up[:b, :]`

    A step reads and changes only the rows of its tokens. The table is frozen.

    Args:
        input_dim: int. As in `keras.layers.Embedding`, like every argument
            that isn't listed here.
        output_dim: int.
        rank: int. Maximum rank. It and all arguments below are as in
            `DyLoRADense`. Defaults to `8`.
        min_rank: int. Defaults to `1`.
        alpha: float. Defaults to `16`.
        frozen: bool. Defaults to `False`.
        dropout: float. Has no effect, as an id has no part to drop. Defaults to
            `0`.
        scaling: str. Defaults to `"rank"`.
        down_initializer: initializer. Defaults to `None`: uniform between -1
            and 1.
        up_initializer: initializer. Defaults to `"zeros"`.

    Input shape: `(batch, …)`, integers. Output shape: `(batch, …, output_dim)`.
    Weights: `embeddings` `(input_dim, output_dim)`, `down` `(input_dim, rank)`
    and `up` `(rank, output_dim)`. `down` and `up` are in float32.

    Raises:
        ValueError: if a number is outside its range.
        TypeError: if a rank isn't an integer.

    Example:

    ```python
    ids = keras.Input((16,), dtype="int32")
    x = keras_dylora.DyLoRAEmbedding(1000, 64, rank=4, alpha=8)(ids)
    outputs = keras_dylora.DyLoRADense(1, rank=4, alpha=8)(x)
    model = keras_dylora.DyLoRAModel(ids, outputs)
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """

    original_class = keras.layers.Embedding


def logits_with(layer, inputs, update):
    """The logits of a `ReversibleEmbedding`, with an update.

    If the embedding is tied, the result of the function `update` is added
    before the logits are capped.
    """
    base = _keras.stand_in(layer, layer.original_class, logit_soft_cap=None)
    logits = base.call(inputs, reverse=True)
    if layer.tie_weights:
        logits = logits + ops.cast(update(), logits.dtype)
    cap = getattr(layer, "logit_soft_cap", None)
    return logits if cap is None else ops.tanh(logits / cap) * cap


class ReversibleAdapter(EmbeddingAdapter):
    """The adapter of a `ReversibleEmbedding`, which works in both directions.

    In reverse, a tied embedding computes
    `x @ embeddings.T + ((x @ up.T) * gate) @ down.T`. An untied one has another
    kernel for that, without an adapter.
    """

    @classmethod
    def check_base(cls, layer: keras.Layer) -> None:
        super().check_base(layer)
        if layer.mask_zero:
            raise ValueError(
                "An embedding that masks zeros in its call can't be adapted. "
                f"Received: {layer.name} with mask_zero=True"
            )

    def call(  # type: ignore[override]
        self, inputs: Any, reverse: bool = False, training: bool | None = None
    ) -> Any:
        if not reverse:
            return super().call(inputs, training)
        return logits_with(
            self, inputs, lambda: self._reversed(inputs, training)
        )

    def _reversed(self, inputs, training):
        gate, down, up = self._sides(training)
        if len(gate.shape) == 3:
            gate = ops.swapaxes(gate, 1, 2)
        kept = ops.shape(inputs)[:-1]
        rows = ops.reshape(inputs, (-1, self.output_dim))
        rows = ops.cast(rows, self.compute_dtype)
        bottleneck = gated(self, rows @ ops.transpose(up), gate, kept)
        logits = bottleneck @ ops.transpose(down)
        return ops.reshape(logits, (*kept, self.input_dim))


@functools.cache
def reversible_class(original: Any) -> type[LowRankAdapter] | None:
    """The class that adapts a `ReversibleEmbedding` of Keras or KerasHub.

    Returns `None` if `original` is another class.
    """
    if original.__name__ != "ReversibleEmbedding" or not issubclass(
        original, keras.layers.Embedding
    ):
        return None
    return type(
        "DyLoRAReversibleEmbedding",
        (ReversibleAdapter, original),
        {"original_class": original},
    )

"""merge and truncate: one rank made a plain model, or the new maximum."""

import keras
import numpy as np
from keras import ops

from keras_dylora import ranks
from keras_dylora.attachment import plain
from keras_dylora.low_rank import RankGate
from keras_dylora.model import compile_like
from keras_dylora.model import restart
from keras_dylora.model import state_of


def merge(model, rank=None):
    """A new, plain model with the adapters of one rank in its kernels.

    Computes `kernel + (alpha / b) * down[:, :b] @ up[:b, :]` in float32 and
    stores it in the kernel's dtype. The model itself is left as it is.

    Args:
        model: an enabled model, or a functional `DyLoRAModel`.
        rank: int in `0..config.rank`. Defaults to `None`, the model's
            current rank.

    Returns:
        A model of the original class with no part of keras_dylora in it. It
        shares the preprocessor, and is compiled as the model is.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, is
            of a class that subclasses `DyLoRAModel`, or is quantized.

    Example:

    ```python
    plain = keras_dylora.merge(clf, rank=4)
    plain.save("plain.keras")  # needs no keras_dylora to load
    ```
    """
    state = state_of(model)
    rank = ranks.as_rank(
        model.rank if rank is None else rank, 0, state.config.rank
    )
    if "original_class" not in vars(type(model)):
        raise ValueError(
            "Only an enabled model or a functional `DyLoRAModel` has a plain "
            f"class to merge into. Received: a {type(model).__name__}"
        )
    quantized = [x.path for x in state.layers if x.quantization_mode]
    if quantized:
        raise ValueError(
            "A quantized kernel can't take a float update. "
            f"Received: quantized layers {quantized}"
        )
    with plain(model, state.layers, state.attachment):
        config = keras.saving.serialize_keras_object(model)
    compile_config = config.pop("compile_config", None)
    merged = keras.saving.deserialize_keras_object(config)
    if getattr(model, "preprocessor", None) is not None:
        merged.preprocessor = model.preprocessor
    adapters = {id(v) for x in state.layers for v in (x.down, x.up)}
    sources = [w for w in model.weights if id(w) not in adapters]
    deltas = {id(x.kernel): x.delta_kernel(rank) for x in state.layers}
    for target, source in zip(merged.weights, sources, strict=True):
        # Copied by way of NumPy: on JAX, two models that share a buffer lose
        # it together when one of them donates it.
        value = ops.convert_to_numpy(source)
        if id(source) in deltas:
            value = np.asarray(value, "float32") + deltas[id(source)]
        target.assign(value)
    if compile_config:
        compile_like(merged, compile_config)
    return merged


def truncate(model, rank):
    """Cuts the adapters of a live model to a lower maximum rank, in place.

    Outputs at ranks up to the new maximum stay the same. Training goes on at
    the same position of the rank sequence, with ranks up to the new maximum
    and a new optimizer state.

    Args:
        model: an enabled model or a `DyLoRAModel`.
        rank: int in `1..config.rank`. The new maximum rank.

    Returns:
        `model` itself.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range or the model isn't enabled.

    Example:

    ```python
    keras_dylora.truncate(clf, 4)
    clf.fit(texts, labels)
    ```
    """
    state = state_of(model)
    rank = ranks.as_rank(rank, 1, state.config.rank)
    active_rank = min(model.rank, rank)
    config = state.config.truncated(rank)
    gates = {id(g): RankGate(rank, g.alpha) for g in state.gates}
    for layer in state.layers:
        layer.truncate(rank, config.min_rank, gates[id(layer._gate)])
    restart(model, config)
    model.set_rank(active_rank)
    return model

"""merge and truncate: one rank made a plain model, or the new maximum."""

import keras
from keras import ops

from keras_dylora import _keras, ranks
from keras_dylora.adaptation import as_plain
from keras_dylora.config import AdapterArguments
from keras_dylora.low_rank import LowRankAdapter
from keras_dylora.model import DyLoRAModel, adaptation_of, reconfigure
from keras_dylora.paths import layer_paths
from keras_dylora.quantization import float_kernel
from keras_dylora.rank_gate import GateRow, RankGate
from keras_dylora.recompile import compile_as, new_optimizer


def merge(model, rank=None):
    """A new, plain model with the adapters of one rank in its kernels.

    Computes `kernel + scale * down[:, :b] @ up[:b, :]` in float32 and
    stores it in the kernel's dtype. The model itself is left as it is.

    The kernel of a quantized layer is dequantized first: adapted layers are
    float layers in the new model, in the dtype that they were quantized from.
    All other layers stay as they are, quantized ones too. Where Keras also
    quantizes the inputs of a layer, as it does by default in `"int8"`, the
    merged model is without that rounding.

    Args:
        model: an enabled model, or a functional `DyLoRAModel`.
        rank: int in `0..config.rank`. Defaults to `None`, the model's
            current rank.

    Returns:
        A model of the original class with no part of keras_dylora in it. It
        shares the preprocessor, and is compiled as the model is.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, or
            is of a class that subclasses `DyLoRAModel`.

    Example:

    ```python
    plain = keras_dylora.merge(clf, rank=4)
    plain.save("plain.keras")  # needs no keras_dylora to load
    ```
    """
    adaptation = adaptation_of(model)
    rank = ranks.as_rank(
        model.rank if rank is None else rank, 0, adaptation.config.rank
    )
    for each in _keras.submodels(model):
        cls = type(each)
        if issubclass(cls, DyLoRAModel) and "original_class" not in vars(cls):
            raise ValueError(
                "Only an enabled model or a functional `DyLoRAModel` has a "
                f"plain class to merge into. Received: a {cls.__name__}"
            )
    with as_plain(model, whole=True):
        config = keras.saving.serialize_keras_object(model)
    if "preprocessor" in config["config"]:
        config["config"]["preprocessor"] = model.preprocessor
    # Safe: what is revived is the caller's own model, not a file's.
    merged = keras.saving.deserialize_keras_object(config, safe_mode=False)
    _keras.settle_dtype_policies(merged)
    # By position: Keras numbers unnamed layers anew.
    here, there = (list(layer_paths(x).values()) for x in (model, merged))
    if len(here) != len(there):
        raise ValueError(
            "The config of a model must give the same layers again. Received: "
            f"{model.name} with {len(here)} layers, {len(there)} once rebuilt"
        )
    pairs = zip(here, there, strict=True)
    adapted = [
        (layer, target)
        for layer, target in pairs
        if isinstance(layer, LowRankAdapter)
    ]
    for layer, target in adapted:
        target.kernel.assign(float_kernel(layer) + layer.delta_kernel(rank))
        if layer.bias is not None:
            target.bias.assign(ops.convert_to_numpy(layer.bias))
    sources = _other_weights(model, [layer for layer, _ in adapted])
    targets = _other_weights(merged, [target for _, target in adapted])
    for target, source in zip(targets, sources, strict=True):
        # Copied by way of NumPy: on JAX, two models that share a buffer lose
        # it together when one of them donates it.
        target.assign(ops.convert_to_numpy(source))
    if model.compiled:
        compile_as(merged, model)
    return merged


def _other_weights(model, layers):
    skip = {id(weight) for layer in layers for weight in layer.weights}
    return [weight for weight in model.weights if id(weight) not in skip]


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
    adaptation = adaptation_of(model)
    rank = ranks.as_rank(rank, 1, adaptation.config.rank)
    active_rank = min(model.rank, rank)
    layers = adaptation.layers.values()
    config = adaptation.config.truncated(rank, (x.factors() for x in layers))
    optimizer = new_optimizer(model)
    cut = {
        id(gate): RankGate(gate.variable.shape[0], config.scale)
        for gate in adaptation.gates
    }
    for layer in layers:
        row = GateRow(cut[id(layer._gate.gate)], layer._gate.index)
        layer.truncate(AdapterArguments.of(config), row)
    reconfigure(model, config, optimizer)
    model.set_rank(active_rank)
    return model

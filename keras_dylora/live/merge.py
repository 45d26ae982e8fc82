"""merge: a plain model with the adapters of one rank in its kernels."""

import itertools

import keras

from keras_dylora import _keras
from keras_dylora.allocation import Rank
from keras_dylora.layers.tree import Tree
from keras_dylora.live import probe
from keras_dylora.live.calls import check_constants
from keras_dylora.live.model import DyLoRAModel, adaptation_of
from keras_dylora.live.plain import as_plain
from keras_dylora.live.quantization import float_kernel
from keras_dylora.live.recompile import compile_as


def merge(model: keras.Model, rank: Rank | None = None) -> keras.Model:
    """Returns a plain model with the adapters of one rank in its kernels.

    A kernel of the new model is `kernel + scale * down[:, :b] @ up[:b, :]`,
    computed in float32 and stored in the kernel's dtype. The live model doesn't
    change.

    The kernel of a quantized layer is dequantized first. So adapted layers are
    float layers in the new model, in the dtype that they were quantized from.
    All other layers stay as they are, including quantized ones. Where Keras
    also quantizes the inputs of a layer, as it does by default in `"int8"`, the
    merged model doesn't have that rounding.

    Args:
        model: an enabled model, or a functional `DyLoRAModel`.
        rank: int in `0..config.rank`, or `RankAllocation`. Defaults to `None`:
            the model's current rank.

    Returns:
        A model of the original class, without any part of keras_dylora. It
        shares the preprocessor of the live model and is compiled in the same
        way.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, or if
            its class subclasses `DyLoRAModel`.
        RuntimeError: if the merged model's outputs differ from the live
            model's. They are compared on one made-up example, if the model's
            inputs are known.

    Example:

    ```python
    plain = keras_dylora.merge(clf, rank=4)
    plain.save("plain.keras")  # needs no keras_dylora to load
    ```
    """
    adaptation = adaptation_of(model)
    rank = model.rank if rank is None else rank
    chosen = adaptation.by_layer(rank)
    for each in _keras.submodels(model):
        cls = type(each)
        if issubclass(cls, DyLoRAModel) and "original_class" not in vars(cls):
            raise ValueError(
                "Only an enabled model or a functional `DyLoRAModel` has a "
                f"plain class to merge into. Received: a {cls.__name__}"
            )
    check_constants(model)
    adaptation.warn_of_cut(rank)
    tree = Tree(model)
    with as_plain(tree, whole=True):
        config = keras.saving.serialize_keras_object(model)
    if "preprocessor" in config["config"]:
        config["config"]["preprocessor"] = model.preprocessor
    # Safe: the config is that of the caller's own model, not of a file.
    merged = keras.saving.deserialize_keras_object(config, safe_mode=False)
    _keras.settle_dtype_policies(merged)
    # By position, as Keras numbers unnamed layers anew.
    here, there = (list(x.layers.values()) for x in (tree, Tree(merged)))
    factors = adaptation.factors(chosen)
    by_id = {id(x): factors[path] for path, x in adaptation.layers.items()}
    pairs = list(zip(here, there, strict=False))
    adapted = [(layer, target) for layer, target in pairs if id(layer) in by_id]
    tables = [(x, target) for x, target in pairs if x is adaptation.table]
    sources = _other_weights(model, [layer for layer, _ in adapted + tables])
    targets = _other_weights(merged, [target for _, target in adapted + tables])
    shapes = [[tuple(w.shape) for w in x] for x in (sources, targets)]
    differ = [x for x in itertools.zip_longest(*shapes) if x[0] != x[1]]
    if len(here) != len(there) or differ:
        raise ValueError(
            "The config of a model must give the same layers again. Received: "
            f"{model.name} with {len(here)} layers, {len(there)} once rebuilt; "
            f"shapes of weights before and after {differ[:3]}"
        )
    for layer, target in adapted:
        update = layer.kernel_update(by_id[id(layer)])
        kernel = getattr(target, layer.kernel_name)
        kernel.assign(float_kernel(layer) + update)
        _copy_beside(layer, target)
    for layer, target in tables:
        target.embeddings.assign(layer.table())
        _copy_beside(layer, target)
    for target, source in zip(targets, sources, strict=True):
        target.assign(_keras.value_for_another(source))
    probe.check_merged(model, merged, chosen)
    if model.compiled:
        compile_as(merged, model)
    return merged


def _copy_beside(layer, target):
    """Copies the weights of a layer other than its kernel."""
    for name in ("bias", "reverse_embeddings"):
        weight = getattr(layer, name, None)
        if weight is not None:
            getattr(target, name).assign(_keras.value_for_another(weight))


def _other_weights(model, layers):
    skip = {id(weight) for layer in layers for weight in layer.weights}
    return [weight for weight in model.weights if id(weight) not in skip]

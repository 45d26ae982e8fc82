"""Quantized bases: quantization below the adapters, and back to float."""

import re

import keras
import numpy as np

from keras_dylora.layers.factors import float32_array
from keras_dylora.live.plain import as_original

MODES = ("int8", "int4")


def quantize_base(tree, keras_quantize, mode, config, filters, **kwargs):
    """Lets Keras quantize the base of a model; its adapters stay as they are.

    Args:
        tree: `Tree` of the model. Layers that are trained in full are left out.
        keras_quantize: Keras's own `quantize` method of the model.
        mode: as in `DyLoRAModel.quantize`. So are the arguments below.
    """
    wanted = getattr(config, "mode", None) if mode is None else mode
    if wanted not in MODES:
        raise ValueError(
            f"A model with adapters can be quantized to one of {MODES}. "
            f"Received: mode={wanted!r}"
        )
    chosen = _as_predicate(filters)
    layers = tree.adapted.values()
    adapted = {id(layer): layer.takes_quantized for layer in layers}
    # Including those that a flag freezes for a while.
    in_full = {id(tree.every[path]) for path in tree.model._dylora.spec.trained}

    def frozen_and_chosen(layer):
        # Keras raises an error for a tokenizer that hasn't run, and warns of
        # each layer without a quantized form.
        if type(layer).quantize is keras.Layer.quantize:
            return False
        trained = id(layer) in in_full or layer.trainable_variables
        return adapted.get(id(layer), not trained) and chosen(layer)

    # Keras quantizes only layers of exactly its own classes.
    with as_original(layers):
        quantized = [
            layer.name
            for layer in tree.layers.values()
            if getattr(layer, "quantization_mode", None) is not None
            and frozen_and_chosen(layer)
        ]
        if quantized:  # Keras would stop half-way.
            raise ValueError(
                "A layer can be quantized once. Received: quantized layers "
                f"{quantized}"
            )
        keras_quantize(mode, config=config, filters=frozen_and_chosen, **kwargs)


def _as_predicate(filters):
    """Turns the filters that Keras takes into a function of a layer."""
    if filters is None:
        return lambda layer: True
    if callable(filters):
        return filters
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            "`filters` must be a regular expression, a list of them or a "
            f"callable. Received: filters={filters!r}"
        )
    return lambda layer: any(re.search(p, layer.name) for p in patterns)


def float_kernel(layer):
    """The kernel of an adapted layer, dequantized, as a float32 array."""
    kernel = float32_array(layer.base_kernel)
    if layer.quantization_mode is None:
        return kernel
    scale = float32_array(layer.kernel_scale)
    if layer.quantization_mode == "int8":
        # The scale has the axes of the layer's output.
        geometry = layer.geometry_of(layer)
        return kernel / geometry.kernel(np.reshape(scale, (1, -1)))
    rows = np.reshape(kernel, (-1, scale.shape[-1]))
    if getattr(layer, "kernel_zero", None) is None:
        rows = rows / scale
    else:
        group = float32_array(layer.g_idx).astype("int32")
        rows = (rows - float32_array(layer.kernel_zero)[group]) * scale[group]
    return np.reshape(rows, kernel.shape)

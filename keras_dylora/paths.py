"""The layers, weights and adapted layers of a model by path."""

import keras

from keras_dylora import _keras
from keras_dylora.low_rank import LowRankAdapter


def layer_paths(model):
    """All layers below `model`, parents first, by a unique path.

    The path is Keras's own `layer.path` less the model's name, with `_1`,
    `_2`, … where Keras gives two layers the same one. The preprocessor of a
    task is left out: it isn't trained, has more layers once it has run, and
    isn't tracked by Keras on every backend.
    """
    paths, seen = {}, {id(model), id(getattr(model, "preprocessor", None))}

    def visit(parent, prefix):
        # Other layers may have a `layers` that is something else.
        ordered = parent.layers if isinstance(parent, keras.Model) else ()
        for layer in [*ordered, *_keras.sublayers(parent)]:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = layer.path or f"{prefix}{layer.name}"
            path = path.removeprefix(f"{model.name}/")
            paths[_unique(path, paths)] = layer
            visit(layer, f"{path}/")

    visit(model, "")
    return paths


def adapted_layers(model):
    """The adapted layers below a model by path, in forward order."""
    return {
        path: layer
        for path, layer in layer_paths(model).items()
        if isinstance(layer, LowRankAdapter)
    }


def without_adapters(weights, layers):
    """The weights that aren't `down` or `up` of one of the adapted layers."""
    adapters = {id(v) for layer in layers for v in (layer.down, layer.up)}
    return [v for v in weights if id(v) not in adapters]


def weight_paths(model):
    """Every weight of a model by its path.

    Named after the innermost layer that holds it, `pooled_dense/kernel`, so
    the same in every process.
    """
    names, paths = {}, {}
    for path, layer in reversed(layer_paths(model).items()):
        for weight in layer.weights:
            names.setdefault(id(weight), f"{path}/{weight.name}")
    for weight in model.weights:
        path = names.get(id(weight), weight.name)
        paths[_unique(path, paths)] = weight
    return paths


def _unique(path, taken):
    unique, count = path, 0
    while unique in taken:
        count += 1
        unique = f"{path}_{count}"
    return unique

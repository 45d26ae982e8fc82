"""What a model trains besides its adapters, and what training changes there."""

from keras_dylora import _keras
from keras_dylora.paths import layer_paths, weight_paths, without_adapters


def head_weights(model):
    """All that an adapter has besides its factors, by path."""
    return trained_weights(model) | trained_statistics(model)


def trained_weights(model):
    """The weights that are trained besides the adapters, by their path.

    Those that are frozen by now are among them.
    """
    trained = without_adapters(_trained(model), model.dylora_layers)
    return _by_path(model, trained)


def trained_statistics(model):
    """What training changes beside them without a gradient, by its path.

    Of the layers that are trained, and those within: one that is trainable for
    the sake of an adapter in it has none.
    """
    adapted = {id(layer) for layer in model.dylora_layers}
    trained = {id(v) for v in _trained(model)}
    paths = layer_paths(model)
    whole = {
        id(x)
        for path in model._dylora.trained_layers
        for x in [paths[path], *layer_paths(paths[path]).values()]
    }
    statistics = [
        v
        for layer in paths.values()
        if id(layer) not in adapted
        and (
            id(layer) in whole
            or any(id(v) in trained for v in _keras.own_weights(layer))
        )
        for v in _keras.statistics(layer)
    ]
    return _by_path(model, statistics)


def _trained(model):
    return [*model.trainable_variables, *model._dylora.trained]


def _by_path(model, variables):
    ids = {id(v) for v in variables}
    return {p: v for p, v in weight_paths(model).items() if id(v) in ids}

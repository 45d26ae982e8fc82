"""What a model trains besides its adapters, and what training changes there."""

from keras_dylora import _keras
from keras_dylora.paths import layer_paths, weight_paths


def trained_weights(model):
    """The weights that are trained besides the adapters, by their path.

    Those that are frozen by now are among them.
    """
    adapters = {id(v) for x in model.dylora_layers for v in (x.down, x.up)}
    ids = _trained_ids(model) - adapters
    return {p: v for p, v in weight_paths(model).items() if id(v) in ids}


def trained_statistics(model):
    """What training changes beside them without a gradient, by its path.

    Of the layers that are trained, and those within: one that is trainable for
    the sake of an adapter in it has none.
    """
    adapted = {id(layer) for layer in model.dylora_layers}
    trained, paths = _trained_ids(model), layer_paths(model)
    whole = {
        id(x)
        for path in model._dylora.trained_layers
        for x in [paths[path], *layer_paths(paths[path]).values()]
    }
    ids = {
        id(v)
        for layer in paths.values()
        if id(layer) not in adapted
        and (
            id(layer) in whole
            or any(id(v) in trained for v in _keras.own_weights(layer))
        )
        for v in _keras.statistics(layer)
    }
    return {p: v for p, v in weight_paths(model).items() if id(v) in ids}


def _trained_ids(model):
    trained = model._dylora.trained
    return {id(v) for v in [*model.trainable_variables, *trained]}

"""Warnings about adapters that a `fit` doesn't train."""

import warnings

from keras_dylora.cuts import users_line


def warn_of_frozen(adaptation):
    """Warns if a model trains while some of its adapters are frozen."""
    frozen = [
        path
        for path, layer in adaptation.layers.items()
        if not (layer.down.trainable and layer.up.trainable)
    ]
    if frozen and adaptation.model.trainable_variables:
        warnings.warn(
            "Adapters that are frozen aren't trained: the `trainable` of a "
            "layer is also that of its adapter, and the base is frozen "
            "anyway. Set `model.trainable` to False and then to True, and "
            f"compile again. Received: frozen adapters {frozen}",
            stacklevel=users_line(),
        )


def warn_of_idle(adaptation):
    """Warns once of layers that training never called.

    `enable_dylora` leaves out such layers of a functional model. Those that it
    couldn't trace show only after training.
    """
    idle = {
        path: layer._gate
        for path, layer in adaptation.layers.items()
        if layer._gate.index not in layer._gate.gate.read
    }
    if idle and len(idle) < len(adaptation.layers):
        warnings.warn(
            "Adapted layers that the model never calls aren't trained, "
            "and their updates would have an effect only in `merge`: leave "
            f"them out of `target_layers`. Received: {list(idle)}",
            stacklevel=users_line(),
        )
        for row in idle.values():
            row.gate.read.add(row.index)

"""One training step: Keras's own, between a drawn rank and a masked update.

Keras has two step conventions. `stateful` serves TensorFlow and torch,
`stateless` serves JAX; what a DyLoRA step does is in `step`.
"""

import functools

import keras

from keras_dylora.training import step

match keras.backend.backend():
    case "jax":
        from keras_dylora.training.stateless import call
        from keras_dylora.training.stateless import guarded
        from keras_dylora.training.stateless import sync
        from keras_dylora.training.stateless import train_step
    case _:
        from keras_dylora.training.stateful import call
        from keras_dylora.training.stateful import guarded
        from keras_dylora.training.stateful import sync
        from keras_dylora.training.stateful import train_step

check_frozen = step.check_frozen
summed_loss = functools.partial(step.summed_loss, call)

__all__ = ["check_frozen", "guarded", "summed_loss", "sync", "train_step"]

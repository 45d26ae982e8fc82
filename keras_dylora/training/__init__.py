"""A training step: Keras's own, between a drawn rank and a masked update.

Keras has two step conventions. `stateful` serves TensorFlow and torch,
`stateless` serves JAX; what a DyLoRA step does is in `step`, what gate and
loss it has in `objectives`.
"""

import keras

from keras_dylora.training import functions
from keras_dylora.training.full_rank import at_full_rank, order_columns
from keras_dylora.training.interruption import interruptible, with_callback
from keras_dylora.training.loss_gradient import loss_gradient
from keras_dylora.training.phases import Phases
from keras_dylora.training.step import check_frozen, drawn, masked

match keras.backend.backend():
    case "jax":
        from keras_dylora.training import jax as skin
    case _:
        from keras_dylora.training import (  # type: ignore[no-redef]
            stateful as skin,
        )

forward = skin.forward
tracing = skin.tracing
train_step = skin.train_step
write_back = skin.write_back
make_generate = functions.make_generate


def tuning_function(model, step):
    """A train function that has a batch tune, and trains nothing.

    `step` is a function of a batch that gives its logs.
    """
    function = skin.tuning_function(model, step)
    return skin.restore_on_error(model, "train", function)


def make(model, kind, keras_make, force):
    return functions.make(model, kind, keras_make, skin.restore_on_error, force)

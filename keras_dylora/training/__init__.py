"""A training step: Keras's own, between a drawn rank and a masked update.

Keras has two step conventions: `stateful` serves TensorFlow and torch, `jax`
serves JAX. `step` has what a DyLoRA step does, and `objectives` has its gates
and its loss.
"""

import keras

from keras_dylora.training import functions
from keras_dylora.training.full_rank import at_full_rank, order_columns
from keras_dylora.training.interruption import interruptible, with_callback
from keras_dylora.training.loss_gradient import loss_gradient
from keras_dylora.training.objectives import OBJECTIVES, WithCuts
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
make_own = functions.make_own


def with_tuning(model, tuning):
    """Makes a train function that trains with cuts and tunes them.

    `tuning` is a `Tuning`, whose cuts it uses on each batch.
    """
    adaptation = model._dylora
    objective = adaptation.objective = WithCuts(
        adaptation.config, len(tuning.chosen), tuning.cores_at
    )

    # The sides of the cuts come with the batch: a compiled function would take
    # them for constants.
    def train_step(*args):
        *state, (batch, objective.sides) = args
        return type(model).train_step(model, *state, batch)

    model.__dict__["train_step"] = train_step
    model.make_train_function(force=True)
    return skin.with_tuning(model, model.train_function, tuning)


def without_tuning(model):
    """Undoes `with_tuning`; the caller makes the train function again."""
    config = model._dylora.config
    model._dylora.objective = OBJECTIVES[config.objective](config)
    model.__dict__.pop("train_step", None)


def make(model, kind, keras_make, force):
    return functions.make(model, kind, keras_make, skin.restore_on_error, force)

"""Training: data in order, and a learning rate."""

import time

import keras
import numpy as np
import tensorflow as tf


@keras.saving.register_keras_serializable(package="keras_dylora_examples")
class WarmupLinear(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then linear decay to 0 at the last step.

    Args:
        learning_rate: float. The peak.
        steps: int. Steps in all.
        warmup: float. The share of them in which the rate rises.
        restart: int. After so many steps the decay begins anew, to 0 at the
            last step too. Defaults to `None`, never.
        height: float. Where it begins then, over the peak.
    """

    def __init__(self, learning_rate, steps, warmup, restart=None, height=1.0):
        super().__init__()
        self.learning_rate, self.steps = learning_rate, steps
        self.warmup, self.restart, self.height = warmup, restart, height

    def __call__(self, step):
        step = keras.ops.cast(step, "float32") + 1.0
        rising = step / max(self.steps * self.warmup, 1.0)
        falling = (self.steps - step) / (self.steps * (1.0 - self.warmup))
        factor = keras.ops.clip(keras.ops.minimum(rising, falling), 0.0, 1.0)
        if self.restart is not None:
            again = (self.steps - step) / max(self.steps - self.restart, 1)
            after = step > self.restart
            factor = keras.ops.where(after, self.height * again, factor)
        return self.learning_rate * factor

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "warmup": self.warmup,
            "restart": self.restart,
            "height": self.height,
        }


def dataset(data, batch_size, seed=None):
    """A batched `tf.data.Dataset` of arrays or lists of strings.

    With a seed it is shuffled: KerasHub makes a dataset of them itself, which
    Keras doesn't shuffle. And TensorFlow tunes a dataset in a thread that
    sleeps longer and longer: at the end of an epoch, or of `predict`, Keras
    would wait for it, up to half a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    examples = tf.data.Dataset.from_tensor_slices(data)
    if seed is not None:
        examples = examples.shuffle(len(examples), seed=seed)
    return examples.batch(batch_size).with_options(options)


def fit(model, data, settings, seed, verbose):
    """Trains a compiled model on arrays, shuffled anew in every epoch.

    Args:
        model: a compiled model.
        data: tuple of arrays or dicts of arrays, as `fit` takes them.
        settings: has `batch_size` and `epochs`.
        seed: int. Seed of the order.
        verbose: as in `fit`.

    Returns:
        Dict of `seconds`, `steps` and `trainable` parameters.
    """
    batches = dataset(data, settings.batch_size, seed)
    start = time.perf_counter()
    model.fit(
        batches,
        epochs=settings.epochs,
        shuffle=False,
        verbose=verbose,
    )
    return {
        "seconds": time.perf_counter() - start,
        "steps": settings.epochs * len(batches),
        "trainable": trainable_parameters(model),
    }


def trainable_parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_weights)

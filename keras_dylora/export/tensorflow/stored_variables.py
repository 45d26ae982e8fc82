"""TensorFlow variables that a trace reads in place of the model's own.

They hold what is stored differently from what the live model has: merged
kernels, or parameters in a shorter dtype.
"""

import contextlib

import tensorflow as tf

from keras_dylora import _keras


def create(variables, dtype, copies=()):
    """Pairs of the Keras and the TensorFlow variable, by `id` of the first.

    For floats wider than `dtype`, if one is given, and for `copies`.
    """
    copied, stored = {id(v) for v in copies}, {}
    for variable in variables:
        value = tf.convert_to_tensor(variable.value)
        narrow = narrowed(value, dtype)
        if narrow is not value or id(variable) in copied:
            stored[id(variable)] = variable, tf.Variable(narrow)
    return stored


def narrowed(value, dtype):
    """A tensor in `dtype`, if one is given and it is a wider float."""
    if (
        dtype is not None
        and value.dtype.is_floating
        and value.dtype.size > tf.as_dtype(dtype).size
    ):
        return tf.cast(value, dtype)
    return value


def reading(stored):
    """Makes Keras read the stored variables, in the dtype it expects.

    Writes go to where they went: the seed of a sampler is written inside a
    loop, out of which no tensor may be kept.
    """
    if not stored:
        return contextlib.nullcontext()
    return _keras.substituted(
        [(v, tf.cast(x, v.dtype)) for v, x in stored.values()],
        lambda variable, value: variable.value.assign(value),
    )

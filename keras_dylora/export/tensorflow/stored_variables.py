"""TensorFlow variables that a trace reads instead of the model's own.

They hold values that are stored in another form than in the live model: merged
kernels, or parameters in a shorter dtype.
"""

import contextlib

import tensorflow as tf

from keras_dylora import _keras


def create(variables, dtype, copies=()):
    """Pairs of the Keras and the TensorFlow variable, by `id` of the first.

    There is a pair for each float that is wider than `dtype`, if one is given,
    and for each of `copies`.
    """
    copied, stored = {id(v) for v in copies}, {}
    for variable in variables:
        value = tf.convert_to_tensor(variable.value)
        narrow = narrowed(value, dtype)
        if narrow is not value or id(variable) in copied:
            stored[id(variable)] = variable, tf.Variable(narrow)
    return stored


def narrowed(value, dtype):
    """The tensor in `dtype`, if one is given and the tensor is wider."""
    if (
        dtype is not None
        and value.dtype.is_floating
        and value.dtype.size > tf.as_dtype(dtype).size
    ):
        return tf.cast(value, dtype)
    return value


def reading(stored):
    """Makes Keras read the stored variables, in the dtype that it expects.

    Writes still go to the model's variables: the seed of a sampler is written
    inside a loop, and no tensor may be kept out of a loop.
    """
    if not stored:
        return contextlib.nullcontext()
    return _keras.substituted(
        [(v, tf.cast(x, v.dtype)) for v, x in stored.values()],
        lambda variable, value: variable.value.assign(value),
    )

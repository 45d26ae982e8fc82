"""The running backend: gradients, compilations and processes, for the tests."""

import contextlib
import logging
import os
import subprocess
import sys

import keras
import numpy as np

NAME = keras.backend.backend()
BACKENDS = ("tensorflow", "jax", "torch")


def to_numpy(x):
    """A tensor or variable as an array, also where it requires a gradient."""
    if NAME == "torch":
        x = keras.ops.convert_to_tensor(x).detach()
    return np.array(keras.ops.convert_to_numpy(x))


def gradients(loss, variables):
    """Gradients of a function without arguments, as NumPy arrays."""
    if NAME == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        found = tape.gradient(value, [v.value for v in variables])
    elif NAME == "jax":
        import jax

        def stateless(values):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return loss()

        found = jax.grad(stateless)([v.value for v in variables])
    else:
        for variable in variables:
            variable.value.grad = None
        loss().backward()
        found = [v.value.grad for v in variables]
    return [to_numpy(g) for g in found]


@contextlib.contextmanager
def count_compilations(model):
    """Counts traces and compilations of the model's functions by name.

    TensorFlow: traces of the Python steps. JAX: what XLA compiles, from JAX's
    own log. torch compiles nothing.
    """
    counts = {}
    if NAME == "jax":
        import jax

        class Handler(logging.Handler):
            def emit(self, record):
                message = record.getMessage()
                if message.startswith("Finished XLA compilation of jit("):
                    name = message.split("jit(")[1].split(")")[0]
                    counts[name] = counts.get(name, 0) + 1

        handler = Handler()
        logger = logging.getLogger("jax")
        logger.addHandler(handler)
        propagate, logger.propagate = logger.propagate, False
        jax.config.update("jax_log_compiles", True)
        try:
            yield counts
        finally:
            jax.config.update("jax_log_compiles", False)
            logger.removeHandler(handler)
            logger.propagate = propagate
        return
    names = [
        name
        for name in ("train_step", "test_step", "predict_step", "generate_step")
        if hasattr(model, name)
    ]

    def counted(name, step):
        def wrapper(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return step(*args, **kwargs)

        return wrapper

    for name in names:
        object.__setattr__(model, name, counted(name, getattr(model, name)))
    try:
        yield counts
    finally:
        for name in names:
            object.__delattr__(model, name)


def run_python(code, *args, backend=NAME):
    """Runs Python code in a fresh process and returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def snapshot(variables):
    """Bits of variables, for exact comparison."""
    return [to_numpy(v) for v in variables]

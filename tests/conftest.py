"""Every test runs on the backend that KERAS_BACKEND names."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Suites share the cores, and OpenMP's threads would spin for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import pytest

import keras_dylora as kd

if keras.backend.backend() == "jax":
    import jax

    # Tests compile much more than they compute; processes that they start,
    # and the comparison of the backends, have XLA as users do.
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"


def pytest_addoption(parser):
    parser.addoption(
        "--jit-compile",
        choices=("trace", "true"),
        help="what `compile` of a `DyLoRAModel` does where a test doesn't say",
    )


@pytest.fixture(autouse=True)
def jit_compile(request, monkeypatch):
    given = request.config.getoption("jit_compile")
    if given is None:
        return
    own = keras.Model.compile

    def compile(model, *args, **kwargs):
        if isinstance(model, kd.DyLoRAModel) and not kwargs.get("run_eagerly"):
            kwargs.setdefault("jit_compile", given == "true" or given)
        own(model, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "compile", compile)


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """Keras collects garbage when a layer loses a variable.

    That takes a second where backends have traced for many tests, unless what
    they keep is out of the way.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)

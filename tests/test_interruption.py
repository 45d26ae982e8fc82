"""Ctrl-C or an error in the middle of a run: the model can be used."""

import os
import signal

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.marks import once
from tests.models import mlp, mlp_data, randomize_adapters


class Interrupting(keras.utils.PyDataset):
    """Batches of 8, of which the third comes with a Ctrl-C."""

    def __init__(self, inputs_alone):
        super().__init__()
        self.data = mlp_data(64)[: 1 if inputs_alone else 2]

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return tuple(v[8 * i : 8 * i + 8] for v in self.data)


DOORS = {
    "fit": lambda m, x: m.fit(x, shuffle=False, verbose=0),
    "evaluate": lambda m, x: m.evaluate(x, verbose=0),
    "validation": lambda m, x: m.fit(
        *mlp_data(16), validation_data=x, verbose=0
    ),
    "evaluate_ranks": lambda m, x: kd.evaluate_ranks(m, x, verbose=0),
    "predict": lambda m, x: m.predict(x, verbose=0),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize("door", once(DOORS, but=["fit"]))
def test_the_model_outlives_it(door):
    model = randomize_adapters(mlp())
    model.compile("adam", "mse")
    x, _ = mlp_data(16)
    model.predict(x, verbose=0)
    model.set_rank(2)
    before = backend.snapshot(model.variables)
    with pytest.raises(KeyboardInterrupt):
        DOORS[door](model, Interrupting(door == "predict"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.rank == 2
    after = backend.snapshot(model.variables)
    if door not in ("fit", "validation"):
        assert all(map(np.array_equal, before, after))
    assert np.isfinite(model.predict(x, verbose=0)).all()
    model.fit(*mlp_data(16), verbose=0)


class Interrupted(keras.callbacks.Callback):
    """Ctrl-C before a batch is done, and what came after it."""

    def __init__(self):
        super().__init__()
        self.ended, self.finished = [], False

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_end(self, batch, logs=None):
        self.ended.append(batch)

    def on_train_end(self, logs=None):
        self.finished = True


@pytest.mark.skipif(backend.NAME != "jax", reason="others lose nothing")
def test_the_batch_is_ended_and_the_run_is_not():
    model = mlp()
    model.compile("adam", "mse")
    seen = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.fit(*mlp_data(64), batch_size=8, verbose=0, callbacks=[seen])
    # `BackupAndRestore`, for one, deletes its backup at the end of a run.
    assert seen.ended[:3] == [0, 1, 2] and not seen.finished
    assert int(model._dylora.ranks_drawn) == len(seen.ended)
    # The same list, as validation hands on, isn't interrupted for ever.
    callbacks = keras.callbacks.CallbackList([Interrupted()], model=model)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.fit(
                *mlp_data(64), batch_size=8, verbose=0, callbacks=callbacks
            )
    model.fit(*mlp_data(16), batch_size=8, verbose=0, callbacks=callbacks)


class Broken(keras.utils.PyDataset):
    """Batches of 8, of which one can't be read."""

    def __init__(self, inputs_alone, at):
        super().__init__()
        self.data = mlp_data(64)[: 1 if inputs_alone else 2]
        self.at = at

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == self.at:
            raise OSError("unreadable")
        return tuple(v[8 * i : 8 * i + 8] for v in self.data)


def trained_model(steps_per_execution=1):
    """A model that has computed everything once, at rank 2."""
    keras.utils.set_random_seed(0)
    model = randomize_adapters(mlp())
    model.compile("adam", "mse", steps_per_execution=steps_per_execution)
    data = mlp_data(16)
    model.fit(*data, verbose=0)
    model.evaluate(*data, verbose=0)
    model.set_rank(2)
    return model


def assert_usable(model, values):
    """Whether a model is at rank 2, and has values, and trains."""
    assert model.rank == 2
    found = backend.snapshot(model.variables)
    assert all(map(np.array_equal, values, found))
    x, y = mlp_data(16)
    before = model.predict(x, verbose=0)
    model.set_rank(1)
    assert not np.array_equal(model.predict(x, verbose=0), before)
    model.fit(x, y, verbose=0)
    assert model.rank == 1


@pytest.mark.parametrize(
    "door, at, steps",
    [
        ("fit", 0, 1),
        pytest.param(
            "fit", 3, 2, marks=pytest.mark.skipif(backend.NAME == "torch",
            reason="Keras refuses steps_per_execution there"),
        ),
        *(
            pytest.param(*case, 1, marks=pytest.mark.once)
            for case in [("evaluate", 0), ("evaluate_ranks", 3), ("predict", 0)]
        ),
    ],
)  # fmt: skip
def test_data_that_cannot_be_read(door, at, steps):
    model = trained_model(steps)
    if door == "fit":
        twin = trained_model(steps)
        for batch in range(at // steps * steps):
            rows = slice(8 * batch, 8 * batch + 8)
            twin.train_on_batch(*(v[rows] for v in mlp_data(64)))
        values = backend.snapshot(twin.variables)
    else:
        values = backend.snapshot(model.variables)
    with pytest.raises(Exception, match="unreadable"):
        DOORS[door](model, Broken(door == "predict", at))
    if backend.NAME == "tensorflow" and door == "fit":  # reads ahead
        values = backend.snapshot(model.variables)
    assert_usable(model, values)


class Failing(keras.callbacks.Callback):
    """Raises at the end of the second batch, whatever the batches are for."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise OSError("no space left")

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


@pytest.mark.parametrize("door", once(["fit", "evaluate", "predict"]))
def test_a_callback_that_raises(door):
    model, twin, data = trained_model(), trained_model(), mlp_data(32)
    if door == "fit":
        for rows in (slice(0, 8), slice(8, 16)):
            twin.train_on_batch(*(v[rows] for v in data))
    with pytest.raises(OSError, match="no space left"):
        getattr(model, door)(
            *data[: 1 if door == "predict" else 2],
            batch_size=8, verbose=0, callbacks=[Failing()],
            **{"shuffle": False} if door == "fit" else {},
        )  # fmt: skip
    assert_usable(model, backend.snapshot(twin.variables))


@pytest.mark.skipif(backend.NAME != "jax", reason="others train what is left")
@pytest.mark.parametrize("door", ["fit", "train_on_batch"])
def test_a_step_that_keras_refuses(door):
    model, data = trained_model(), mlp_data(16)
    getattr(model, door)(*data)
    values = backend.snapshot(model.variables)
    body = model.get_layer("first")
    for _ in range(2):
        body.trainable = False
        with pytest.raises(ValueError, match="(?i)optimizer|variables"):
            getattr(model, door)(*data)
        assert model.rank == 2
        model.set_rank(3)
        model.set_rank(2)
        body.trainable = True
    assert_usable(model, values)
    body.trainable = False
    model.compile("adam", "mse")
    model.fit(*data, verbose=0)


@pytest.mark.parametrize(
    "door", once(["evaluate", "test_on_batch", "predict"], but=["evaluate"])
)
def test_inputs_of_another_shape(door):
    model, (x, y) = trained_model(), mlp_data(16)
    values = backend.snapshot(model.variables)
    with pytest.raises(Exception, match="(?i)shape|incompatible"):
        getattr(model, door)(x[:, :7], *[y][door == "predict" :])
    assert_usable(model, values)

"""Ctrl-C in the middle of a batch: the model is as it was at its end."""

import os
import signal

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
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
    "fit": lambda m, x: m.fit(x, verbose=0),
    "evaluate": lambda m, x: m.evaluate(x, verbose=0),
    "validation": lambda m, x: m.fit(
        *mlp_data(16), validation_data=x, verbose=0
    ),
    "evaluate_ranks": lambda m, x: kd.evaluate_ranks(m, x, verbose=0),
    "predict": lambda m, x: m.predict(x, verbose=0),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize("door", DOORS)
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

"""Steps at the full rank, then the order, then drawn ranks."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.live.decays import Decays
from keras_dylora.live.tuning import TuningInFit
from tests import backend
from tests.linear import RANK, batches
from tests.models import BuiltLate, mlp_data, progressive_mlp

not_on_torch = pytest.mark.skipif(
    backend.NAME == "torch", reason="Keras refuses steps_per_execution there"
)


class Ranks(keras.callbacks.Callback):
    """Records the rank of each step, and what the columns are after it."""

    def __init__(self):
        super().__init__()
        self.ranks, self.ordered = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.ranks.append(int(logs["rank"]))
        kd.training.write_back(self.model)
        factors = [layer.factors() for layer in self.model.dylora_layers]
        self.ordered.append(all(is_ordered(x) for x in factors))


def is_ordered(factors):
    """Whether the columns are orthogonal and the largest comes first."""
    gram = factors.down.T @ factors.down
    lengths = np.diag(gram)
    off = np.abs(gram - np.diag(lengths)).max()
    return bool(off < 1e-4 * lengths.max() and (np.diff(lengths) <= 1e-6).all())


@pytest.mark.parametrize(
    "steps_per_execution", [1, pytest.param(3, marks=not_on_torch)]
)
def test_full_rank_steps_then_the_order_then_ranks(steps_per_execution):
    model = progressive_mlp(6)
    model.compile("adam", "mse", steps_per_execution=steps_per_execution)
    seen = Ranks()
    x, y = mlp_data(96)
    with backend.count_compilations(model) as counts:
        model.fit(
            x, y, batch_size=8, epochs=2, shuffle=False, verbose=0,
            callbacks=[seen],
        )  # fmt: skip
    first = 6 // steps_per_execution
    assert seen.ranks[:first] == [RANK] * first
    assert len(set(seen.ranks[first:])) > 1
    assert seen.ordered.index(True) == first - 1
    if backend.NAME != "torch":  # it compiles nothing
        assert counts and all(
            n == 1 for name, n in counts.items() if "train" in name
        )
    assert model.rank == RANK


def test_a_fit_of_ones_own():
    class Own(keras.Sequential):
        def fit(self, x, y, **rest):
            return super().fit(x, y, **rest)

    class Closed(keras.Sequential):
        def fit(self, x, y):
            return super().fit(x, y, batch_size=8, verbose=0)

    for cls in (Own, Closed):
        model = cls([keras.Input((5,)), keras.layers.Dense(3, name="query")])
        config = kd.DyLoRAConfig.progressive(2, rank=2)
        kd.enable_dylora(model, config, verbose=0)
        model.compile("adam", "mse")
        if cls is Own:
            model.fit(*batches(32), batch_size=8, verbose=0)
            assert model._dylora.full_rank == 0
        else:
            with pytest.raises(TypeError, match=r"Received: fit\(x, y\)"):
                model.fit(*batches(32))


def test_the_place_is_read_only_when_it_may_be_the_last():
    """Reading it waits for the device, so not in every step."""
    reads = []

    def write_back(model):
        kd.training.write_back(model)
        reads.append(int(backend.to_numpy(model._dylora.ranks_drawn)))

    model = progressive_mlp(4)
    model.compile("adam", "mse")
    tuning = TuningInFit(model)
    callback = kd.training.Phases(write_back, Decays(model), tuning)
    model.fit(*mlp_data(96), batch_size=8, verbose=0, callbacks=[callback])
    assert set(reads) == {0, 4}


@not_on_torch
def test_full_rank_steps_that_a_function_passes_by():
    model = progressive_mlp(4)
    model.compile("adam", "mse", steps_per_execution=3)
    seen = Ranks()
    model.fit(*mlp_data(96), batch_size=8, verbose=0, callbacks=[seen])
    assert seen.ranks[:2] == [RANK, RANK]
    assert seen.ordered.index(True) == 1


def test_too_few_steps_are_trained_with_a_warning(tmp_path):
    model = progressive_mlp(100)
    model.compile("adam", "mse")
    data = mlp_data(64)
    with pytest.warns(UserWarning, match="full_rank_steps=100, of which 92"):
        model.fit(*data, batch_size=8, verbose=0)
    report = kd.evaluate_ranks(model, *data, verbose=0)
    assert [report.is_trained(b) for b in (1, 3, 4)] == [False, False, True]
    with pytest.warns(UserWarning, match="rank=2 of .* from rank 4 on"):
        kd.save_adapter(model, tmp_path / "cut", rank=2)
    kd.order_ranks(model)
    assert kd.evaluate_ranks(model, *data, verbose=0).is_trained(1)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.once
def test_saved_and_resumed(stop, tmp_path):
    def compiled(model):
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    def fit(model, x, y):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)

    x, y = mlp_data(64)
    whole = compiled(progressive_mlp(3, draw="example"))
    fit(whole, x, y)
    first = compiled(progressive_mlp(3, draw="example"))
    at = 8 * stop
    if stop < 3:
        with pytest.warns(UserWarning, match=f"of which {3 - stop}"):
            fit(first, x[:at], y[:at])
    else:
        fit(first, x[:at], y[:at])
    first.save(tmp_path / "first.keras")
    second = keras.saving.load_model(tmp_path / "first.keras")
    fit(second, x[at:], y[at:])
    for a, b in zip(whole.weights, second.weights, strict=True):
        np.testing.assert_allclose(
            backend.to_numpy(a), backend.to_numpy(b), atol=1e-5
        )


def test_backup_and_restore(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = progressive_mlp(5)
        model.compile("adam", "mse")
        seen = Ranks()
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        try:
            model.fit(
                *mlp_data(24), batch_size=8, epochs=4, verbose=0,
                callbacks=[backup, seen, *callbacks],
            )  # fmt: skip
        except KeyboardInterrupt:
            pass
        return seen

    first = run(Stop())
    assert first.ordered.index(True) == 4
    again = run()
    assert len(again.ranks) == 6
    assert len(set(again.ranks)) > 1


@pytest.mark.parametrize("steps", [12, 5], ids=["before", "behind"])
def test_the_best_weights_of_a_callback_are_in_order(steps):
    """The best epoch is the one whose loss is the highest."""
    model = progressive_mlp(steps)
    model.compile("adam", "mse")
    best = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=4, restore_best_weights=True
    )
    own = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append(products(model))
    )
    kept = []
    data = mlp_data(64)
    fit = {"epochs": 4, "batch_size": 8, "verbose": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(*data, callbacks=[own, best], **fit)
    assert steps == 5 or best.best_epoch == 0  # before the order
    told = ["in order again" in str(w.message) for w in caught]
    assert any(told) == (steps == 12)
    for a, b in zip(kept[best.best_epoch], products(model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if steps == 12:
        assert all(is_ordered(x.factors()) for x in model.dylora_layers)
    assert model._dylora.full_rank == 0
    with warnings.catch_warnings(action="error", category=UserWarning):
        model.fit(*data, **fit)


def test_weights_of_a_checkpoint_before_the_order(tmp_path):
    """The file knows that they aren't in order: the run goes on from it."""
    model = progressive_mlp(12)
    model.compile("adam", "mse")
    path = str(tmp_path / "{epoch}.weights.h5")
    saved = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    data = mlp_data(64)
    fit = {"epochs": 4, "batch_size": 8, "verbose": 0}
    model.fit(*data, callbacks=[saved], **fit)
    model.load_weights(path.format(epoch=1))
    assert model._dylora.full_rank == 1
    seen = Ranks()
    model.fit(*data, callbacks=[seen], **fit)
    assert seen.ranks[:4] == [RANK] * 4
    assert seen.ordered.index(True) == 3


def products(model):
    kd.training.write_back(model)
    return [x.factors().product() for x in model.dylora_layers]


def test_a_model_that_is_built_in_its_first_step():
    model = BuiltLate(full_rank_steps=2)
    model.compile("adam", "mse")
    seen = Ranks()
    model.fit(*mlp_data(48), batch_size=8, verbose=0, callbacks=[seen])
    assert seen.ranks[:2] == [3, 3]
    assert seen.ordered.index(True) == 1

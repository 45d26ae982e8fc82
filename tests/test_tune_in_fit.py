"""The last steps of `fit`, which tune cuts."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.live.tuning import Tuning
from keras_dylora.training.objectives import CUT_SHARE
from tests import backend
from tests.marks import once
from tests.models import mlp, mlp_data, randomize

BATCH, STEPS, EPOCHS = 16, 4, 3  # of 64 examples
OPTIONS = {"full_rank_steps": 0.25, "tune": 0.5}  # 3, 3 and 6 of 12 steps


class InOrder(keras.utils.PyDataset):
    """The batches of `fit`."""

    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return tuple(v[i * BATCH : (i + 1) * BATCH] for v in mlp_data())


class At(keras.callbacks.Callback):
    """Calls a function of the model after a step of the run."""

    def __init__(self, step, function):
        super().__init__()
        self.step, self.function = step, function

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if not self.step:
            self.function(self.model)


def model_of(compiled=None, model=kd.DyLoRAModel, **options):
    options = {"draw": "example", **OPTIONS, **options}
    model = randomize(mlp(scaling="constant", options=options, model=model))
    model.compile("adam", "mse", metrics=["mae"], **compiled or {})
    return model


def fit(model, callbacks=(), epochs=EPOCHS, **kwargs):
    return model.fit(
        *mlp_data(),
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        **{"verbose": 0, **kwargs},
        callbacks=list(callbacks),
    )


def sides(model):
    """Of all cuts, by rank."""
    cuts = model._dylora.named.cuts
    return {max(c.ranks.values()): [*c.left.values()] for c in cuts}


def assert_same_cuts(found, wanted, atol=1e-6):
    assert sides(found).keys() == sides(wanted).keys() == {1, 2}
    for rank, values in sides(wanted).items():
        for a, b in zip(sides(found)[rank], values, strict=True):
            np.testing.assert_allclose(a, b, atol=atol)


def assert_same(found, wanted, atol=0):
    for a, b in zip(
        backend.snapshot(found.weights),
        backend.snapshot(wanted.weights),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("jit", [None, "trace"])
def test_a_step_trains_the_maximum_and_the_cuts_and_tunes_them(jit):
    if jit and backend.NAME != "torch":
        pytest.skip("only torch traces a step by `jit_compile`")
    compiled = {"jit_compile": jit} if jit else {}
    x, y = InOrder()[STEPS - 1]

    def made(**options):
        model = model_of(full_rank_steps=0, **options)
        rate = keras.optimizers.SGD(0.1)  # changes are as the gradients
        model.compile(rate, "mse", metrics=["mae"], **compiled)
        return model

    model = made(tune=1 / STEPS)
    history = fit(model, epochs=1).history
    # As far as it had come before the last step, in which cuts are nested.
    before = made(tune=0)
    before.fit(
        *(v[:-BATCH] for v in mlp_data()), BATCH, shuffle=False, verbose=0
    )
    start = backend.snapshot(before.weights)

    def change(ranks):
        weights = {"rank_distribution": kd.Categorical(ranks), "tune": 0}
        other = made(**weights)
        other.set_weights(start)
        other._dylora.ranks_drawn.assign(STEPS - 1)
        other.train_on_batch(x, y)
        after = backend.snapshot(other.weights)
        return [a - b for a, b in zip(after, start, strict=True)]

    maximum, cut = change({4: 1}), change({1: 1, 2: 1})
    for value, weight, a, b in zip(
        start, before.weights, maximum, cut, strict=True
    ):
        weight.assign(value + a + CUT_SHARE * b)
    assert_same(model, before, 1e-6)
    # Then the cuts are tuned on the same batch.
    ranks = [dict.fromkeys(before._dylora.layers, b) for b in (1, 2)]
    tuning = Tuning(before, ranks, 1)
    tuning.step((x, y))
    before._dylora.set_tuned_cuts(tuning.cuts())
    assert_same_cuts(model, before, 1e-5)
    assert history.keys() == {"loss", "mae"}
    assert int(backend.to_numpy(model.optimizer.iterations)) == STEPS
    report = kd.evaluate_ranks(model, *mlp_data(), verbose=0)
    assert [report.state(b) for b in (1, 2, 3)] == ["tuned"] * 2 + ["trained"]


@pytest.mark.once
def test_validation_computes_with_the_cuts_so_far():
    model = model_of()
    model.set_rank(1)
    data = mlp_data()
    history = fit(model, validation_data=data).history
    after = model.evaluate(*data, verbose=0, return_dict=True)
    np.testing.assert_allclose(history["val_loss"][-1], after["loss"], 1e-5)
    assert history["val_loss"][-1] < history["val_loss"][1]
    model.fit(*data, verbose=0)  # trains, and tunes, again


class Stopping(Exception):
    pass


def stop(model):
    raise Stopping


@pytest.mark.parametrize("at", once([6, 9], but=[9]), ids=["before", "within"])
def test_an_interrupted_run_goes_on_in_another_process(tmp_path, at):
    path = tmp_path / "model.keras"

    def interrupted(model):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return fit(model, [backup, At(at, stop)])

    whole = model_of()
    fit(whole)
    model = model_of()
    with pytest.raises(Stopping):
        interrupted(model)
    model = model_of()
    fit(model, [keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert_same_cuts(model, whole)
    assert_same(model, whole, 1e-6)
    # A checkpoint of an epoch, loaded.
    model = model_of()
    fit(model, [At(8, lambda model: model.save(path))])
    model = keras.saving.load_model(path)
    assert len(model._dylora.named.tuning)
    fit(model, initial_epoch=2)
    assert_same_cuts(model, whole)
    assert_same(model, whole, 1e-6)
    assert not len(model._dylora.named.tuning)


@pytest.mark.once
def test_an_error_keeps_the_cuts_so_far():
    model = model_of()
    with pytest.raises(Stopping):
        fit(model, [At(9, stop)])
    x, _ = mlp_data(8)
    before = sides(model)
    with model.rank_scope(1):
        model.predict(x, verbose=0)
    # The model trains on, its own way.
    fit(model)
    for a, b in zip(sides(model)[1], before[1], strict=True):
        assert np.abs(a - b).max() > 1e-4
    # One that stops before it tunes drops them, with a warning.
    with (
        pytest.raises(Stopping),
        pytest.warns(UserWarning, match="tuned cuts are dropped"),
    ):
        fit(model, [At(2, stop)])
    assert not sides(model)


def test_several_steps_in_one():
    if backend.NAME == "torch":
        pytest.skip("Keras has no `steps_per_execution` on torch")
    model = model_of({"steps_per_execution": 3})
    fit(model, epochs=4)  # the eighth step comes with the ninth
    assert int(backend.to_numpy(model.optimizer.iterations)) == 16
    assert sides(model).keys() == {1, 2}


@pytest.mark.parametrize(
    "options",
    once(
        [
            {"objective": "summed"},
            {"objective": "matryoshka"},
            {"draw": "step"},
            {},
        ]
    ),
    ids=str,
)
def test_every_objective(options):
    model = model_of(**{"draw": "step", "full_rank_steps": 0, **options})
    fit(model)
    assert sides(model).keys() == {1, 2}
    fit(model, epochs=1)  # trains its own way again, and tunes
    assert sides(model).keys() == {1, 2}


class WithStep(kd.DyLoRAModel):
    """A model whose own training step looks at the batch."""

    def train_step(self, *args):
        x, y = args[-1]
        assert x.shape[1:] == (10,) and y.shape[1:] == (3,)
        return super().train_step(*args)


def test_a_training_step_of_ones_own():
    model = model_of(model=WithStep)
    fit(model)
    assert sides(model).keys() == {1, 2}
    other = model_of()
    fit(other)
    assert_same(model, other, 1e-6)
    assert model.train_step.__func__ is WithStep.train_step


def test_a_line_for_each_phase(capsys):
    fit(model_of(), verbose=2)
    shown = capsys.readouterr().out
    assert "Step 3: the columns are in order" in shown
    assert "Step 6: the maximum rank and the cuts of lower ones" in shown


def test_a_lora_that_is_ordered_and_tuned():
    model = model_of(full_rank_steps=0.5)
    fit(model)
    factors = [x.factors() for x in model.dylora_layers]
    for down, up in ((x.down, x.up) for x in factors):
        weight = np.linalg.norm(down, axis=0) * np.linalg.norm(up, axis=1)
        assert (np.diff(weight) <= 1e-6).all()
    assert sides(model).keys() == {1, 2}


class PutBack(keras.callbacks.Callback):
    """Gives the model the weights of an epoch, as `EarlyStopping` does."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.weights = self.model.get_weights()
            self.outputs = at_rank_1(self.model)

    def on_train_end(self, logs=None):
        self.model.set_weights(self.weights)


def at_rank_1(model):
    with model.rank_scope(1):
        return model.predict(mlp_data(8)[0], verbose=0)


def test_weights_of_an_epoch_have_their_cuts():
    model, back = model_of(full_rank_steps=0.5), PutBack(1)
    fit(model, [back])
    np.testing.assert_allclose(at_rank_1(model), back.outputs, atol=1e-5)
    assert sides(model).keys() == {1, 2}


@pytest.mark.parametrize("full_rank", once([0.5, 1], but=[0.5]))
def test_weights_of_before_the_tuning_have_no_cuts(full_rank):
    model = model_of(full_rank_steps=full_rank)
    with pytest.warns(UserWarning, match="so they are dropped"):
        fit(model, [PutBack(0)])
    assert not sides(model)


def test_ranks_that_are_not_tuned_are_cuts_of_ordered_columns():
    model = model_of(full_rank_steps=0.5)
    fit(model)
    report = kd.evaluate_ranks(model, *mlp_data(), verbose=0)
    states = [report.state(b) for b in (1, 2, 3, 4)]
    assert states == ["tuned", "tuned", "cut", "trained"]


@pytest.mark.once
def test_an_adapter_of_its_own():
    model = model_of()
    fit(model)
    model.add_adapter("other")
    assert not sides(model)
    fit(model)
    found = sides(model)
    model.set_adapter("default")
    assert any(
        np.abs(a - b).max() > 1e-4
        for a, b in zip(sides(model)[1], found[1], strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": 1.0}, r"`tune` must be in \[0, 1\)"),
        ({"tune": -0.1}, r"`tune` must be in \[0, 1\)"),
        ({"tune": 0.5, "rank": 1}, "for ranks below the maximum"),
        ({"tune": 0.7, "full_rank_steps": 0.4}, "mustn't exceed 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        kd.DyLoRAConfig.progressive(**options)


def test_config():
    config = kd.DyLoRAConfig.progressive(rank=8, tune=0.2)
    assert config.tune == 0.2 and config.tuned_ranks == [1, 2, 4]
    assert kd.DyLoRAConfig.from_config(config.get_config()) == config
    assert config.at_maximum(1).tune == 0
    chosen = kd.DyLoRAConfig(
        rank=8, rank_distribution=kd.Categorical({3: 1, 8: 1})
    )
    assert chosen.tuned_ranks == [3]

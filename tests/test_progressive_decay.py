"""ProgressiveDecay and shares: steps that `fit` knows."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import mlp, mlp_data, randomize

PEAK = 1e-2
BATCH, STEPS, EPOCHS = 16, 4, 3  # of 64 examples
TOTAL, ORDER = 12, 5  # 0.4 of 12, rounded


class Rates(keras.callbacks.Callback):
    """The rate of each step, and whether it was at the full rank."""

    def __init__(self):
        super().__init__()
        self.found, self.full = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.jax_state_sync() if backend.NAME == "jax" else None
        optimizer = self.model.optimizer
        self.found.append(float(backend.to_numpy(optimizer.learning_rate)))
        full = self.model._dylora.full_rank
        self.full.append(full is not None and int(backend.to_numpy(full)))


class StopAfter(keras.callbacks.Callback):
    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 == self.epochs


def model_of(share=0.4, seed=0, **schedule):
    options = {"full_rank_steps": share, "draw": "example"}
    model = randomize(mlp(scaling="constant", options=options), seed=seed)
    rate = kd.ProgressiveDecay(PEAK, **schedule)
    model.compile(keras.optimizers.Adam(rate), "mse")
    return model


def fit(model, callbacks=(), epochs=EPOCHS, **kwargs):
    rates = Rates()
    model.fit(
        *mlp_data(),
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, rates],
        **kwargs,
    )
    return rates


def expected(height, total=TOTAL, order=ORDER):
    step = np.arange(total)
    first, again = 1 - step / total, height * (total - step) / (total - order)
    return PEAK * np.where(step < order, first, again)


@pytest.mark.parametrize("restart", [None, 2.0])
def test_the_rate_begins_anew_at_the_order(restart):
    rates = fit(model_of(restart=restart))
    # Two of three linear layers have adapters, which is most of them.
    np.testing.assert_allclose(rates.found, expected(restart or 1), rtol=1e-5)
    assert rates.full == [1] * ORDER + [0] * (TOTAL - ORDER)


def test_few_layers_begin_anew_at_twice_the_peak():
    inputs = keras.Input((10,))
    x = inputs
    for name in ("first", "second", "third"):
        x = keras.layers.Dense(10, "tanh", name=name)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    config = kd.DyLoRAConfig.progressive(target_layers="second", rank=4)
    kd.enable_dylora(model, config, verbose=0, trainable_layers="head")
    model.compile(keras.optimizers.Adam(kd.ProgressiveDecay(PEAK)), "mse")
    np.testing.assert_allclose(fit(model).found, expected(2.0), rtol=1e-5)


def test_a_run_in_several_calls_is_the_same(tmp_path):
    whole = model_of()
    fit(whole)
    parts = model_of()
    fit(parts, [StopAfter(1)])
    fit(parts, [StopAfter(2)], initial_epoch=1)
    parts.save(tmp_path / "model.keras")
    parts = keras.saving.load_model(tmp_path / "model.keras")
    rates = fit(parts, initial_epoch=2)
    np.testing.assert_allclose(rates.found, expected(1)[8:], rtol=1e-5)
    for found, wanted in zip(
        backend.snapshot(parts.weights),
        backend.snapshot(whole.weights),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_another_fit_decays_once():
    model = model_of()
    fit(model)
    rates = fit(model, epochs=2)
    wanted = PEAK * (1 - np.arange(8) / 8)
    np.testing.assert_allclose(rates.found, wanted, rtol=1e-5)
    assert not any(rates.full)


def test_warm_up_and_accumulation():
    options = {"full_rank_steps": 6}
    model = randomize(mlp(scaling="constant", options=options))
    rate = kd.ProgressiveDecay(PEAK, restart=0.5, warmup=0.25)
    optimizer = keras.optimizers.Adam(rate, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    step = np.arange(TOTAL)
    first = np.minimum((step + 1) / 3, (TOTAL - step) / 9)
    again = 0.5 * (TOTAL - step) / 6
    wanted = PEAK * np.where(step < 6, first, again)
    np.testing.assert_allclose(fit(model).found, wanted, rtol=1e-5)


def test_without_full_rank_steps():
    model = model_of(0)
    wanted = PEAK * (1 - np.arange(TOTAL) / TOTAL)
    np.testing.assert_allclose(fit(model).found, wanted, rtol=1e-5)


def test_steps_of_ones_own():
    model = model_of(steps=4, order=2, restart=1.0)
    x, y = mlp_data()
    found = []
    for step in range(4):
        rate = backend.to_numpy(model.optimizer.learning_rate)
        found.append(float(rate))
        model.train_on_batch(x, y)
        if step == 1:
            kd.order_ranks(model)
    np.testing.assert_allclose(found, [PEAK, PEAK * 0.75, PEAK, PEAK * 0.5])


def test_config():
    rate = kd.ProgressiveDecay(PEAK, 2.0, 0.1)
    again = kd.ProgressiveDecay.from_config(rate.get_config())
    assert again.get_config() == rate.get_config()
    rate = kd.ProgressiveDecay(PEAK)
    rate.take(10, 4, 0, 2.0)  # what `fit` tells
    again = kd.ProgressiveDecay.from_config(rate.get_config())
    assert float(again(4)) == float(rate(4)) == pytest.approx(2 * PEAK)
    config = kd.DyLoRAConfig.progressive(rank=4)
    assert config.full_rank_steps == 0.4
    assert kd.DyLoRAConfig.from_config(config.get_config()) == config


def test_data_of_unknown_length():
    def batches():
        x, y = mlp_data()
        while True:
            yield x[:BATCH], y[:BATCH]

    model = model_of()
    with pytest.raises(ValueError, match="how many batches an epoch has"):
        model.fit(batches(), verbose=0)
    model.fit(batches(), steps_per_epoch=5, verbose=0)
    assert not int(backend.to_numpy(model._dylora.full_rank))


def test_a_list_of_callbacks_that_is_the_users():
    """It has no number of steps, of which a number of ours needs none.

    Keras runs its callbacks in other threads, and the order can't be there.
    """
    options = {"full_rank_steps": 2, "draw": "example"}
    model = randomize(mlp(scaling="constant", options=options))
    model.compile("adam", "mse")
    callbacks = keras.callbacks.CallbackList(add_history=True, model=model)
    model.fit(*mlp_data(), batch_size=BATCH, verbose=0, callbacks=callbacks)
    assert not int(backend.to_numpy(model._dylora.full_rank))
    assert [type(x) for x in callbacks.callbacks] == [keras.callbacks.History]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "`learning_rate` must be a positive number"),
        ({"restart": -1.0}, "`restart` must be a positive number"),
        ({"warmup": 1.0}, r"`warmup` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd.ProgressiveDecay(**{"learning_rate": PEAK, **arguments})


def test_steps_that_nobody_gave():
    with pytest.raises(ValueError, match="takes its steps from `fit`"):
        kd.ProgressiveDecay(PEAK)(0)
    for wrong in (1.0, 1.5, -0.5):
        with pytest.raises((TypeError, ValueError), match="full_rank_steps"):
            kd.DyLoRAConfig(full_rank_steps=wrong)

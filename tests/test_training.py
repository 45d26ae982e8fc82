"""The training step: ranks, frozen columns, seeds, compilations."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora import _keras
from tests import backend
from tests.marks import once
from tests.models import (
    classification_loss,
    gpt2,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

OPTIMIZERS = {
    "sgd-momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "global-clip": lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.1),
    "loss-scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.01)
    ),
}


def slots(model):
    """Optimizer variables that are kept for an adapter, by their names."""
    adapters = {
        v.path.replace("/", "_"): (v, name == "down")
        for layer in model.dylora_layers
        for name, v in (("down", layer.down), ("up", layer.up))
    }
    for slot in model.optimizer.variables:
        for path, (variable, by_column) in adapters.items():
            if slot.name.startswith(f"{path}_") and (
                slot.shape == variable.shape
            ):
                yield slot, by_column


def changed_ranks(model, watched, before):
    """The ranks in which any of the watched variables changed a bit."""
    ranks = set()
    for (variable, by_column), old in zip(watched, before, strict=True):
        differs = backend.to_numpy(variable) != old
        ranks |= set(np.flatnonzero(differs.any(axis=0 if by_column else 1)))
    return {int(index) + 1 for index in ranks}


def watch(model):
    adapters = [
        (v, name == "down")
        for layer in model.dylora_layers
        for name, v in (("down", layer.down), ("up", layer.up))
    ]
    return adapters + [
        pair
        for pair in slots(model)
        if not pair[0].name.endswith(("gradient_accumulator", "_average"))
    ]


@pytest.mark.parametrize("optimizer", once(OPTIMIZERS, but=["adam", "muon"]))
def test_frozen_changes_one_column_only(optimizer):
    model = randomize_adapters(mlp(frozen=True))
    model.compile(OPTIMIZERS[optimizer](), "mse")
    model.optimizer.build(model.trainable_variables)
    watched = watch(model)
    assert len(watched) > 4, "no optimizer slot was found"
    untouched = [*model.get_layer("first").base_weights]
    x, y = mlp_data()
    base = backend.snapshot(untouched)
    head = backend.snapshot(model.get_layer("head").weights)
    for _ in range(50):
        before = backend.snapshot([v for v, _ in watched])
        logs = model.train_on_batch(x, y, return_dict=True)
        assert changed_ranks(model, watched, before) == {int(logs["rank"])}
    for old, new in zip(base, backend.snapshot(untouched), strict=True):
        np.testing.assert_array_equal(old, new)
    after = backend.snapshot(model.get_layer("head").weights)
    assert all((a != b).any() for a, b in zip(head, after, strict=True))


def test_frozen_after_another_optimizer_and_a_cut():
    model = randomize_adapters(mlp(frozen=True))
    for rate in (0.1, 0.2, 0.3):
        if rate == 0.2:
            kd.truncate(model, 3)
        else:
            model.compile(keras.optimizers.Adam(rate), "mse")
        for _ in range(3):
            model.train_on_batch(*mlp_data())
            watched = watch(model)
            before = backend.snapshot([v for v, _ in watched])
            logs = model.train_on_batch(*mlp_data(), return_dict=True)
            assert changed_ranks(model, watched, before) == {int(logs["rank"])}


def test_slots_of_paths_that_begin_alike():
    """The longest path that is the beginning of a name is the owner's."""
    names = [f"layer_{i}" for i in range(12)]
    names += [f"{name}_{i}" for name in names[:2] for i in range(12)]
    optimizer = keras.optimizers.Adam()
    optimizer.build([keras.Variable([0.0], name=name) for name in names])
    found = [v.name for _, v in _keras.optimizers.optimizer_slots(optimizer)]
    assert sorted(found) == sorted([*names, *names])


class Unnamed(keras.optimizers.SGD):
    """An optimizer whose momentum isn't named after its variable."""

    def add_variable_from_reference(self, variable, name=None, **kwargs):
        return self.add_variable(variable.shape, name=name)


REFUSED = {
    "ema": (lambda: keras.optimizers.SGD(0.1, use_ema=True), "use_ema=True"),
    "loss-scaled-ema": (
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, use_ema=True)
        ),
        "use_ema=True",
    ),
    "unnamed-slots": (
        lambda: Unnamed(0.1, momentum=0.9),
        "keeps for an adapter.*Received: .*Unnamed",
    ),
}


@pytest.mark.parametrize("optimizer", REFUSED)
def test_frozen_refuses_what_it_cannot_hold(optimizer):
    make, message = REFUSED[optimizer]
    model = randomize_adapters(mlp(frozen=True))
    model.compile(make(), "mse")
    before = backend.snapshot(model.weights)
    with pytest.raises(ValueError, match=message):
        model.fit(*mlp_data(), verbose=0)
    for old, new in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(old, new)
    model = mlp()
    model.compile(make(), "mse")
    model.fit(*mlp_data(), verbose=0)


def test_frozen_adapters_have_no_slots_to_find():
    model = randomize_adapters(mlp(frozen=True))
    for layer in model.dylora_layers:
        layer.trainable = False
    model.compile(keras.optimizers.Adam(0.1), "mse")
    before = backend.snapshot(model.dylora_layers[0].weights)
    model.fit(*mlp_data(), verbose=0)
    after = backend.snapshot(model.dylora_layers[0].weights)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_with_accumulation_changes_the_union():
    model = randomize_adapters(mlp(frozen=True))
    model.compile(
        keras.optimizers.AdamW(0.01, gradient_accumulation_steps=3), "mse"
    )
    model.optimizer.build(model.trainable_variables)
    watched = watch(model)
    x, y = mlp_data()
    drawn = set()
    for step in range(1, 31):
        before = backend.snapshot([v for v, _ in watched])
        logs = model.train_on_batch(x, y, return_dict=True)
        drawn.add(int(logs["rank"]))
        changed = changed_ranks(model, watched, before)
        if step % 3:
            assert changed == set()
        else:
            assert changed == drawn
            drawn = set()


def test_frozen_gradients_do_not_reach_global_clipping():
    """The norm at rank b is that of column and row b and the head alone."""
    model = randomize_adapters(mlp(frozen=True))
    x, y = mlp_data()
    model.set_rank(3)
    variables = [
        v for layer in model.dylora_layers for v in (layer.down, layer.up)
    ]

    def loss():
        return keras.ops.sum(keras.losses.mean_squared_error(y, model(x)))

    down, up, *_ = backend.gradients(loss, variables)
    assert set(np.flatnonzero(np.abs(down).sum(axis=0))) == {2}
    assert set(np.flatnonzero(np.abs(up).sum(axis=1))) == {2}


def test_sampled_columns_get_gradients():
    """Plain SGD moves the columns up to the drawn rank, if not frozen."""
    model = randomize_adapters(mlp())
    model.compile(keras.optimizers.SGD(0.05), "mse")
    watched = watch(model)
    x, y = mlp_data()
    for _ in range(20):
        before = backend.snapshot([v for v, _ in watched])
        rank = int(model.train_on_batch(x, y, return_dict=True)["rank"])
        assert changed_ranks(model, watched, before) == set(range(1, rank + 1))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_fit_logs_the_drawn_ranks_and_keeps_the_inference_rank(frozen):
    model = mlp(frozen=frozen, seed=5)
    model.compile("adam", "mse")
    model.set_rank(2)
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(int(logs["rank"]))
    )
    x, y = mlp_data()
    history = model.fit(
        x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback],
        validation_data=(x, y),
    )  # fmt: skip
    draw = model._dylora.draw
    expected = [int(draw(keras.ops.convert_to_tensor(i))) for i in range(24)]
    assert seen == expected
    assert history.history["rank"] == expected[7::8]
    assert model.rank == 2
    # Validation runs at the inference rank too.
    with model.rank_scope(2):
        loss = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(history.history["val_loss"][-1], loss, rtol=1e-5)


@pytest.mark.parametrize(
    "outputs, mine, drawn",
    [(["out"], "rank", "drawn_rank"), (["rank", "b"], "rank_rank", "rank")],
    ids=["one output", "two outputs"],
)
def test_a_metric_called_rank_keeps_its_name(outputs, mine, drawn):
    def rank(y_true, y_pred):
        return keras.ops.zeros_like(y_pred[:, 0]) - 1

    trunk, (x, y) = mlp(), mlp_data(16)
    model = kd.DyLoRAModel(trunk.input, dict.fromkeys(outputs, trunk.output))
    model.compile("sgd", "mse", metrics={name: [rank] for name in outputs})
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
    )
    y = dict.fromkeys(outputs, y)
    history = model.fit(x, y, verbose=0, callbacks=[record]).history
    expected = int(model._dylora.draw(keras.ops.convert_to_tensor(0)))
    for logs in (seen[0], {name: v[0] for name, v in history.items()}):
        assert (int(logs[mine]), int(logs[drawn])) == (-1, expected)


@pytest.mark.parametrize(
    "part, frozen",
    [
        (lambda backbone: backbone, 4),
        (lambda backbone: backbone.get_layer("transformer_layer_1"), 2),
    ],
    ids=["backbone", "layer"],
)
@pytest.mark.once
def test_frozen_adapters_are_told(part, frozen):
    model = kd.enable_dylora(roberta_classifier(), rank=2)
    part(model.backbone).trainable = False
    model.compile("sgd", classification_loss())
    x, y = tokens(8), labels(8)
    with pytest.warns(UserWarning, match="Adapters that are frozen") as caught:
        model.fit(x, y, verbose=0)
    told = [w for w in caught if "are frozen" in str(w.message)]
    assert len(told) == 1 and told[0].filename == __file__
    paths = str(told[0].message).split("Received:")[1]
    assert paths.count("query") + paths.count("value") == frozen
    # The way out that it tells.
    model.trainable = False
    model.trainable = True
    model.compile("sgd", classification_loss())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapters that are frozen")
        model.fit(x, y, verbose=0)
        for layer in model.dylora_layers:
            assert backend.to_numpy(layer.up).any()
        # A model that trains nothing was frozen on purpose.
        model.trainable = False
        model.compile("sgd", classification_loss())
        model.fit(x, y, verbose=0)


def test_the_seed_decides_the_sequence():
    draws = [
        [
            int(model._dylora.draw(keras.ops.convert_to_tensor(i)))
            for i in range(50)
        ]
        for model in (mlp(seed=1), mlp(seed=1), mlp(seed=2))
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.skipif(
    backend.NAME == "torch", reason="Keras refuses steps_per_execution there"
)
def test_steps_per_execution_draws_a_rank_for_every_step():
    x, y = mlp_data()
    results = []
    for steps in (1, 4):
        model = randomize_adapters(randomize(mlp()))
        model.compile("adam", "mse", steps_per_execution=steps)
        model.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
        assert int(backend.to_numpy(model._ranks_drawn)) == 8
        results.append(backend.snapshot(model.trainable_variables))
    for one, four in zip(*results, strict=True):
        np.testing.assert_allclose(one, four, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_run_eagerly_draws_the_same_ranks(eager):
    model = mlp()
    model.compile("adam", "mse", run_eagerly=eager)
    x, y = mlp_data()
    ranks = [
        int(model.train_on_batch(x, y, return_dict=True)["rank"])
        for _ in range(8)
    ]
    assert ranks == [
        int(model._dylora.draw(keras.ops.convert_to_tensor(i)))
        for i in range(8)
    ]


@pytest.mark.skipif(backend.NAME == "torch", reason="torch compiles nothing")
def test_one_compilation_for_all_ranks():
    model = roberta_classifier(dropout=0.1)
    kd.enable_dylora(model, rank=8)
    model.compile("adamw", classification_loss(), metrics=["accuracy"])
    x, y = tokens(), labels()
    # On TensorFlow, Keras traces whatever comes first twice: once more for
    # the variables of the metrics.
    model.predict(x, batch_size=8, verbose=0)
    model.evaluate(x, y, batch_size=8, verbose=0)
    with backend.count_compilations(model) as counts:
        model.fit(x, y, batch_size=8, epochs=50, verbose=0)  # 200 steps
        kd.evaluate_ranks(model, x, y, batch_size=8, verbose=0)
        for rank in range(9):
            model.set_rank(rank)
            model.predict(x, batch_size=8, verbose=0)
    assert counts.get("train_step") == 1
    assert "test_step" not in counts and "predict_step" not in counts


@pytest.mark.skipif(backend.NAME == "torch", reason="torch compiles nothing")
def test_one_compilation_for_generation_at_three_ranks():
    model = gpt2()
    kd.enable_dylora(model, rank=4)
    randomize_adapters(randomize(model))
    model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[5, 9, 3, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]]),
    }
    with backend.count_compilations(model) as counts:
        outputs = []
        for rank in (1, 2, 4):
            model.set_rank(rank)
            generated = model.generate(dict(prompt), stop_token_ids=None)
            outputs.append(np.array(generated["token_ids"]))
    name = "compiled_generate_function" if backend.NAME == "jax" else (
        "generate_step"
    )  # fmt: skip
    assert counts[name] == 1
    assert any((outputs[0] != other).any() for other in outputs[1:])


def test_interrupted_training_keeps_the_rank_and_can_go_on():
    model = mlp()
    model.compile("adam", "mse")
    model.set_rank(2)
    x, y = mlp_data()

    def interrupt(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert model.rank == 2
    np.testing.assert_allclose(
        model.predict(x, verbose=0), backend.to_numpy(model(x)), atol=1e-5
    )
    model.fit(x, y, batch_size=8, verbose=0)
    assert int(backend.to_numpy(model._ranks_drawn)) == 4 + 8


def test_a_callback_may_set_the_rank_between_steps():
    model = randomize_adapters(mlp())
    model.compile("adam", "mse")
    x, y = mlp_data()
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: model.set_rank(1 + batch % 4)
    )
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert model.rank == 4
    inference = model.predict(x, verbose=0)
    model.set_rank(4)
    np.testing.assert_allclose(
        inference, model.predict(x, verbose=0), atol=1e-6
    )


def test_frozen_after_overflows_changes_one_column_only():
    keras.config.set_dtype_policy("mixed_float16")
    model = randomize_adapters(mlp(frozen=True))
    model.compile(
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.AdamW(0.01, weight_decay=0.1),
            initial_scale=2.0**22,
        ),
        "mse",
    )
    model.optimizer.build(model.trainable_variables)
    watched = watch(model)
    x, y = mlp_data()
    changes = []
    for _ in range(20):
        before = backend.snapshot([v for v, _ in watched])
        logs = model.train_on_batch(x, y, return_dict=True)
        changed = changed_ranks(model, watched, before)
        assert changed <= {int(logs["rank"])}
        changes.append(bool(changed))
    assert not changes[0] and changes[-1], "overflows first, then updates"


@pytest.mark.skipif(
    backend.NAME == "jax", reason="JAX raises no error in a compiled step"
)
def test_a_step_that_fails_leaves_the_rank_of_inference():
    model = kd.enable_dylora(roberta_classifier(num_layers=1), rank=8, seed=3)
    randomize_adapters(model)
    model.compile(keras.optimizers.SGD(0.0), classification_loss())
    x, y = tokens(), labels()
    before = model.predict(x, verbose=0)
    for _ in range(3):
        with pytest.raises(Exception, match="(?i)label|target|class"):
            model.fit(x, y + 2, verbose=0)
    model.fit(x, y, verbose=0)
    assert model.rank == 8
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-6)

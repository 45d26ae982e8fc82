"""Scaling, a rank for each example, full-rank steps and the order."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from examples import own_loop
from keras_dylora.geometry import Factors
from tests import backend
from tests.models import (
    BuiltLate,
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)
from tests.test_ranks import oracle_for_examples

RANK, ALPHA = 4, 8.0
not_on_torch = pytest.mark.skipif(
    backend.NAME == "torch", reason="Keras refuses steps_per_execution there"
)


def linear(**options):
    """A model of one adapted linear layer."""
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA, **options)
    model = kd.DyLoRAModel(inputs, layer(inputs), seed=3, draw="example")
    return randomize(model), layer


def gates_of(ranks, scales):
    """A row for each example, of its rank and scale."""
    first = np.arange(RANK) < np.array(ranks)[:, None]
    return first * np.broadcast_to(scales, len(ranks))[:, None]


def outputs_at(layer, x, rank):
    kernel, bias = backend.snapshot([layer.kernel, layer.bias])
    return x @ (kernel + layer.delta_kernel(rank)) + bias


def batches(size, seed=3):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(size, 5)), rng.normal(size=(size, 3))
    return x.astype("float32"), y.astype("float32")


@pytest.mark.parametrize("scaling", ["rank", "constant"])
def test_gradient_is_the_mean_over_the_ranks_of_the_examples(scaling):
    model, layer = linear(scaling=scaling)
    kernel, bias, down, up = backend.snapshot(
        [layer.kernel, layer.bias, layer.down, layer.up]
    )
    x, y = batches(16)
    probabilities = kd.Uniform().probabilities(1, RANK)
    drawn = oracle_for_examples(probabilities, 1, 3, 0, 16)
    scales = {"rank": ALPHA / np.array(drawn), "constant": ALPHA / RANK}
    gates = gates_of(drawn, scales[scaling])
    error = x @ kernel + bias + (x @ down * gates) @ up - y
    dy = 2 * error / error.size
    model.compile(keras.optimizers.SGD(1.0), "mse")
    logs = model.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(
        float(logs["loss"]), np.mean(error**2), rtol=1e-6
    )
    assert "rank" not in logs
    for variable, old, gradient in (
        (layer.down, down, x.T @ (dy @ up.T * gates)),
        (layer.up, up, (x @ down * gates).T @ dy),
    ):
        np.testing.assert_allclose(
            backend.to_numpy(variable), old - gradient, atol=1e-6
        )
    assert model.rank == RANK


def test_last_batches_and_evaluation_have_other_sizes():
    model, layer = linear()
    model.compile("adam", "mse")
    x, y = batches(21)
    history = model.fit(
        x, y, batch_size=8, epochs=2, validation_split=0.2, verbose=0
    )
    assert np.isfinite(history.history["loss"]).all()
    with model.rank_scope(2):
        expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(outputs_at(layer, x, 2), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"steps_per_execution": 2}, marks=not_on_torch),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.long),
        {
            "optimizer": lambda: keras.optimizers.Adam(
                0.01, gradient_accumulation_steps=2
            )
        },
    ],
    ids=["steps-per-execution", "eager", "accumulation"],
)
def test_ranks_for_examples_of_a_task(options):
    model = kd.enable_dylora(
        roberta_classifier(dropout=0.1),
        kd.DyLoRAConfig.progressive(3, rank=RANK),
    )
    optimizer = options.pop("optimizer", lambda: keras.optimizers.Adam(0.01))
    model.compile(optimizer(), classification_loss(), **options)
    model.fit(tokens(), labels(), batch_size=8, epochs=2, verbose=0)
    singular = [
        np.linalg.norm(layer.factors().up, axis=1)
        for layer in model.dylora_layers
    ]
    assert all((s > 0).all() for s in singular)
    assert model._dylora.full_rank == 0


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, layer = linear()
    model.compile("adam", "mse")
    before = backend.to_numpy(layer.down)
    model.fit(*batches(16), verbose=0)
    assert np.abs(backend.to_numpy(layer.down) - before).max() > 0


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


def progressive_mlp(steps, **options):
    options = {"full_rank_steps": steps, **options}
    return randomize(mlp(scaling="constant", options=options))


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
        reads.append(model)
        kd.training.write_back(model)

    model = progressive_mlp(4)
    model.compile("adam", "mse")
    callback = kd.training.OrderAfterFullRank(write_back)
    model.fit(*mlp_data(96), batch_size=8, verbose=0, callbacks=[callback])
    assert len(reads) == 3  # after the first step, the fourth and the last


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
    with pytest.warns(UserWarning, match="rank=2 of one .* from rank 4 on"):
        kd.save_adapter(model, tmp_path / "cut", rank=2)
    kd.order_ranks(model)
    assert kd.evaluate_ranks(model, *data, verbose=0).is_trained(1)


@pytest.mark.parametrize("stop", [1, 3, 5])
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
    """Those of the first epoch, whose loss is the highest."""
    model = progressive_mlp(steps)
    model.compile("adam", "mse")
    best = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=4, restore_best_weights=True
    )
    own = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch or kept.extend(products(model))
    )
    kept = []
    data = mlp_data(64)
    fit = {"epochs": 4, "batch_size": 8, "verbose": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(*data, callbacks=[own, best], **fit)
    told = ["in order again" in str(w.message) for w in caught]
    assert any(told) == (steps == 12)
    for a, b in zip(kept, products(model), strict=True):
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


def factors(rank=RANK, inputs=7, outputs=5, seed=0):
    rng = np.random.default_rng(seed)
    return Factors(
        rng.normal(size=(inputs, rank)).astype("float32"),
        rng.normal(size=(rank, outputs)).astype("float32"),
        2.0,
    )


def test_ordered_factors():
    old = factors()
    new, turn, back = old.ordered()
    np.testing.assert_allclose(new.product(), old.product(), atol=1e-5)
    singular = np.linalg.svd(old.down @ old.up, compute_uv=False)[:RANK]
    for gram in (new.down.T @ new.down, new.up @ new.up.T):
        np.testing.assert_allclose(gram, np.diag(singular), atol=1e-5)
    np.testing.assert_allclose(old.down @ turn, new.down, atol=1e-5)
    np.testing.assert_allclose(back @ old.up, new.up, atol=1e-5)
    np.testing.assert_allclose(turn @ back, np.eye(RANK), atol=1e-9)


@pytest.mark.parametrize("inputs", [3, 7])
def test_columns_without_a_share_can_still_be_trained(inputs):
    old = factors(inputs=inputs)
    old.up[2] = old.up[1]
    old.down[:, 2] = old.down[:, 1]
    new, turn, back = old.ordered()
    np.testing.assert_allclose(new.product(), old.product(), atol=1e-5)
    np.testing.assert_allclose(old.down @ turn, new.down, atol=1e-5)
    np.testing.assert_allclose(back @ old.up, new.up, atol=1e-5)
    assert (np.linalg.norm(new.down, axis=0) > 0.1).all()
    assert not new.up[-1].any()


def test_an_adapter_that_was_not_trained_stays():
    old = Factors(factors().down, np.zeros((RANK, 5), "float32"), 2.0)
    new, *turns = old.ordered()
    np.testing.assert_array_equal(new.down, old.down)
    np.testing.assert_array_equal(turns, [np.eye(RANK)] * 2)


def test_what_the_optimizer_keeps_turns_with_the_columns():
    """Momentum is as if the gradients had been of the turned columns."""
    model, layer = linear(scaling="constant", min_rank=RANK)
    old = layer.factors()
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    model.train_on_batch(*batches(16))
    kd.order_ranks(model)
    new = backend.snapshot(model.optimizer.variables)
    other, _ = linear(scaling="constant", min_rank=RANK)
    (twin,) = other.dylora_layers
    ordered, *_ = old.ordered()
    twin.down.assign(ordered.down)
    twin.up.assign(ordered.up)
    other.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    other.train_on_batch(*batches(16))
    for a, b in zip(new, other.optimizer.variables, strict=True):
        np.testing.assert_allclose(a, backend.to_numpy(b), atol=1e-6)


def test_a_lora_can_be_cut_once_it_is_ordered():
    model = kd.enable_dylora(
        randomize(roberta_classifier()),
        rank=RANK,
        min_rank=RANK,
        scaling="sqrt",
    )
    randomize_adapters(model)
    model.compile(keras.optimizers.Adam(0.01), classification_loss())
    x = tokens()
    model.fit(x, labels(), verbose=0)
    whole = model.predict(x, verbose=0)
    assert kd.order_ranks(model) is model
    config = model.dylora_config
    assert (config.scaling, config.alpha) == ("constant", 16 * RANK**0.5)
    np.testing.assert_allclose(model.predict(x, verbose=0), whole, atol=1e-5)
    (layer, *_) = model.dylora_layers
    product = layer.factors().product().astype("float64")
    singular = np.linalg.svd(product, compute_uv=False)
    for b in range(1, RANK):
        rest = product - layer.factors(b).product()
        np.testing.assert_allclose(
            np.linalg.norm(rest, 2), singular[b], rtol=1e-4
        )
    plain = kd.merge(model, 2).predict(x, verbose=0)
    with warnings.catch_warnings(action="error", category=UserWarning):
        kd.truncate(model, 2)
    cut = model.predict(x, verbose=0)
    np.testing.assert_allclose(cut, plain, atol=1e-5)
    assert np.abs(cut - whole).max() > 1e-4


def test_ordering_what_was_trained_nested_says_what_is_lost():
    model = randomize_adapters(mlp())
    with pytest.warns(UserWarning, match=r"ranks 1\.\.3.*is lost"):
        kd.order_ranks(model)
    assert model.dylora_config.scaling == "constant"


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_order_that_loses_nothing_warns_of_nothing():
    for model in (
        mlp(),  # never trained
        randomize_adapters(mlp(scaling="constant")),
        randomize_adapters(mlp(min_rank=4)),
        randomize_adapters(progressive_mlp(3)),
    ):
        kd.order_ranks(model)


def test_truncating_keeps_a_constant_scale():
    model = randomize_adapters(mlp(scaling="constant"))
    x, _ = mlp_data()
    with model.rank_scope(2):
        expected = model.predict(x, verbose=0)
    kd.truncate(model, 2)
    assert model.dylora_config.alpha == 4
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)


def test_a_saved_adapter_keeps_a_constant_scale(tmp_path):
    source = kd.enable_dylora(
        randomize(roberta_classifier()), rank=3, scaling="constant"
    )
    randomize_adapters(source)
    x = tokens()
    with source.rank_scope(2):
        expected = source.predict(x, verbose=0)
    kd.save_adapter(source, tmp_path / "cut", rank=2)
    model = kd.load_adapter(randomize(roberta_classifier()), tmp_path / "cut")
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    other = kd.enable_dylora(roberta_classifier(), rank=2, alpha=16 * 2 / 3)
    with pytest.raises(ValueError, match="scaling='constant' for a model of"):
        kd.load_adapter(other, tmp_path / "cut")


def test_recipe():
    config = kd.DyLoRAConfig.progressive(10, rank=4, draw="step")
    assert config.scaling == "constant"
    assert config.full_rank_steps == 10
    assert config.rank_distribution == kd.Uniform(full=0.25)
    assert config.draw == "step"
    assert kd.DyLoRAConfig.from_config(config.get_config()) == config


def test_an_old_config_scales_by_the_rank():
    config = kd.DyLoRAConfig().get_config()
    for name in ("scaling", "draw", "full_rank_steps"):
        del config[name]
    assert kd.DyLoRAConfig.from_config(config) == kd.DyLoRAConfig()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scaling": "alpha"}, ValueError, "`scaling`.*Received: scaling='al"),
        ({"draw": "batch"}, ValueError, "`draw` must be.*Received: draw='batc"),
        ({"full_rank_steps": -1}, ValueError, "Received: full_rank_steps=-1"),
        ({"full_rank_steps": 1.5}, TypeError, "Received: full_rank_steps=1.5"),
        ({"draw": "example", "frozen": True}, ValueError, "frozen=True"),
        (
            {"draw": "example", "objective": "summed"},
            ValueError,
            "objective='summed'",
        ),
        ({"full_rank_steps": 3, "frozen": True}, ValueError, "frozen=True"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        kd.DyLoRAConfig(**fields)


def test_rank_scope_in_a_loss():
    """The gradient is that of the rank of the scope, on every backend."""
    model, layer = linear()
    x, _ = batches(6)
    down, up = backend.snapshot([layer.down, layer.up])

    def loss():
        with model.rank_scope(3), model.rank_scope(2):
            outputs = model(x)
        return keras.ops.sum(outputs) + 0 * keras.ops.sum(model(x))

    found = backend.gradients(loss, [layer.down, layer.up])
    dy = np.ones((6, 3))
    gate = np.where(np.arange(RANK) < 2, ALPHA / 2, 0)
    np.testing.assert_allclose(found[0], x.T @ (dy @ up.T * gate), rtol=1e-4)
    np.testing.assert_allclose(found[1], (x @ down * gate).T @ dy, rtol=1e-4)
    assert model.rank == RANK
    np.testing.assert_allclose(
        model.predict(x, verbose=0), outputs_at(layer, x, RANK), atol=1e-5
    )


def test_rank_scope_in_a_step():
    """A teacher within the step: the student trains at the drawn rank still."""

    class Distilled(kd.DyLoRAModel):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            with self.rank_scope(0):
                targets = keras.ops.stop_gradient(self(x))
            return keras.ops.mean((y_pred - targets) ** 2)

    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA)
    model = randomize(Distilled(inputs, layer(inputs), seed=1))
    down, up = backend.snapshot([layer.down, layer.up])
    x, y = batches(16)
    model.compile(keras.optimizers.SGD(1.0))
    logs = model.train_on_batch(x, y, return_dict=True)
    rank = int(logs["rank"])
    assert rank < RANK
    gate = np.where(np.arange(RANK) < rank, ALPHA / rank, 0)
    error = (x @ down * gate) @ up
    np.testing.assert_allclose(
        float(logs["loss"]), np.mean(error**2), rtol=1e-5
    )
    moved = down - x.T @ (2 * error / error.size @ up.T * gate)
    np.testing.assert_allclose(backend.to_numpy(layer.down), moved, atol=1e-5)
    assert model.rank == RANK


def test_a_loop_of_your_own():
    before, after = own_loop.main([])
    x, y = own_loop.data()
    kernel, *_ = np.linalg.lstsq(x, y, rcond=None)
    singular = np.linalg.svd(kernel, compute_uv=False)
    for b in range(1, 5):
        # The best that rank b can do; inputs are white noise.
        best = np.sum(singular[b:] ** 2) / y.shape[1]
        assert (
            after.metrics[b]["loss"] < best + 0.05 * before.metrics[b]["loss"]
        )


def test_drawn_ranks_are_those_of_fit():
    model, layer = linear()
    down, up = backend.snapshot([layer.down, layer.up])
    x, y = batches(16)
    losses = []

    def loss():
        with model.draw_ranks(x):
            outputs = model(x, training=True)
        return keras.ops.mean((outputs - keras.ops.convert_to_tensor(y)) ** 2)

    if backend.NAME == "jax":
        with pytest.raises(ValueError, match="needs the state"):
            backend.gradients(loss, [layer.down])
    for _ in range(3):
        losses.append(float(backend.to_numpy(loss())))
    probabilities = kd.Uniform().probabilities(1, RANK)
    kernel, bias = backend.snapshot([layer.kernel, layer.bias])
    for position, found in enumerate(losses):
        drawn = oracle_for_examples(probabilities, 1, 3, position, 16)
        gates = gates_of(drawn, ALPHA / np.array(drawn))
        error = x @ kernel + bias + (x @ down * gates) @ up - y
        assert found == pytest.approx(np.mean(error**2), rel=1e-5)
    assert model.rank == RANK


@pytest.mark.parametrize("fields", [{"frozen": True}, {"objective": "summed"}])
def test_what_takes_more_than_a_call(fields):
    model = kd.enable_dylora(roberta_classifier(), rank=2, **fields)
    with pytest.raises(ValueError, match="train with `fit`"):
        with model.draw_ranks(tokens()):
            pass


def test_outputs_must_keep_the_examples():
    inputs = keras.Input((5,))
    layer = kd.DyLoRADense(3, rank=RANK, alpha=ALPHA)
    outputs = keras.ops.mean(layer(inputs), axis=0)
    model = kd.DyLoRAModel(inputs, outputs, draw="example")
    model.compile("sgd", "mse")
    x, _ = batches(8)
    with pytest.raises(ValueError, match="first axis.*Received: outputs of"):
        model.train_on_batch(x, np.zeros(3, "float32"))


def test_layers_must_keep_the_examples():
    inputs = keras.Input((5,), batch_size=8)
    layer = kd.DyLoRADense(8, rank=RANK, alpha=ALPHA)
    columns = layer(keras.ops.transpose(inputs))  # (5, 8)
    outputs = keras.ops.transpose(columns)
    model = kd.DyLoRAModel(inputs, outputs, draw="example")
    model.compile("sgd", "mse")
    x, _ = batches(8)
    with pytest.raises(ValueError, match="adapted layer must have.*for 8 exam"):
        model.train_on_batch(x, np.zeros((8, 5), "float32"))


def test_an_adapter_that_diverged_is_not_ordered():
    model = randomize_adapters(mlp())
    layer = model.dylora_layers[1]
    layer.up.assign(np.full(layer.up.shape, np.nan, "float32"))
    before = backend.snapshot(model.dylora_layers[0].weights)
    with pytest.raises(ValueError, match="finite.*Received: NaN.*second"):
        kd.order_ranks(model)
    for a, b in zip(before, model.dylora_layers[0].weights, strict=True):
        np.testing.assert_array_equal(a, backend.to_numpy(b))

"""Steps on torch that are traced whole: equal to the eager ones."""

import gc
import shutil
import threading
import warnings
import weakref

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.families.zoo import FAMILIES
from tests.models import (
    classification_loss,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)

pytestmark = pytest.mark.skipif(
    backend.NAME != "torch", reason="other backends trace by themselves"
)


# A graph adds a bias within the product before it, which rounds otherwise.
CLOSE = 5e-6


def adam(**options):
    return keras.optimizers.Adam(0.01, **options)


def warm_up():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.001, 20, warmup_target=0.01, warmup_steps=5
    )
    return keras.optimizers.AdamW(schedule, clipnorm=0.1)


def scaled():
    return keras.optimizers.LossScaleOptimizer(
        adam(), initial_scale=8.0, dynamic_growth_steps=4
    )


OPTIMIZERS = {
    "adamw": keras.optimizers.AdamW,
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "accumulates": lambda: adam(gradient_accumulation_steps=3),
    "averages": lambda: adam(use_ema=True, ema_overwrite_frequency=3),
    "clips": lambda: adam(clipnorm=0.1),
    "warms-up": warm_up,
    "scales": scaled,
}
CONFIGS = {
    "sampled": {},
    "example": {"draw": "example"},
    "frozen": {"frozen": True},
    "summed": {"objective": "summed"},
    "matryoshka": {"objective": "matryoshka"},
    "progressive": {"draw": "example", "full_rank_steps": 10},
}


def trained(jit_compile, optimizer="adamw", config="sampled", **fit):
    """A model after 25 steps, the last batches smaller, and its logs."""
    keras.utils.set_random_seed(0)
    options = dict(CONFIGS[config])
    frozen = options.pop("frozen", False)
    model = randomize_adapters(randomize(mlp(frozen=frozen, options=options)))
    model.compile(
        OPTIMIZERS[optimizer](),
        "mse",
        metrics=["mae"],
        jit_compile=jit_compile,
    )
    with warnings.catch_warnings(action="error", category=UserWarning):
        history = model.fit(
            *mlp_data(36), batch_size=8, epochs=5, verbose=0, **fit
        ).history
    return model, history


def assert_equal(found, expected, x, tolerance=0):
    for a, b in zip(found.variables, expected.variables, strict=True):
        np.testing.assert_allclose(
            backend.to_numpy(a),
            backend.to_numpy(b),
            tolerance,
            tolerance,
            err_msg=a.path,
        )
    np.testing.assert_allclose(
        found.predict(x, verbose=0),
        expected.predict(x, verbose=0),
        tolerance,
        tolerance,
    )


COMBINATIONS = [
    *((name, "sampled", "float32") for name in OPTIMIZERS),
    *(("adamw", name, "float32") for name in CONFIGS if name != "sampled"),
    ("accumulates", "frozen", "float32"),
    ("adamw", "sampled", "mixed_bfloat16"),
]
SHORT = {"adamw", "muon", "accumulates", "warms-up", "scales"}


@pytest.mark.parametrize(
    ("optimizer", "config", "policy"),
    [
        pytest.param(*each, marks=[] if each[0] in SHORT else pytest.mark.long)
        for each in COMBINATIONS
    ],
)
def test_a_traced_step_is_the_eager_one(optimizer, config, policy, monkeypatch):
    from keras_dylora.training import traced

    keras.config.set_dtype_policy(policy)
    weights = {"sample_weight": np.linspace(0, 1, 36)}
    expected, wanted = trained(False, optimizer, config, **weights)
    found, logs = trained("trace", optimizer, config, **weights)
    assert_equal(found, expected, mlp_data()[0], CLOSE)
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, CLOSE), logs, wanted
    )
    # Otherwise to the last bit.
    monkeypatch.setattr(traced, "simplify", lambda graph: None)
    found, logs = trained("trace", optimizer, config, **weights)
    assert logs == wanted
    assert_equal(found, expected, mlp_data()[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("optimizer", "config"),
    [
        ("adamw", "progressive"),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("accumulates", "frozen"), ("scales", "summed"))
        ),
    ],
)
def test_a_compiled_step_is_the_eager_one(optimizer, config):
    found, logs = trained(True, optimizer, config)
    expected, wanted = trained(False, optimizer, config)
    assert_equal(found, expected, mlp_data()[0], CLOSE)
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, CLOSE), logs, wanted
    )
    x, y = mlp_data(16)
    for model in (found, expected):
        # Other strides, and a variable that another value is assigned to.
        model.set_rank(1)
        model.train_on_batch(np.asfortranarray(x[:8]), y[:8])
    assert_equal(found, expected, np.asfortranarray(x), CLOSE)


class AddsTable(keras.layers.Layer):
    """Adds a row of a large tensor that is no weight."""

    def build(self, shape):
        import torch

        self.table = torch.arange(2**17 * shape[-1], dtype=torch.float32)

    def call(self, inputs):
        size = inputs.shape[-1]
        return inputs + self.table.view(-1, size).t().contiguous().t()[3]


class AddsMean(keras.layers.Layer):
    """Adds the mean of a batch, by a tensor that it fills."""

    def call(self, inputs):
        import torch

        mean = torch.zeros(inputs.shape[-1])
        mean += inputs.mean(0)
        return inputs + mean


class AddsMeanThroughView(keras.layers.Layer):
    """Reads the tensor that it fills through a view from before."""

    def call(self, inputs):
        import torch

        mean = torch.zeros(inputs.shape[-1])
        row = mean.view(1, -1)
        mean += inputs.mean(0)
        return inputs + 2 * row


@pytest.mark.parametrize("layer", [AddsMean, AddsMeanThroughView, AddsTable])
def test_tensors_of_a_layer_are_what_they_are_in_an_eager_step(layer):
    x, y = mlp_data(16)
    found = []
    for jit_compile in (False, "trace"):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:])
        outputs = keras.layers.Dense(y.shape[1])(layer()(inputs))
        model = keras.Model(inputs, outputs)
        kd.enable_dylora(model, rank=1, target_layers="all-linear")
        model.compile("sgd", "mse", jit_compile=jit_compile)
        found.append([model.predict(x, verbose=0) for _ in range(3)])
    np.testing.assert_allclose(*found, CLOSE, CLOSE)


@pytest.fixture
def graphs(monkeypatch):
    """A list that has the graph of every trace."""
    from keras_dylora.training import traced

    found, own = [], traced.make_fx

    def make_fx(function, **options):
        def trace(*args):
            found.append(own(function, **options)(*args))
            return found[-1]

        return trace

    monkeypatch.setattr(traced, "make_fx", make_fx)
    return found


def test_a_graph_has_no_needless_operations(graphs):
    import torch

    aten = torch.ops.aten
    model = roberta_classifier()
    kd.enable_dylora(model, rank=2)
    model.compile("sgd", classification_loss(), jit_compile="trace")
    model.train_on_batch(tokens(), labels())
    nodes = graphs[0].graph.nodes
    targets = {node.target for node in nodes}
    assert not {aten.lift_fresh_copy.default, aten.detach.default} & targets
    added = [
        x
        for node in nodes
        if node.target is aten.add.Tensor
        for x in node.all_input_nodes
    ]
    # No bias is added on its own.
    assert not any(x.op == "placeholder" and x.meta["val"].ndim for x in added)


def test_new_ranks_rates_and_adapters_are_no_new_trace(graphs):
    x, y = mlp_data(36)
    models = []
    for jit_compile in (False, "trace"):
        model, _ = trained(jit_compile, config="progressive")
        kd.evaluate_ranks(model, x, y, batch_size=18, verbose=0)
        model.optimizer.learning_rate = 0.05
        model.add_adapter("second")
        model.fit(x, y, batch_size=8, verbose=0)
        model.set_adapter("default")
        model.fit(x, y, batch_size=8, verbose=0)
        model.set_rank(1)
        model.evaluate(x, y, batch_size=18, verbose=0)
        models.append(model)
    # Training has one for the last, smaller batch; evaluation has one.
    assert len(graphs) == 3
    assert_equal(*models, x, CLOSE)
    for model in models:
        model.set_adapter("second")
    assert_equal(*models, x, CLOSE)


@pytest.mark.parametrize("objective", ["sampled", "summed"])
def test_losses_of_layers_are_traced(objective):
    x, y = mlp_data(16)
    losses = []
    for jit_compile in (False, "trace"):
        inputs = keras.Input((10,))
        layer = kd.DyLoRADense(
            3, rank=4, alpha=8, name="first", activity_regularizer="l2"
        )
        model = randomize(
            kd.DyLoRAModel(inputs, layer(inputs), objective=objective)
        )
        model.compile("sgd", loss="mse", jit_compile=jit_compile)
        y = np.zeros((16, 3), "float32")
        with warnings.catch_warnings(action="error", category=UserWarning):
            logs = [
                model.train_on_batch(x, y, return_dict=True) for _ in range(4)
            ]
            logs.append(model.evaluate(x, y, verbose=0, return_dict=True))
            losses.append([float(each["loss"]) for each in logs])
    np.testing.assert_array_equal(*losses)


def test_another_loss_is_a_new_trace():
    x, y = mlp_data(36)
    model, _ = trained("trace")
    model.compile("sgd", "mae", jit_compile="trace")
    before = backend.to_numpy(model.dylora_layers[0].down)
    first = model.train_on_batch(x, y, return_dict=True)
    second = model.train_on_batch(x, y, return_dict=True)
    assert first["loss"] != second["loss"]
    assert (backend.to_numpy(model.dylora_layers[0].down) != before).any()


def test_kerashub_with_dropout_trains_and_seeds_move_on():
    found = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        model = kd.enable_dylora(
            roberta_classifier(num_layers=1, dropout=0.1), rank=2, verbose=0
        )
        model.compile(adam(), classification_loss(), jit_compile="trace")
        losses = [
            float(model.train_on_batch(tokens(), labels())[0]) for _ in range(4)
        ]
        assert len(set(losses)) == 4
        found.append(losses)
    assert found[0] == found[1]


def test_after_many_shapes_steps_are_eager():
    model, _ = trained("trace")
    x, y = mlp_data(40)
    with pytest.warns(UserWarning, match="shapes of batches") as caught:
        for size in range(9, 30):
            model.train_on_batch(x[:size], y[:size])
    assert sum("shapes of batches" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "scales"])
def test_no_operation_waits_for_the_host(graphs, optimizer):
    import torch

    model, _ = trained("trace", optimizer, config="progressive")
    model.evaluate(*mlp_data(16), verbose=0)
    assert len(graphs) == 3
    waits = {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
    }
    for graph in graphs:
        operations = [
            node.target
            for node in graph.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        ]
        assert len(operations) > 10
        assert not [op for op in operations if waits & set(op.tags)]


def causal_model(family):
    model = kd.enable_dylora(FAMILIES[family].build(), rank=2, verbose=0)
    return randomize_adapters(model, scale=1.0)


LANGUAGE_MODELS = [
    "bloom", "falcon", "gemma", "gemma3n", "gemma4", "gpt-neo-x", "gpt-oss",
    "gpt2", "llama", "llama3", "mistral", "mixtral", "opt", "phi3", "qwen-moe",
    "qwen2", "qwen3", "qwen3-moe", "qwen3.5", "qwen3.5-moe", "smollm3",
]  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "gpt2" else pytest.mark.long)
        for name in LANGUAGE_MODELS
    ],
)
def test_generation_is_traced_once_for_all_ranks(graphs, family):
    model = causal_model(family)
    prompt = {
        "token_ids": tokens(size=2, length=8)["token_ids"],
        "padding_mask": np.arange(8) < np.array([[3], [4]]),
    }
    found = {}
    for jit_compile in (False, "trace"):
        model.compile(sampler="greedy", jit_compile=jit_compile)
        for rank in (0, 1, 2):
            model.set_rank(rank)
            written = model.generate(dict(prompt), stop_token_ids=None)
            found[jit_compile, rank] = np.asarray(written["token_ids"])
    # SmolLM3's first token takes another form of the index.
    assert len(graphs) == (2 if family == "smollm3" else 1)
    for rank in (0, 1, 2):
        np.testing.assert_array_equal(found["trace", rank], found[False, rank])
    assert (found["trace", 0] != found["trace", 2]).any()
    assert "call_with_cache" not in model.__dict__


def test_an_allocation_is_found_by_one_trace(graphs):
    x, y = mlp_data(36)
    model = randomize_adapters(randomize(mlp()))
    found = []
    for jit_compile in (False, "trace"):
        model.compile("sgd", "mse", jit_compile=jit_compile)
        found.append(
            kd.allocate_ranks(model, x, y, 0.5, batch_size=18, verbose=0)
        )
    assert found[0] == found[1]
    assert len(graphs) == 1


def test_to_compile_again_changes_how_a_step_runs(graphs):
    x, y = mlp_data(16)
    model = randomize_adapters(randomize(mlp()))
    for count, jit_compile in [
        (0, False),
        (2, "trace"),
        (2, False),
        (4, "trace"),
    ]:
        model.compile("sgd", "mse", jit_compile=jit_compile)
        model.fit(x, y, verbose=0)
        model.evaluate(x, y, verbose=0)
        assert len(graphs) == count


class Counts(keras.metrics.Metric):
    """A metric that keeps a variable where the model doesn't see it."""

    hidden = []

    def update_state(self, *args, **kwargs):
        if not self.hidden:
            self.hidden.append(keras.Variable(0.0))
        self.hidden[0].assign_add(1.0)

    def result(self):
        return self.hidden[0] + 0.0


def test_a_variable_that_the_model_does_not_list_is_refused():
    x, y = mlp_data(16)
    Counts.hidden.clear()
    model = randomize_adapters(randomize(mlp()))
    model.compile("sgd", "mse", metrics=[Counts()], jit_compile="trace")
    model.build((None, 10))
    Counts().update_state()
    with pytest.warns(UserWarning, match="doesn't list|past Keras"):
        for _ in range(3):
            logs = model.train_on_batch(x, y, return_dict=True)
    before = float(logs["counts"])
    after = float(model.train_on_batch(x, y, return_dict=True)["counts"])
    assert after == before + 1


class Reads(keras.Layer):
    def call(self, x):
        return x * 2 if float(keras.ops.sum(x)) > 0 else x


def own_step(model, optimizer=None):
    """A step of a loop of one's own; `optimizer` is torch's or Keras's."""
    import torch

    def step(x, y, weight=1.0):
        model.zero_grad()
        y = keras.ops.convert_to_tensor(y)
        with model.draw_ranks(x):
            loss = keras.ops.mean((model(x, training=True) - y) ** 2)
        (loss * weight).backward()
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step()
            return loss.detach()
        used = optimizer or model.optimizer
        weights = model.trainable_weights
        with torch.no_grad():
            used.apply([w.value.grad for w in weights], weights)
        return loss.detach()

    return step


def test_a_step_of_your_own_is_traced(graphs):
    """In a row with what changes the model and its variables."""
    x, y = mlp_data(36)
    losses, models = [], []
    for traced in (False, True):
        model, _ = trained(False, config="example")
        step = own_step(model)
        if traced:
            step = model.traced(step)
        found = []
        losses.append(found)
        models.append(model)

        def steps(count, model=model, step=step, found=found):
            for i in range(count):
                at = slice(8 * (i % 5), 8 * (i % 5) + 8)
                # Also of other strides.
                rows = np.array(x[at], order="CF"[i % 2])
                found.append(float(step(rows, y[at])))

        steps(6)
        model.optimizer.learning_rate = 0.05
        model.set_rank(1)
        model.add_adapter("second")
        steps(3)
        model.set_adapter("default")
        model.delete_adapter("second")
        steps(3)
        assert len(graphs) == 2 * traced  # one for the last, smaller batch
        kd.order_ranks(model)
        steps(6)
        kd.tune_ranks(model, x, y, [1], steps=2, verbose=0)
        with pytest.warns(UserWarning, match="tuned cuts are dropped"):
            steps(6)
        kd.truncate(model, 2)
        model.compile("sgd", "mse")
        steps(6)
        model.layers[-1].trainable = False
        steps(2)
    np.testing.assert_allclose(*losses, CLOSE, CLOSE)
    assert_equal(*models, x, CLOSE)


def test_a_traced_step_may_return_nothing_and_take_names(graphs):
    model, _ = trained(False)
    (x, y), step = mlp_data(8), own_step(model)
    before = backend.to_numpy(model.dylora_layers[0].down)

    @model.traced
    def nothing(x, y, weight):
        """What it does."""
        step(x, y, weight)

    assert nothing.__doc__ == "What it does."
    assert nothing(x, y=y, weight=np.float32(0)) is None
    assert nothing(x, y=y, weight=np.float32(2)) is None
    assert len(graphs) == 1
    assert np.abs(backend.to_numpy(model.dylora_layers[0].down) - before).max()
    with pytest.raises(TypeError, match="Received: 2.0"):
        nothing(x, y, 2.0)


def test_a_step_of_your_own_after_another_compile(graphs):
    (x, y), models, losses = mlp_data(8), [], []
    for traced in (False, True):
        model, _ = trained(False)
        step = own_step(model)
        if traced:
            step = model.traced(step)
        found = []
        with warnings.catch_warnings(action="error", category=UserWarning):
            for optimizer in (adam(), keras.optimizers.SGD(0.01, 0.9)):
                model.compile(optimizer, "mse")
                found += [float(step(x, y)) for _ in range(2)]
        losses.append(found)
        models.append(model)
    assert len(graphs) == 2  # one for each optimizer
    np.testing.assert_allclose(*losses, CLOSE)
    assert_equal(*models, x, CLOSE)


def test_traced_steps_of_your_own_are_freed():
    model, _ = trained(False)
    step = own_step(model)
    kept, traced = weakref.ref(step), model.traced(step)
    other = model.traced(own_step(model))
    for each in (traced, other, traced):
        each(*mlp_data(8))
    del step, traced, each
    gc.collect()
    assert kept() is None
    other(*mlp_data(8))


def test_a_step_of_your_own_needs_an_optimizer():
    model = mlp()
    with pytest.raises(ValueError, match="which isn't compiled"):
        model.traced(own_step(model))(*mlp_data(8))
    model.compile("sgd", "mse")
    other = keras.optimizers.Adam(0.01)
    other.build(model.trainable_variables)

    step = model.traced(own_step(model, other))
    with pytest.warns(UserWarning, match="the model doesn't list"):
        step(*mlp_data(8))
    assert int(other.iterations) == 1


def test_a_step_with_an_optimizer_of_torch_runs_eagerly():
    import torch

    (x, y), models, losses = mlp_data(8), [], []
    for traced in (False, True):
        model, _ = trained(False)
        weights = [v.value for v in model.trainable_weights]
        step = own_step(model, torch.optim.Adam(weights))
        if traced:
            step = model.traced(step)
            with pytest.warns(UserWarning, match="no Keras optimizer"):
                losses.append([float(step(x, y)) for _ in range(3)])
        else:
            losses.append([float(step(x, y)) for _ in range(3)])
        models.append(model)
    np.testing.assert_allclose(*losses, CLOSE)
    assert_equal(*models, x, CLOSE)


def test_what_reads_a_value_is_named_and_runs_eagerly():
    x, y = mlp_data(16)
    inputs = keras.Input((10,))
    outputs = kd.DyLoRADense(3, rank=2)(Reads(name="reads")(inputs))
    results = []
    for jit_compile in (False, "trace"):
        keras.utils.set_random_seed(0)
        model = kd.DyLoRAModel(inputs, outputs)
        model.compile("sgd", "mse", jit_compile=jit_compile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.predict(x, verbose=0)
            results.append(model.evaluate(x, y, verbose=0))
        named = [w for w in caught if "in reads" in str(w.message)]
        assert bool(named) == (jit_compile == "trace")
    assert results[0] == results[1]


def test_a_weight_that_keras_does_not_know_is_refused():
    import torch

    class Wrapped(keras.Layer):
        def build(self, shape):
            self.tensor = self.add_weight(shape=(10,), initializer="ones")
            self.alias = self.tensor.value.data

        def call(self, x):
            return x * self.alias

    x, y = mlp_data(16)
    inputs = keras.Input((10,))
    layer = Wrapped()
    model = kd.DyLoRAModel(inputs, kd.DyLoRADense(3, rank=2)(layer(inputs)))
    model.compile("sgd", "mse", jit_compile="trace")
    with pytest.warns(UserWarning, match="past Keras's variables"):
        before = model.predict(x, verbose=0)
    with torch.no_grad():
        layer.alias.mul_(2)
    assert (model.predict(x, verbose=0) != before).any()


def test_an_interrupted_trace_leaves_the_model(monkeypatch):
    x, y = mlp_data(16)
    model, _ = trained("trace")
    before = backend.snapshot(model.variables)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kd.DyLoRAModel, "compute_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.train_on_batch(x, y)
    for a, b in zip(backend.snapshot(model.variables), before, strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(x, y)


def test_a_trace_minds_its_own_thread():
    x, _ = mlp_data(16)
    model, plain = (
        trained("trace")[0],
        keras.Sequential(
            [keras.Input((10,)), keras.layers.Dropout(0.5, seed=1)]
        ),
    )
    errors = []

    def call():
        try:
            for _ in range(50):
                plain(x, training=True)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    for size in range(1, 6):
        model.predict(x[:size], verbose=0)
    thread.join()
    assert not errors


@pytest.mark.long
def test_without_a_compiler_the_graph_runs_as_it_is():
    import torch
    import torch._inductor

    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with pytest.warns(UserWarning, match="can't be compiled"):
        with nowhere, torch._inductor.utils.fresh_cache():
            keras.utils.set_random_seed(0)
            model = randomize_adapters(randomize(mlp()))
            model.compile(adam(), "mse", jit_compile=True)
            model.fit(*mlp_data(16), batch_size=8, verbose=0)
    keras.utils.set_random_seed(0)
    expected = randomize_adapters(randomize(mlp()))
    expected.compile(adam(), "mse")
    expected.fit(*mlp_data(16), batch_size=8, verbose=0)
    assert_equal(model, expected, mlp_data()[0], CLOSE)


@pytest.mark.parametrize(
    "jit_compile", ["trace", pytest.param(True, marks=pytest.mark.long)]
)
def test_a_model_of_convolutions(jit_compile):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 16, 16, 3)).astype("float32")
    y = rng.normal(size=(8, 2)).astype("float32")
    models = []
    for how in (False, jit_compile):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(x.shape[1:]),
                keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
                keras.layers.Conv2D(4, 3, strides=2),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(2),
            ]
        )
        kd.enable_dylora(model, rank=2, target_layers="all-conv")
        model.compile(adam(), "mse", jit_compile=how)
        with warnings.catch_warnings(action="error", category=UserWarning):
            model.fit(x, y, batch_size=4, epochs=3, verbose=0)
        models.append(model)
    assert_equal(*models, x, CLOSE)

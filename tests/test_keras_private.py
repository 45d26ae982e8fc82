"""A canary: every private part of Keras that `_keras.py` touches.

Each test says what breaks in keras_dylora if Keras changes it.
"""

import inspect
import pathlib
import re
import tempfile

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora import _keras
from keras_dylora._keras import tracing
from tests import backend
from tests.models import (
    classification_loss,
    labels,
    mlp,
    roberta_classifier,
    tokens,
)


def dense():
    layer = keras.layers.Dense(3, name="dense")
    layer.build((None, 2))
    return layer


def compiled():
    model = roberta_classifier(num_layers=1)
    model.compile(keras.optimizers.AdamW(0.1), "mse", metrics=["mae"])
    return model


def set_class():
    layer = dense()

    class Other(keras.layers.Dense):
        pass

    _keras.set_class(layer, Other)
    assert type(layer) is Other
    assert layer(np.ones((1, 2))).shape == (1, 3)


def stand_in():
    layer = keras.layers.Dense(3, "relu", bias_initializer="ones")
    layer.build((None, 2))
    for mode, method in ((None, "call"), ("int8", "quantized_call")):
        if mode:
            layer.quantize(mode)
        other = _keras.stand_in(layer, keras.layers.Dense, activation=None)
        x = keras.ops.convert_to_tensor(-9 * np.eye(2, dtype="float32"))
        outputs = backend.to_numpy(getattr(other, method)(x))
        assert (outputs < 0).any()
        expected = np.maximum(outputs, 0)
        np.testing.assert_allclose(backend.to_numpy(layer(x)), expected)


def unlocked():
    layer = dense()
    with pytest.raises(ValueError):
        layer.late = keras.Variable(np.zeros(2))
    with _keras.unlocked(layer):
        weight = layer.add_weight(shape=(2,), name="late")
    assert any(w is weight for w in layer.weights)
    assert weight.path == "dense/late"
    with pytest.raises(ValueError):
        layer.later = keras.Variable(np.zeros(2))


def forget():
    layer = dense()
    before = len(layer.variables)
    with _keras.unlocked(layer):
        layer.late = layer.add_weight(shape=(2,), name="late")
        layer.seed = keras.random.SeedGenerator(1)
    assert len(layer.variables) == before + 2
    _keras.forget(layer, "late", "seed", "no_such_name")
    assert len(layer.variables) == before
    assert not hasattr(layer, "late") and not hasattr(layer, "seed")


def metric_directions():
    model = roberta_classifier(num_layers=1)
    model.compile("sgd", classification_loss(), metrics=["accuracy"])
    model.evaluate(tokens(), labels(), verbose=0)
    assert list(_keras.metric_directions(model)) == [
        ("loss", "Mean", "min"),
        ("accuracy", "SparseCategoricalAccuracy", "max"),
    ]


def track_for_torch():
    model = mlp()
    layer = model.dylora_layers[0]
    with _keras.unlocked(layer):
        weight = layer.add_weight(shape=(2,), name="late")
    _keras.track_for_torch(model)
    if backend.NAME == "torch":
        parameters = [id(p) for p in model.parameters()]
        assert id(weight.value) in parameters


def loads_any_number():
    store = {"0": np.ones((2, 3)), "1": np.zeros(3), "more": np.zeros(1)}
    for base, arguments, options in (
        (keras.layers.Dense, (3,), {}),
        (keras.layers.EinsumDense, ("ab,bc->ac", 3), {"bias_axes": "c"}),
    ):

        @_keras.loads_any_number
        class Loads(base):
            pass

        layers = [cls(*arguments, **options) for cls in (base, Loads)]
        for layer in layers:
            layer.build((None, 2))
        plain, loads = layers
        with pytest.raises(ValueError, match="expected 2 variables"):
            plain.load_own_variables(store)
        loads.load_own_variables(store)
        assert backend.to_numpy(loads.kernel).all()


def substituted():
    layer, written = dense(), []
    kernel = keras.ops.ones((2, 3))
    with _keras.substituted(
        [(layer.kernel, kernel)], lambda *update: written.append(update)
    ):
        outputs = backend.to_numpy(layer(np.ones((1, 2))))
        layer.bias.assign(np.ones(3))
    np.testing.assert_array_equal(outputs, [[2, 2, 2]])
    ((variable, value),) = written
    assert variable is layer.bias
    np.testing.assert_array_equal(backend.to_numpy(value), np.ones(3))
    np.testing.assert_array_equal(backend.to_numpy(layer.bias), np.zeros(3))


def compile_state():
    model = compiled()
    before = _keras.compile_state(model)
    assert before == _keras.compile_state(model)
    model.compile(keras.optimizers.AdamW(0.1), "mse", metrics=["mae"])
    assert before != _keras.compile_state(model)


def jit_compile():
    model = compiled()
    before = model.jit_compile
    with _keras.jit_compile(model, not before):
        assert model.jit_compile != before
    assert model.jit_compile == before


def changed_besides():
    known, other = keras.Variable(1.0), keras.Variable(1.0)
    with keras.StatelessScope(state_mapping=[(known, known + 1)]) as scope:
        known.assign(3.0)
        assert not tracing.changed_besides(scope, [known])
        other.assign(3.0)
    assert tracing.changed_besides(scope, [known])


def traceable():
    if backend.NAME != "torch":
        return
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    variable = keras.Variable([1.0, 2.0])
    seed = keras.random.SeedGenerator(3)
    variables = [variable, seed.state]

    def add():
        variable.value.add_(1)  # as optimizers of torch do
        return variable.value * 2

    def step(x, values):
        pairs = list(zip(variables, [v.detach() for v in values], strict=True))
        with keras.StatelessScope(state_mapping=pairs) as scope:
            y = keras.ops.cond(x > 0, add, lambda: variable.value * 1)
            y = y + 0 * keras.random.uniform((2,), seed=seed)
            y = keras.ops.slice(y, [x > 9], [2])
        return y, [scope.get_current_value(v) for v in variables]

    values = [v.value.detach().clone() for v in variables]
    with tracing.traceable(variables):
        graph = make_fx(step, tracing_mode="fake")(torch.tensor(1.0), values)
    for x, factor, more in ((1.0, 2, 1), (-1.0, 1, 0)):
        outputs, (after, state) = graph(torch.tensor(x), values)
        np.testing.assert_array_equal(
            backend.to_numpy(outputs), factor * np.array([1.0 + more, 2 + more])
        )
        np.testing.assert_array_equal(
            backend.to_numpy(after), [1.0 + more, 2.0 + more]
        )
        assert (backend.to_numpy(state) != backend.to_numpy(seed.state)).any()
    np.testing.assert_array_equal(backend.to_numpy(variable), [1.0, 2.0])


def sublayers():
    model = roberta_classifier(num_layers=1)
    block = model.backbone.get_layer("transformer_layer_0")
    names = [layer.name for layer in _keras.sublayers(block)]
    assert "self_attention_layer" in names
    assert "query" not in names


def submodels():
    model = roberta_classifier(num_layers=1)
    assert _keras.submodels(model) == [model, model.backbone]


def graph_calls():
    model = roberta_classifier(num_layers=1)
    calls = {id(x): rest for x, *rest in _keras.graph_calls(model)}
    args, _ = calls[id(model.backbone)]
    assert set(args[0]) == {"token_ids", "padding_mask"}


def operations():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.ops.matmul(2 * inputs, np.ones((2, 3))))
    found = [x.name for x, _, _ in _keras.operations(model)]
    assert [re.sub(r"_\d+$", "", name) for name in found][1:] == [
        "multiply",
        "matmul",
    ]


def graph_arrays():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.ops.matmul(inputs, np.ones((2, 3))))
    ((operation, array),) = _keras.graph_arrays(model)
    assert operation.name.startswith("matmul") and array.shape == (2, 3)


def own_weights():
    layer = dense()
    assert [w.name for w in _keras.own_weights(layer)] == ["kernel", "bias"]
    assert _keras.own_weights(roberta_classifier(num_layers=1)) == []


def trained_weights():
    layer = dense()
    layer.trainable = False
    names = [w.name for w in _keras.trained_weights(layer)]
    assert names == ["kernel", "bias"]


def statistics():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 2))
    names = [w.name for w in _keras.statistics(layer)]
    assert names == ["moving_mean", "moving_variance"]


def saves_hdf5():
    asked = []

    class Model(keras.Model):
        def get_config(self):
            asked.append(_keras.saves_hdf5())
            raise KeyError

    with tempfile.TemporaryDirectory() as folder, pytest.raises(KeyError):
        keras.saving.save_model(Model(), f"{folder}/model.h5")
    assert asked == [True] and not _keras.saves_hdf5()


def unpickle():
    model = mlp()
    _, (archive,) = keras.Model.__reduce__(model)
    again = _keras.unpickle(archive)
    assert again.dylora_config == model.dylora_config


def uncover_quantize():
    model = roberta_classifier(num_layers=1)
    wrapped = model.__dict__.get("quantize")
    _keras.uncover_quantize(model)
    assert "quantize" not in model.__dict__
    _keras.cover_quantize(model)
    assert model.__dict__.get("quantize") is wrapped
    _keras.uncover_quantize(model)
    assert _keras.covered_quantize(model) is wrapped


def settle_dtype_policies():
    policies = keras.dtype_policies.DTypePolicyMap()
    layer = keras.layers.Dense(3, dtype=policies, name="dense")
    model = keras.Sequential([keras.Input((2,)), layer])
    policies[layer.path] = keras.dtype_policies.QuantizedDTypePolicy(
        "int8", "float32"
    )
    assert layer.dtype_policy is policies
    _keras.settle_dtype_policies(model)
    assert layer.dtype_policy.quantization_mode == "int8"


def override_losses():
    model = compiled()
    loss = keras.ops.ones(())
    with _keras.override_losses(model, [loss]):
        assert [float(x) for x in model.losses] == [1.0]
    assert model.losses == []


def put_back():
    if backend.NAME != "jax":
        return
    model = compiled()
    model.train_on_batch(tokens(), np.zeros((32, 2)))
    for kept in ((0, 1, 2, 3), (0, 1, 3), (0, 1)):
        groups = [
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        ]
        groups = [groups[i] for i in kept]
        state = tuple([v.value for v in group] for group in groups)
        for v in sum(groups, []):
            v._value = None  # as Keras does for the time of a `fit`
        _keras.put_back(model, state)
        assert [[v.value for v in group] for group in groups] == list(state)


def optimizer_slots():
    model = mlp()
    optimizer = keras.optimizers.AdamW(0.1, gradient_accumulation_steps=2)
    optimizer.build(model.trainable_variables)
    found = list(_keras.optimizers.optimizer_slots(optimizer))
    count = len(model.trainable_variables)
    assert len(found) == 2 * count  # momentum and velocity
    assert len({id(owner) for _, owner in found}) == count
    assert all(slot.shape == owner.shape for slot, owner in found)


def optimizer_parts():
    inner = keras.optimizers.SGD(0.1)
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    assert _keras.optimizers.optimizer_parts(inner) == [inner]
    assert _keras.optimizers.optimizer_parts(scaled) == [inner]


def schedules():
    rate = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    inner = keras.optimizers.SGD(rate)
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    assert list(_keras.optimizers.schedules(scaled)) == [(rate, inner)]
    plain = keras.optimizers.SGD(0.1)
    assert not list(_keras.optimizers.schedules(plain))


def built_for():
    variables = mlp().trainable_variables
    optimizer = keras.optimizers.SGD(0.1)
    assert not _keras.optimizers.built_for(optimizer)
    optimizer.build(variables)
    found = [id(v) for v in _keras.optimizers.built_for(optimizer)]
    assert found == [id(v) for v in variables]


def factored_slots():
    variables = mlp().trainable_variables
    optimizer = keras.optimizers.Adafactor(0.1)
    optimizer.build(variables)
    found = list(_keras.optimizers.factored_slots(optimizer))
    assert len(found) == len(variables)
    for variable, rows, columns in found:
        if len(variable.shape) == 2:
            assert (rows.shape[0], columns.shape[0]) == variable.shape
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(variables)
    assert not list(_keras.optimizers.factored_slots(optimizer))


def settled_jit():
    config = _keras.stamped_jit(compiled().get_compile_config())
    assert _keras.settled_jit(config)["jit_compile"] == config["jit_compile"]
    other = {**config, "backend": "another"}
    assert _keras.settled_jit(other)["jit_compile"] == "auto"
    old = {"jit_compile": True}  # of 0.1.0, maybe on JAX
    assert _keras.settled_jit(old)["jit_compile"] == "auto"
    old = {"jit_compile": False}
    assert _keras.settled_jit(old)["jit_compile"] is False


def slot_prefix():
    model = mlp()
    optimizer = keras.optimizers.AdamW(0.1, gradient_accumulation_steps=2)
    optimizer.build(model.trainable_variables)
    found = _keras.optimizers.optimizer_slots(optimizer, True)
    kinds = {
        slot.name.removeprefix(_keras.optimizers.slot_prefix(owner))
        for slot, owner in found
    }
    assert kinds == {"momentum", "velocity", "gradient_accumulator"}


def keeps_own_state():
    model = mlp(frozen=True)
    layer = model.dylora_layers[0]
    for owner, names in (
        (model, ("ranks_drawn", "open_columns")),
        (layer, ("gate",)),
    ):
        state = owner._own_state()
        assert tuple(state) == names
        weights = {id(w) for w in owner.weights}
        listed = [id(v) for v in owner.variables]
        for name, variable in state.items():
            assert listed.count(id(variable)) == 1
            assert id(variable) not in weights
            if backend.NAME == "tensorflow":
                assert owner._trackable_children()[name] is variable


def compile_arguments():
    model = compiled()
    arguments = _keras.compile_arguments(model)
    assert arguments["optimizer"] is model.optimizer
    assert arguments["loss"] == "mse"
    assert arguments["metrics"] == ["mae"]


def built_anew():
    optimizer = keras.optimizers.Adam()
    optimizer.build(mlp().trainable_variables[:2])
    fresh = _keras.optimizers.built_anew(optimizer)
    assert [v.shape for v in fresh.variables] == [
        v.shape for v in optimizer.variables
    ]


def fresh_optimizer():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    variables = mlp().trainable_variables
    optimizer.build(variables)
    fresh = _keras.optimizers.fresh_optimizer(
        keras.optimizers.LossScaleOptimizer(optimizer)
    ).inner_optimizer
    assert type(fresh) is type(optimizer) and not fresh.built
    assert fresh.get_config()["weight_decay"] == 0.3
    assert fresh._learning_rate is schedule
    fresh.build(variables)
    bias = next(v for v in variables if v.name == "bias")
    assert not fresh._use_weight_decay(bias)


def optimizer_state():
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    for each in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer)):
        each.build(mlp().trainable_variables)
        names = {v.path for v in each.variables}
        rates = {x for x in names if x.endswith("learning_rate")}
        assert rates
        state = {v.path for v in _keras.optimizers.optimizer_state(each)}
        assert state == names - rates
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)


def own_value():
    variable = keras.Variable([1.0, 2.0])
    held = _keras.own_value(variable)
    _keras.replace_value(variable, keras.ops.ones(2))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(held), [1, 2])


def value_for_another():
    one, two = (keras.Variable([1.0, x]) for x in (2.0, 3.0))
    two.assign(_keras.value_for_another(one))
    one.assign([5.0, 6.0])
    np.testing.assert_array_equal(two.numpy(), [1, 2])


def replace_value():
    variable = keras.Variable([1.0, 2.0])
    value = keras.ops.convert_to_tensor([3.0, 4.0])
    _keras.replace_value(variable, value)
    np.testing.assert_array_equal(variable.numpy(), [3, 4])
    if backend.NAME == "torch":
        assert variable.value.data_ptr() == value.data_ptr()


def public_optimizers():
    model = compiled()
    config = _keras.optimizers.public_optimizers(model.get_compile_config())
    assert config["optimizer"]["module"] == "keras.optimizers"
    assert config["optimizer"]["class_name"] == "AdamW"


# What each is for, and so what breaks.
BREAKS = {
    set_class: "enable_dylora and disable_dylora, in place",
    trained_weights: "trainable_layers names layers that are frozen",
    built_anew: "an adapter with an optimizer state of its own",
    stand_in: "the adapter of a layer is added behind its activation",
    unlocked: "adapters of layers that are built",
    forget: "disable_dylora and truncate: variables stay behind",
    metric_directions: "reports: the best rank may be the worst",
    track_for_torch: "torch: zero_grad and to() miss the adapters",
    loads_any_number: "files of adapted layers can't be loaded",
    substituted: "exports of merged kernels and of shorter dtypes",
    compile_state: "torch: steps of before a `compile` go on",
    jit_compile: "torch: Keras compiles step by step, in minutes",
    changed_besides: "torch: what a step assigns is lost",
    traceable: "torch: steps that accumulate or warm up aren't traced",
    sublayers: "paths of layers, and so every file",
    submodels: "functions of a backbone are those of before",
    graph_calls: "adapters of layers that are never called",
    operations: "adapters of layers that are never called",
    graph_arrays: "models that compute with values for weights are copied",
    own_weights: "files: the place in the rank sequence",
    statistics: "save_adapter leaves out moving averages",
    saves_hdf5: "a file that can't be loaded is written in silence",
    unpickle: "pickle",
    uncover_quantize: "quantize: the method of the class before",
    settle_dtype_policies: "quantized presets can't be saved again",
    override_losses: "JAX: what layers add to a summed loss",
    put_back: "JAX: a `fit` or `predict` that fails loses the model",
    optimizer_slots: "frozen mode holds no momentum",
    optimizer_parts: "order_ranks and frozen mode: several optimizers",
    built_for: "frozen mode holds no momentum",
    schedules: "ProgressiveDecay never hears of the steps",
    factored_slots: "order_ranks with Adafactor",
    slot_prefix: "order_ranks forgets the momentum",
    keeps_own_state: "JAX's step, torch's devices, TensorFlow's own formats",
    compile_arguments: "merge: compiled as the model is",
    optimizer_state: "set_adapter: an adapter would get another learning rate",
    fresh_optimizer: "enable, disable, truncate and merge of a trained model",
    own_value: "set_adapter: an adapter that isn't live changes",
    value_for_another: "merge: two models share what one of them trains",
    replace_value: "torch: set_adapter copies all that an adapter has",
    public_optimizers: "files of torch on other backends",
    settled_jit: "files of JAX take minutes to train on torch",
}


@pytest.mark.parametrize("touch", BREAKS, ids=lambda touch: touch.__name__)
def test_canary(touch):
    try:
        touch()
    except Exception as error:
        raise AssertionError(f"breaks: {BREAKS[touch]}") from error


def test_every_private_touch_has_a_canary():
    functions = {
        name
        for module in (_keras, _keras.optimizers, tracing)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    canaries = {touch.__name__ for touch in BREAKS}
    assert (
        functions
        - {
            "cover_quantize",
            "covered_quantize",
            "stamped_jit",
            "storage",
            "written",
        }
        == canaries
    )


PRIVATE = re.compile(
    r"\._(tracker|flatten_layers|torch_params|track_variables|trainable"
    r"|trainable_variables|non_trainable_variables|seed_generators|layers"
    r"|dtype_policy|losses_override|compile_\w+|jax_\w+|call_has_\w+"
    r"|nodes_by_depth|learning_rate|open_name_scope|unpickle_model|metrics|loss_tracker)\b"
)


def test_private_keras_is_in_one_folder():
    package = pathlib.Path(kd.__file__).parent
    found = {
        f"{path.relative_to(package)}: {match.group()}"
        for path in package.rglob("*.py")
        for match in PRIVATE.finditer(path.read_text())
        if "_keras" not in path.parts
    }
    assert not found


def test_train_functions_of_keras_call_the_step():
    model = kd.enable_dylora(roberta_classifier(num_layers=1), rank=2)
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert "rank" in model.train_on_batch(tokens(), labels(), return_dict=True)

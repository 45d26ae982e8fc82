"""What is trained, by path: kept by every operation, also in a row."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from keras_dylora.layers.tree import Tree
from keras_dylora.live.spec import Spec
from tests import backend
from tests.models import (
    allocation,
    gpt2,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_backbone,
    tokens,
)


def network():
    """A head with two kinds of statistics, on a base with one."""
    inputs = keras.Input((10,))
    x = keras.layers.Dense(8, "tanh", name="first")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.BatchNormalization(name="frozen_norm")(x)
    x = keras.layers.Dense(6, name="second")(x)
    head = keras.Sequential(
        [
            keras.layers.Dense(5, name="inner"),
            keras.layers.BatchNormalization(
                center=False, scale=False, name="bare"
            ),
        ],
        name="head",
    )
    return keras.Model(inputs, keras.layers.Dense(3, name="last")(head(x)))


def enabled(**kwargs):
    options = {
        "rank": 4,
        "target_layers": ["first", "second"],
        "trainable_layers": ["head", "last"],
        "verbose": 0,
        **kwargs,
    }
    model = kd.enable_dylora(network(), **options)
    randomize_adapters(model)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def values(model):
    return {p: backend.to_numpy(v) for p, v in Tree(model).weights.items()}


def own(model):
    """The values of all that belongs to the active adapter, by path."""
    mine = model._dylora.spec.own(Tree(model))
    return {p: backend.to_numpy(v) for p, v in mine.items()}


def moved(model, steps=3):
    """The paths of the weights that steps of training change."""
    before = values(model)
    for i in range(steps):
        model.train_on_batch(*mlp_data(8, seed=i))
    after = values(model)
    return {p for p in after if np.any(after[p] != before[p])}


ADAPTERS = {f"{x}/{y}" for x in ("first", "second") for y in ("down", "up")}
STATISTICS = {"head/bare/moving_mean", "head/bare/moving_variance"}
# The bias before a normalization has no gradient, but rounding.
CHOSEN = {*ADAPTERS, *STATISTICS, "head/inner/kernel", "head/inner/bias"}
CHOSEN |= {"last/kernel", "last/bias"}


def reloaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


def test_spec_names_what_is_trained():
    model = enabled(dropout=0.1)
    spec = model._dylora.spec
    assert list(spec.adapted) == ["first", "second"]
    assert spec.adapted["first"].dropout == 0.1
    assert spec.trained == {
        "head/inner": ("kernel", "bias"),
        "head/bare": (),
        "last": ("kernel", "bias"),
    }
    tree = Tree(model)
    assert spec.own(tree).keys() == CHOSEN
    assert Spec.from_config(spec.get_config(tree), tree) == spec


def test_tree_has_each_layer_once():
    model = roberta_backbone()
    tree = Tree(model)
    assert len({id(x) for x in tree.layers.values()}) == len(tree.layers)
    assert tree.below(model)[0] is model
    assert len(tree.below(model)) == len(tree.layers) + 1
    assert {id(v) for v in tree.weights.values()} == {
        id(v) for v in model.weights
    }


def test_bare_statistics_move():
    """Fault of old: a layer with statistics alone stayed in inference."""
    assert moved(enabled()) - {"head/inner/bias"} == CHOSEN - {
        "head/inner/bias"
    }


@pytest.mark.parametrize("kind", ["enabled", "hand_built", "truncated"])
def test_trainable_off_and_on_brings_back_what_was_trained(kind):
    model = mlp() if kind == "hand_built" else enabled()
    randomize_adapters(model)
    if kind == "truncated":
        kd.truncate(model, 2)
    model.compile("adam", "mse")
    expected = {v.path for v in model.trainable_variables}
    assert expected
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert {v.path for v in model.trainable_variables} == expected
    for layer in model.dylora_layers:
        assert any(layer.down is v for v in model.trainable_variables)
    model.compile("adam", "mse")
    assert {f"{x.name}/up" for x in model.dylora_layers} <= moved(model)


def test_hand_built_flags_say_what_comes_back():
    model = mlp()
    model.get_layer("head").trainable = False
    model.trainable = False
    model.trainable = True
    names = {v.path for v in model.trainable_variables}
    assert names == {"first/down", "first/up", "second/down", "second/up"}


@pytest.mark.parametrize("operation", ["truncate", "order_ranks"])
def test_dropout_of_each_layer_is_kept(operation):
    inputs = keras.Input((10,))
    x = kd.DyLoRADense(12, rank=4, dropout=0.5, name="first")(inputs)
    outputs = kd.DyLoRADense(3, rank=4, name="second")(x)
    model = randomize_adapters(kd.DyLoRAModel(inputs, outputs))
    model.compile("sgd", "mse")
    if operation == "truncate":
        kd.truncate(model, 2)
    else:
        with pytest.warns(UserWarning, match="ordered"):
            kd.order_ranks(model)
    assert [x.dropout for x in model.dylora_layers] == [0.5, 0.0]
    x = mlp_data(8)[0]
    first = backend.to_numpy(model(x, training=True))
    assert np.any(first != backend.to_numpy(model(x, training=True)))


def test_config_has_the_dropout_that_hand_built_layers_share():
    assert mlp(dropout=0.5).dylora_config.dropout == 0.5


def test_statistics_belong_to_the_adapter_after_loading(tmp_path):
    model = enabled()
    moved(model)
    model.add_adapter("other")
    moved(model)
    again = reloaded(model, tmp_path)
    for name in model.adapter_names:
        model.set_adapter(name)
        again.set_adapter(name)
        expected, found = own(model), own(again)
        assert len(found) == len(expected) == len(CHOSEN)
        # Keras gives layers within others another path in a file's model.
        for a, b in zip(found.values(), expected.values(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "freeze",
    [
        lambda m: setattr(m.get_layer("head"), "trainable", False),
        lambda m: setattr(m, "trainable", False),
    ],
    ids=["head", "model"],
)
@pytest.mark.once
def test_what_is_frozen_by_a_flag_is_saved_and_comes_back(freeze, tmp_path):
    model = enabled()
    model.add_adapter("a")
    freeze(model)
    again = reloaded(model, tmp_path)
    flags = [v.trainable for v in model.weights]
    assert [v.trainable for v in again.weights] == flags
    assert again.trainable == model.trainable
    assert again.adapter_names == ["default", "a"]
    for each in (model, again):
        each.trainable = False  # TensorFlow skips what is so already
        each.trainable = True
        each.compile("adam", "mse")
        assert len(moved(each)) >= len(CHOSEN - {"head/inner/bias"})


def test_what_is_made_trainable_later_is_each_adapters_own(tmp_path):
    model = enabled()
    model.add_adapter("a")
    model.get_layer("norm").trainable = True
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match="belong to every adapter"):
        assert "norm/gamma" in moved(model)
    mine = values(model)["norm/gamma"]
    model.set_adapter("default")
    np.testing.assert_array_equal(values(model)["norm/gamma"], 1.0)
    again = reloaded(model, tmp_path)
    again.set_adapter("a")
    np.testing.assert_array_equal(values(again)["norm/gamma"], mine)


def test_plain_weights_file_lifts_the_rank_of_a_cut_adapter(tmp_path):
    plain = enabled()
    plain.save_weights(tmp_path / "plain.weights.h5")
    kd.save_adapter(plain, tmp_path / "cut", rank=2)
    model = enabled()
    kd.load_adapter(model, tmp_path / "cut", name="cut", strict=False)
    assert model._dylora.max_rank == 2
    model.load_weights(tmp_path / "plain.weights.h5")
    assert model.rank == 4
    x = mlp_data(8)[0]
    np.testing.assert_allclose(
        model.predict(x, verbose=0), plain.predict(x, verbose=0), atol=1e-6
    )


def test_truncate_to_an_allocation_computes_at_it():
    model = enabled()
    small = allocation(model, [0, 3])
    x = mlp_data(8)[0]
    with model.rank_scope(small):
        expected = model.predict(x, verbose=0)
    model.set_rank(1)
    kd.truncate(model, small)
    assert model.rank.ranks == small.ranks
    found = model.predict(x, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("operation", ["add", "load"])
def test_adapters_of_a_model_whose_optimizer_is_for_others(operation, tmp_path):
    model = enabled()
    moved(model)
    kd.save_adapter(model, tmp_path / "adapter")
    model.get_layer("last").trainable = False
    if operation == "add":
        model.add_adapter("other")
    else:
        kd.load_adapter(model, tmp_path / "adapter", name="other")
    model.set_adapter("default")
    model.get_layer("last").trainable = True
    assert moved(model) >= CHOSEN - {"head/inner/bias"}


def functional_around_a_backbone():
    backbone = roberta_backbone(num_layers=1)
    head = keras.layers.Dense(2, name="new")
    return backbone, keras.Model(backbone.input, head(backbone.output[:, 0]))


def test_backbone_is_said_and_not_searched_for():
    backbone, model = functional_around_a_backbone()
    with pytest.warns(UserWarning, match="as `backbone`"):
        kd.enable_dylora(model, rank=2, verbose=0)
    assert not any("new" in v.path for v in model.trainable_variables)
    backbone, model = functional_around_a_backbone()
    kd.enable_dylora(model, rank=2, verbose=0, backbone=backbone)
    assert [v.path for v in model.trainable_variables if "new" in v.path]
    with pytest.raises(ValueError, match="`backbone` must be"):
        kd.enable_dylora(network(), rank=2, backbone=backbone)


def test_layers_that_are_adapted_and_trained_in_full(capsys):
    inputs = keras.Input((10,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="only")(inputs))
    kd.enable_dylora(
        model, rank=2, target_layers="only", trainable_layers="only"
    )
    assert "1 of 1 linear layers" in capsys.readouterr().out
    randomize_adapters(model)
    model.compile("adam", "mse")
    assert moved(model) == {
        "only/kernel", "only/bias", "only/down", "only/up",
    }  # fmt: skip


def test_disabling_restores_the_head():
    model = network()
    before = values(model)
    kd.enable_dylora(
        model,
        rank=4,
        target_layers=["first"],
        trainable_layers=["head", "last"],
        verbose=0,
    )
    randomize_adapters(model)
    model.compile("adam", "mse")
    moved(model)
    kd.disable_dylora(model, restore_head=True)
    after = values(model)
    assert after.keys() == before.keys()
    for path, value in after.items():
        np.testing.assert_array_equal(value, before[path])


def test_head_of_a_model_from_a_file_is_not_restored(tmp_path):
    model = reloaded(enabled(), tmp_path)
    with pytest.raises(ValueError, match="doesn't hold"):
        kd.disable_dylora(model, restore_head=True)
    assert isinstance(model, kd.DyLoRAModel)
    kd.disable_dylora(model)
    assert not isinstance(model, kd.DyLoRAModel)


@keras.saving.register_keras_serializable("tests")
class WithBase(kd.DyLoRAModel):
    """A subclass whose own config has a key that a file of ours has too."""

    def __init__(self, base=3, **kwargs):
        super().__init__(**kwargs)
        self.base = base
        self.dense = kd.DyLoRADense(base, rank=2)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.built = True

    def call(self, inputs):
        return self.dense(inputs)

    def get_config(self):
        return {"base": self.base, "name": self.name}


def test_subclass_with_a_config_of_its_own(tmp_path):
    options = {
        "seed": 5,
        "draw": "example",
        "full_rank_steps": 7,
        "rank_distribution": kd.Categorical({1: 1, 2: 3}),
    }
    model = WithBase(base=4, **options)
    model.build((None, 10))
    again = reloaded(model, tmp_path)
    assert again.base == 4
    assert again.dylora_config == model.dylora_config
    assert again.dylora_config.seed == 5


@pytest.mark.parametrize("kind", ["functional", "sequential", "hand_built"])
def test_clone_is_refused(kind):
    if kind == "hand_built":
        model = mlp(options={"draw": "example"})
    else:
        model = network()
        if kind == "sequential":
            model = keras.Sequential(
                [keras.Input((10,)), keras.layers.Dense(3, name="first")]
            )
        kd.enable_dylora(
            model,
            rank=2,
            target_layers="first",
            trainable_layers=[],
            verbose=0,
        )
    with pytest.raises(ValueError, match="`clone_model` does"):
        keras.models.clone_model(model)
    if kind != "hand_built":
        copy = model.from_config(model.get_config())
        assert copy.dylora_config == model.dylora_config
        # One of its own would revive all files that are loaded later.
        assert type(copy) is type(model)


def walks(monkeypatch):
    counted = []
    init = Tree.__init__

    def counting(self, model):
        counted.append(model)
        init(self, model)

    monkeypatch.setattr(Tree, "__init__", counting)
    return counted


def test_loading_walks_the_model_once(monkeypatch, tmp_path):
    source = kd.enable_dylora(randomize(gpt2()), rank=2, verbose=0)
    randomize_adapters(source)
    kd.save_adapter(source, tmp_path / "adapter")
    kd.to_peft(source, tmp_path / "peft")
    for load, folder in ((kd.load_adapter, "adapter"), (kd.from_peft, "peft")):
        for model in (randomize(gpt2()), source):
            counted = walks(monkeypatch)
            load(model, tmp_path / folder)
            monkeypatch.undo()
            assert len(counted) == 1
            np.testing.assert_allclose(
                model.predict(tokens(4), verbose=0),
                source.predict(tokens(4), verbose=0),
                atol=1e-5,
            )

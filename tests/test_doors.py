"""What a user does to a model besides, and where it would go wrong."""

import warnings

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import (
    classification_loss,
    labels,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)


def enabled(**arguments):
    model = randomize(roberta_classifier(), scale=0.1)
    kd.enable_dylora(model, rank=4, verbose=0, **arguments)
    return randomize_adapters(model)


def fit(model):
    model.compile("sgd", classification_loss())
    model.fit(tokens(), labels(), verbose=0)


def around_a_backbone():
    model = roberta_classifier()
    kd.enable_dylora(model.backbone, rank=2, verbose=0)
    return model


def distiller():
    return keras.distillation.Distiller(
        teacher=roberta_classifier(),
        student=enabled(),
        distillation_losses=keras.distillation.LogitsDistillation(),
    )


@pytest.mark.parametrize("make", [around_a_backbone, distiller])
def test_fit_of_a_model_around_an_enabled_one_warns(make):
    with pytest.warns(UserWarning, match="enable the outer model") as caught:
        fit(make())
    assert len([w for w in caught if "outer model" in str(w.message)]) == 1


def test_fit_of_a_plain_model_with_adapted_layers_warns():
    inputs = keras.Input((10,))
    model = keras.Model(inputs, kd.DyLoRADense(3)(inputs))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="`DyLoRAModel`, draws ranks"):
        model.fit(*mlp_data(), verbose=0)


def at_a_chosen_rank(model):
    with model.rank_scope(2):
        model(tokens(), training=True)


def at_drawn_ranks(model):
    with model.draw_ranks(tokens()):
        model(tokens(), training=True)


def at_no_other_rank(model):
    one = kd.enable_dylora(roberta_classifier(), rank=2, min_rank=2, verbose=0)
    one(tokens(), training=True)


@pytest.mark.parametrize(
    "train", [fit, at_a_chosen_rank, at_drawn_ranks, at_no_other_rank]
)
def test_no_warning_where_the_rank_is_meant(train):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Only a model that is enabled")
        train(enabled())


def test_a_loop_of_ones_own_without_ranks_warns():
    with pytest.warns(UserWarning, match="`model.draw_ranks` does"):
        enabled()(tokens(), training=True)


@pytest.mark.parametrize(
    "of",
    [lambda m: m, lambda m: m.backbone, lambda m: m.dylora_layers[1]],
    ids=["task", "backbone", "layer"],
)
def test_keras_lora_is_refused(of):
    model = enabled()
    weights = list(model.weights)
    with pytest.raises(ValueError, match="Use `disable_dylora` before Keras"):
        of(model).enable_lora(4)
    assert [id(w) for w in model.weights] == [id(w) for w in weights]


def test_keras_lora_of_another_layer_cannot_be_saved(tmp_path):
    model = enabled()
    model.get_layer("pooled_dense").enable_lora(2)
    with pytest.raises(ValueError, match=r"LoRA at \['pooled_dense'\]"):
        model.save(tmp_path / "clf.keras")
    assert not any(tmp_path.iterdir())


def test_trainable_again_is_what_was_chosen():
    model = enabled()
    chosen = [v.path for v in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [v.path for v in model.trainable_variables] == chosen


def test_trainable_is_anything_once_disabled():
    model = kd.disable_dylora(enabled())
    model.trainable = False
    model.trainable = True
    assert len(model.trainable_variables) == len(model.weights)


def test_an_adapter_with_the_base_warns(tmp_path):
    model = enabled()
    model.backbone.trainable = False  # TensorFlow skips what is so already
    model.backbone.trainable = True
    with pytest.warns(UserWarning, match="28 weights .*froze") as caught:
        kd.save_adapter(model, tmp_path / "adapter")
    assert caught[0].filename == __file__


def by_state_tree(model, set_rank):
    state = model.get_state_tree("numpy_array")
    set_rank()
    model.set_state_tree(state)


def by_state_dict(model, set_rank):
    if backend.NAME != "torch":
        pytest.skip("torch's own way to keep a state")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    set_rank()
    model.load_state_dict(state)


@pytest.mark.parametrize("restore", [by_state_tree, by_state_dict])
def test_the_rank_is_that_of_a_restored_state(restore):
    model = enabled()
    model.set_rank(2)
    at_2 = model.predict(tokens(), verbose=0)
    restore(model, lambda: model.set_rank(4))
    assert model.rank == 2
    np.testing.assert_allclose(
        model.predict(tokens(), verbose=0), at_2, atol=1e-6
    )
    merged = kd.merge(model).predict(tokens(), verbose=0)
    np.testing.assert_allclose(merged, at_2, atol=1e-5)


@pytest.mark.parametrize("name", ["model.h5", "model.hdf5"])
def test_hdf5_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"`.keras` file.*{name}"):
        enabled().save(tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_hdf5_is_refused_past_the_method(tmp_path):
    with pytest.raises(ValueError, match="`.keras` file or `save_adapter`"):
        keras.saving.save_model(enabled(), tmp_path / "model.h5")


def test_a_clone_is_refused():
    with pytest.raises(ValueError, match="`clone_model` would"):
        keras.models.clone_model(enabled())


@keras.saving.register_keras_serializable("tests")
class Tied(keras.Model):
    """Logits by the embeddings' values, as KerasHub's Gemma 3n has them."""

    def __init__(self):
        embedding = keras.layers.Embedding(8, 4)
        tokens = keras.Input((3,), dtype="int32")
        x = keras.layers.Dense(4, name="query")(embedding(tokens))
        values = keras.ops.convert_to_tensor(embedding.embeddings)
        kernel = keras.ops.transpose(values)
        super().__init__(tokens, keras.ops.matmul(x, kernel))

    def get_config(self):
        return {}


def test_a_model_that_computes_with_values_of_weights_isnt_copied(tmp_path):
    model = Tied()
    kd.enable_dylora(model, rank=2, verbose=0)
    x = np.ones((2, 3), "int32")
    if backend.NAME == "torch":  # a view, which follows its weight
        model.layers[1].embeddings.assign(np.ones((8, 4)))
        expected = backend.to_numpy(model(x))
        found = backend.to_numpy(kd.merge(model)(x))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        return
    held = "keeps values in their place .* an array of shape \\(4, 8\\)"
    for copy in (kd.merge, lambda x: x.save(tmp_path / "model.keras")):
        with pytest.raises(ValueError, match=held):
            copy(model)
    assert not list(tmp_path.iterdir())
    kd.save_adapter(model, tmp_path / "adapter")


TIED = {
    "llama": ("LlamaBackbone", "LlamaCausalLM"),
    "llama3": ("Llama3Backbone", "Llama3CausalLM"),
}


@pytest.mark.parametrize("family", TIED)
def test_copies_are_tied_where_the_config_forgets_the_tie(family, tmp_path):
    hub = pytest.importorskip("keras_hub")
    backbone, task = (getattr(hub.models, name) for name in TIED[family])
    backbone = backbone(
        vocabulary_size=8, num_layers=1, num_query_heads=2, hidden_dim=8,
        intermediate_dim=8, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = randomize(task(backbone, preprocessor=None))
    kd.enable_dylora(model, rank=2, verbose=0)
    randomize_adapters(model)
    x = {
        "token_ids": np.array([[1, 2, 3, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0]]),
    }
    expected = backend.to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    for copy in (
        kd.merge(model),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert len(copy.weights) <= len(model.weights)
        np.testing.assert_allclose(
            backend.to_numpy(copy(x)), expected, atol=1e-5
        )


def test_copies_have_the_dtype_of_an_image_head(tmp_path):
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.ViTBackbone(
        image_shape=(16, 16, 3), patch_size=8, num_layers=1, num_heads=2,
        hidden_dim=8, mlp_dim=16, dtype="bfloat16",
    )  # fmt: skip
    model = hub.models.ViTImageClassifier(
        backbone, 3, preprocessor=None, head_dtype="float32"
    )
    kd.enable_dylora(model, rank=2, verbose=0)
    model.save(tmp_path / "model.keras")
    for copy in (
        kd.merge(model),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert copy.output_dense.kernel.dtype == "float32"
        assert copy.backbone.dtype_policy.name == "bfloat16"


class Half(keras.Layer):
    """Has two layers and calls one, so that the other is never built."""

    def __init__(self):
        super().__init__()
        self.query = keras.layers.Dense(3, name="query")
        self.value = keras.layers.Dense(3, name="value")

    def call(self, inputs):
        return self.query(inputs)


def test_what_a_functional_model_never_builds_is_left_out():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Half()(inputs))
    with pytest.warns(UserWarning, match="left out"):
        kd.enable_dylora(model, rank=2, verbose=0)
    assert [x.name for x in model.dylora_layers] == ["query"]


@keras.saving.register_keras_serializable(package="tests")
class OwnCompile(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(3, name="query")

    def build(self, input_shape):
        self.query.build(input_shape)

    def call(self, x):
        return self.query(x)

    def compile(self, temperature, **kwargs):
        super().compile(**kwargs)
        self.temperature = temperature


def test_a_model_with_a_compile_of_its_own_is_loaded_uncompiled(tmp_path):
    x, y = mlp_data()
    model = OwnCompile()
    model.build(x.shape)
    kd.enable_dylora(model, rank=2, trainable_layers=())
    model.compile(2.0, optimizer="sgd", loss="mse")
    model.fit(x, y, verbose=0)
    randomize_adapters(model)
    model.save(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    with pytest.warns(UserWarning, match="`compile\\(\\)` method is custom"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, kd.DyLoRAModel)
    for other in (loaded, kd.merge(model)):
        found = other.predict(x, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Scaled(keras.layers.Layer):
    def build(self, input_shape):
        self.factor = self.add_weight(
            shape=(), initializer="ones", name="factor"
        )

    def call(self, x):
        return x * self.factor


def test_a_weight_without_axes_keeps_its_shape(tmp_path):
    def make():
        inputs = keras.Input((10,))
        x = keras.layers.Dense(3, name="query")(Scaled(name="scaled")(inputs))
        model = keras.Model(inputs, x)
        return kd.enable_dylora(model, rank=2, trainable_layers=["scaled"])

    model, other = make(), make()
    for each in (model, other):
        for weight in each.weights:
            weight.assign(np.full(weight.shape, 0.5))
    model.get_layer("scaled").factor.assign(3.0)
    kd.save_adapter(model, tmp_path / "adapter")
    kd.load_adapter(other, tmp_path / "adapter")
    factor = other.get_layer("scaled").factor
    assert factor.shape == () and float(factor) == 3.0


class Unbuilt(kd.DyLoRAModel):
    def __init__(self):
        super().__init__()
        self.hidden = kd.DyLoRADense(3, rank=2)

    def call(self, x):
        return self.hidden(x)


def test_fit_without_a_step():
    """As where `BackupAndRestore` finds that all epochs are done."""
    model = Unbuilt()
    model.compile("sgd", "mse")
    assert model.fit(*mlp_data(), epochs=0, verbose=0).history == {}

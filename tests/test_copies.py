"""Copies of an enabled model: states, files, clones."""

import keras
import numpy as np
import pytest

import keras_dylora as kd
from tests import backend
from tests.models import enabled, randomize, randomize_adapters, tokens


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
    with pytest.raises(ValueError, match="`clone_model` does"):
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
    held = "keeps values in their place.* an array of shape \\(4, 8\\)"
    for copy in (kd.merge, lambda x: x.save(tmp_path / "model.keras")):
        with pytest.raises(ValueError, match=held):
            copy(model)
    assert not list(tmp_path.iterdir())
    kd.save_adapter(model, tmp_path / "adapter")


TIED = {
    "llama": ("LlamaBackbone", "LlamaCausalLM"),
    "llama3": ("Llama3Backbone", "Llama3CausalLM"),
}


@pytest.mark.families
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


@pytest.mark.families
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

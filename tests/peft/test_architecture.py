"""Models that transformers holds within another: the names of their layers."""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers

import keras_dylora as kd
from keras_dylora.layers.tree import Tree
from tests.models import VOCABULARY, gpt2, randomize_adapters
from tests.peft.making import DECODER, HUB
from tests.peft.twins import (
    adapter_config,
    adapter_tensors,
    assert_same_adapters,
    assert_same_logits,
    keras_logits,
    twin_logits,
)

pytestmark = pytest.mark.families
GEMMA3 = "Gemma3ForConditionalGeneration"
TEXT = {**DECODER, "tie_word_embeddings": True}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Fields of the text, of the images and of both, in transformers.
HOLDERS = {
    "Gemma3": (
        {"head_dim": 4, "query_pre_attn_scalar": 4},
        {**VISION, "image_size": 28, "patch_size": 14},
        {"mm_tokens_per_image": 4},
    ),
    "Gemma4": (
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
        },
        {**VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 16},
        {"audio_config": None},
    ),
    "Qwen3_5": (
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
        {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 16,
        },
        {},
    ),
}


def config_of(family):
    text, vision, both = HOLDERS[family]
    return getattr(transformers, f"{family}Config")(
        text_config={**TEXT, **text},
        vision_config=vision,
        tie_word_embeddings=True,
        **both,
    )


@pytest.fixture(scope="module", params=HOLDERS)
def held(request, tmp_path_factory):
    """A function that gives a model of text, and the class that holds it.

    With `images=True` the Keras model takes images too.
    """
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    torch.manual_seed(0)
    name = f"{family}ForConditionalGeneration"
    holder = getattr(transformers, name)(config_of(family)).eval()
    for parameter in holder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    task = getattr(HUB, f"{family}CausalLM")
    if family == "Gemma3":  # KerasHub reads older names of its vision tower
        text = transformers.Gemma3ForCausalLM(holder.config.text_config)
        body = holder.model.language_model
        text.model.load_state_dict(body.state_dict())
        text.save_pretrained(folder)
    else:
        holder.save_pretrained(folder)

    def make(images=False):
        found = task.from_preset(str(folder), preprocessor=None)
        config = found.backbone.get_config()
        if not images and family != "Gemma3":
            whole = Tree(found).weights
            config["vision_encoder"] = None
            backbone = type(found.backbone).from_config(config)
            found = task(backbone=backbone, preprocessor=None)
            for path, weight in Tree(found).weights.items():
                weight.assign(whole[path])
        return copy.deepcopy(holder), found, name

    return make


@pytest.mark.parametrize("layout", ["peft", "server"])
def test_the_names_are_those_of_the_architecture(layout, held, tmp_path):
    holder, model, name = held()
    base = keras_logits(model)
    kd.enable_dylora(model, rank=3, target_layers="all-linear", verbose=0)
    randomize_adapters(model)
    kd.to_peft(model, tmp_path, rank=2, layout=layout, architecture=name)
    prefix = "base_model.model.model.language_model."
    assert all(x.startswith(prefix) for x in adapter_tensors(tmp_path))
    model.set_rank(2)
    assert np.abs(keras_logits(model) - base).max() > 1e-2
    with warnings.catch_warnings():  # PEFT's, of layers without an adapter
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(holder, tmp_path)
    assert_same_logits(model, adapted)
    names = adapted.targeted_module_names
    assert len(names) == len(model.dylora_layers)
    assert not any("vis" in x for x in names)
    _, again, _ = held()
    kd.from_peft(again, tmp_path)
    assert_same_logits(again, adapted)


# KerasHub reads older names of Gemma 3's vision tower.
@pytest.mark.parametrize("held", ["Gemma4", "Qwen3_5"], indirect=True)
def test_a_model_that_takes_images_too(held, tmp_path):
    """Its text is in the class that takes images, with the same adapter."""
    holder, model, name = held(images=True)
    _, text, _ = held()
    kd.enable_dylora(text, rank=3, target_layers="all-linear", verbose=0)
    randomize_adapters(text)
    paths = [layer.path for layer in text.dylora_layers]
    kd.enable_dylora(model, rank=3, target_layers=paths, verbose=0)
    for layer, like in zip(
        model.dylora_layers, text.dylora_layers, strict=True
    ):
        layer.down.assign(like.down)
        layer.up.assign(like.up)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kd.to_peft(model, tmp_path / "images")
    kd.to_peft(text, tmp_path / "text", architecture=name)
    found = adapter_tensors(tmp_path / "images")
    expected = adapter_tensors(tmp_path / "text")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key])
    adapted = peft.PeftModel.from_pretrained(holder, tmp_path / "images")
    assert_same_logits(text, adapted)
    _, again, _ = held(images=True)
    kd.from_peft(again, tmp_path / "images")
    assert_same_adapters(model, again, 3)


@pytest.mark.parametrize("held", ["Qwen3_5"], indirect=True)
def test_an_adapter_of_images_is_refused(held, tmp_path):
    _, model, _ = held(images=True)
    kd.enable_dylora(model, rank=1, verbose=0)
    with pytest.raises(
        ValueError, match="`target_layers`, or use `merge`.*vision_encoder"
    ):
        kd.to_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_the_holder_is_read(held, tmp_path):
    holder, model, _ = held()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        holder,
        peft.LoraConfig(
            r=4,
            target_modules=r".*language_model.*(q|o|qkv)_proj|.*embed_tokens",
            alpha_pattern={r"model\.language_model\.layers\.1.*": 40},
            init_lora_weights=False,
            ensure_weight_tying=True,
        ),
    )
    adapted.save_pretrained(tmp_path)
    kd.from_peft(model, tmp_path)
    assert_same_logits(model, adapted)


@pytest.mark.parametrize("held", ["Gemma4"], indirect=True)
def test_layers_whose_kernels_are_read_past_them_are_refused(held, tmp_path):
    """Those of the feed-forward part of KerasHub's Gemma 4."""
    holder, model, _ = held()
    base = keras_logits(model)
    modules = r".*language_model.*down_proj"
    config = peft.LoraConfig(target_modules=modules)
    peft.get_peft_model(holder, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ffw_linear"):
        kd.from_peft(model, tmp_path)
    np.testing.assert_array_equal(keras_logits(model), base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("held", ["Gemma3"], indirect=True)
def test_other_names_have_no_effect_in_the_holder(held, tmp_path):
    """Which is why `to_peft` warns of it."""
    holder, model, _ = held()
    kd.enable_dylora(model, rank=3, verbose=0)
    randomize_adapters(model)
    kd.to_peft(model, tmp_path, architecture="Gemma3ForCausalLM")
    assert adapter_config(tmp_path)["target_modules"] == ["q_proj", "v_proj"]
    base = twin_logits(holder)
    adapted = peft.PeftModel.from_pretrained(holder, tmp_path)
    np.testing.assert_array_equal(twin_logits(adapted), base)


@pytest.mark.parametrize("held", ["Gemma4", "Qwen3_5"], indirect=True)
def test_a_warning_where_all_published_ones_are_held(held, tmp_path):
    _, model, name = held()
    kd.enable_dylora(model, rank=1, verbose=0)
    with pytest.warns(UserWarning, match=f"architecture='{name}'"):
        kd.to_peft(model, tmp_path)


@pytest.mark.parametrize("architecture", [None, GEMMA3, "Gemma3ForCausalLM"])
@pytest.mark.parametrize("width", [1152, 2560])
def test_a_warning_where_the_published_ones_are_held(
    width, architecture, tmp_path
):
    backbone = HUB.Gemma3Backbone(
        vocabulary_size=8,
        image_size=None,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=width,
        intermediate_dim=4,
        head_dim=4,
    )
    model = HUB.Gemma3CausalLM(backbone=backbone, preprocessor=None)
    kd.enable_dylora(model, rank=1, verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kd.to_peft(model, tmp_path, layout="server", architecture=architecture)
    found = [x for x in caught if "published models" in str(x.message)]
    if width == 2560 and architecture is None:
        (warning,) = found
        assert f"architecture='{GEMMA3}'" in str(warning.message)
        assert warning.filename == __file__
    else:
        assert not found


def test_an_architecture_that_is_not_known(tmp_path):
    model = kd.enable_dylora(gpt2(), rank=1, verbose=0)
    with pytest.raises(ValueError, match=f"Received: architecture='{GEMMA3}'"):
        kd.to_peft(model, tmp_path / "adapter", architecture=GEMMA3)
    assert not (tmp_path / "adapter").exists()

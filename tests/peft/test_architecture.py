"""Models that transformers holds within another: the names of their layers."""

import warnings

import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers

import keras_dylora as kd
from tests.models import gpt2, randomize_adapters
from tests.peft.making import DECODER
from tests.peft.twins import (
    adapter_config,
    adapter_tensors,
    assert_same_logits,
    keras_logits,
    twin_logits,
)

pytestmark = pytest.mark.families
HOLDER = "Gemma3ForConditionalGeneration"
TEXT = {
    **DECODER,
    "tie_word_embeddings": True,
    "head_dim": 4,
    "query_pre_attn_scalar": 4,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A function that gives a Gemma 3, and the class of images that holds it.

    Its vision tower has layers of the same short names.
    """
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**TEXT)
    text = transformers.Gemma3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("gemma3")
    text.save_pretrained(folder)

    def make():
        holder = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config=config.to_dict(),
                vision_config=VISION,
                mm_tokens_per_image=4,
            )
        ).eval()
        holder.model.language_model.load_state_dict(text.model.state_dict())
        model = keras_hub.models.Gemma3CausalLM.from_preset(
            str(folder), preprocessor=None
        )
        return holder, model

    return make


@pytest.mark.parametrize("layout", ["peft", "server"])
def test_the_names_are_those_of_the_architecture(layout, gemma3, tmp_path):
    holder, model = gemma3()
    base = keras_logits(model)
    kd.enable_dylora(model, rank=3, target_layers="all-linear", verbose=0)
    randomize_adapters(model)
    kd.to_peft(model, tmp_path, rank=2, layout=layout, architecture=HOLDER)
    prefix = "base_model.model.model.language_model.layers."
    assert all(name.startswith(prefix) for name in adapter_tensors(tmp_path))
    model.set_rank(2)
    assert np.abs(keras_logits(model) - base).max() > 1e-2
    with warnings.catch_warnings():  # PEFT's, of layers without an adapter
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(holder, tmp_path)
    assert_same_logits(model, adapted)
    names = adapted.targeted_module_names
    assert not any("vision_tower" in name for name in names)
    _, again = gemma3()
    kd.from_peft(again, tmp_path)
    assert_same_logits(again, adapted)


def test_an_adapter_of_the_holder_is_read(gemma3, tmp_path):
    holder, model = gemma3()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        holder,
        peft.LoraConfig(
            r=4,
            target_modules=r".*language_model.*(q|down)_proj|.*embed_tokens",
            alpha_pattern={r"model\.language_model\.layers\.1.*": 40},
            init_lora_weights=False,
            ensure_weight_tying=True,
        ),
    )
    adapted.save_pretrained(tmp_path)
    kd.from_peft(model, tmp_path)
    assert_same_logits(model, adapted)


@pytest.mark.filterwarnings("ignore")
def test_other_names_have_no_effect_in_the_holder(gemma3, tmp_path):
    """Which is why `to_peft` warns of it."""
    holder, model = gemma3()
    kd.enable_dylora(model, rank=3, verbose=0)
    randomize_adapters(model)
    kd.to_peft(model, tmp_path, architecture="Gemma3ForCausalLM")
    assert adapter_config(tmp_path)["target_modules"] == ["q_proj", "v_proj"]
    base = twin_logits(holder)
    adapted = peft.PeftModel.from_pretrained(holder, tmp_path)
    np.testing.assert_array_equal(twin_logits(adapted), base)


@pytest.mark.parametrize("architecture", [None, HOLDER, "Gemma3ForCausalLM"])
@pytest.mark.parametrize("width", [1152, 2560])
def test_a_warning_where_the_published_ones_are_held(
    width, architecture, tmp_path
):
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=8,
        image_size=None,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=width,
        intermediate_dim=4,
        head_dim=4,
    )
    model = keras_hub.models.Gemma3CausalLM(
        backbone=backbone, preprocessor=None
    )
    kd.enable_dylora(model, rank=1, verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kd.to_peft(model, tmp_path, layout="server", architecture=architecture)
    found = [x for x in caught if "published models" in str(x.message)]
    if width == 2560 and architecture is None:
        (warning,) = found
        assert f"architecture='{HOLDER}'" in str(warning.message)
        assert warning.filename == __file__
    else:
        assert not found


def test_an_architecture_that_is_not_known(tmp_path):
    model = kd.enable_dylora(gpt2(), rank=1, verbose=0)
    with pytest.raises(ValueError, match=f"Received: architecture='{HOLDER}'"):
        kd.to_peft(model, tmp_path / "adapter", architecture=HOLDER)
    assert not (tmp_path / "adapter").exists()

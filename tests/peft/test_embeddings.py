"""Adapters of embeddings, to PEFT and back."""

import copy

import numpy as np
import peft
import pytest

import keras_dylora as kd
from tests.models import randomize_adapters
from tests.peft.twins import (
    adapter_tensors,
    assert_same_adapters,
    assert_same_logits,
    enabled,
    keras_logits,
    trained_by_peft,
)

pytestmark = pytest.mark.families

# With the output of `llama`, which isn't tied to it.
NAMES = {"roberta": "word_embeddings", "llama": "embed_tokens"}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", [*NAMES, "bert", "bert-backbone"])
def test_peft_computes_the_same(name, rank, pair, tmp_path):
    twin, model = pair(name)
    base = keras_logits(model)
    enabled(model, target_layers=["token_embedding", "value"])
    kd.to_peft(model, tmp_path / "adapter", rank=rank)
    model.set_rank(rank)
    assert np.abs(keras_logits(model) - base).max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "adapter"
    )
    assert_same_logits(model, adapted)
    _, again = pair(name)
    kd.from_peft(again, tmp_path / "adapter")
    assert_same_adapters(model, again, rank)
    assert_same_logits(again, adapted)


@pytest.mark.parametrize("name", NAMES)
def test_of_peft_itself(name, pair, tmp_path):
    twin, model = pair(name)
    targets = [NAMES[name], "value" if name == "roberta" else "v_proj"]
    trained_by_peft(copy.deepcopy(twin), tmp_path, r=3, target_modules=targets)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    names = adapter_tensors(tmp_path)
    assert any(x.endswith("lora_embedding_A") for x in names)
    kd.from_peft(model, tmp_path)
    assert_same_logits(model, adapted)
    kinds = {type(layer).__name__ for layer in model.dylora_layers}
    assert "DyLoRAReversibleEmbedding" in kinds
    # PEFT saves the table beside the adapter, which must be the model's.
    other = copy.deepcopy(twin)
    other.get_input_embeddings().weight.data += 1
    trained_by_peft(other, tmp_path, r=3, target_modules=targets)
    if any("base_layer" in x for x in adapter_tensors(tmp_path)):
        with pytest.raises(ValueError, match="must be the model's own"):
            kd.from_peft(pair(name)[1], tmp_path)


def test_a_tied_output(pair, tmp_path):
    """GPT-2's, which PEFT ties by no name: it has an adapter of its own."""
    twin, model = pair("gpt2")
    kd.enable_dylora(model, target_layers=["token_embedding"], rank=2)
    randomize_adapters(model)
    kd.to_peft(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "adapter"
    )
    assert_same_logits(model, adapted)
    _, again = pair("gpt2")
    kd.from_peft(again, tmp_path / "adapter")
    assert_same_adapters(model, again, 2)
    assert_same_logits(again, adapted)
    with pytest.raises(ValueError, match="can't be written for servers"):
        kd.to_peft(model, tmp_path / "server", layout="server")
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["wte", "c_attn"]},
            "an adapter of transformer.wte alone",
        ),
        (
            {"target_modules": ["wte", "lm_head"]},
            "another adapter of lm_head than of transformer.wte",
        ),
        (
            {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
            "another transformer.wte.weight alone",
        ),
        (
            {
                "target_modules": ["c_attn"],
                "modules_to_save": ["wte", "lm_head"],
            },
            "tied, so an adapter must have the same.*another",
        ),
    ],
    ids=["embedding", "both", "table", "both-tables"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_one_side_of_a_tied_one_has_is_refused(
    config, message, pair, tmp_path
):
    twin, model = pair("gpt2")
    trained_by_peft(twin, tmp_path, fan_in_fan_out=True, **config)
    with pytest.raises(ValueError, match=message):
        kd.from_peft(model, tmp_path)
    assert not isinstance(model, kd.DyLoRAModel)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
def test_a_table_that_is_trained_in_full(name, pair, tmp_path):
    twin, model = pair(name)
    trained = ["token_embedding", "logits", "pooled_dense"]
    trained = trained if name == "roberta" else trained[:1]
    enabled(model, trainable_layers=trained)
    layer = model.backbone.token_embedding
    for weight in layer.weights:
        weight.assign_add(
            0.1 * np.random.default_rng(0).normal(size=weight.shape)
        )
    kd.to_peft(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "adapter"
    )
    assert_same_logits(model, adapted)
    _, again = pair(name)
    kd.from_peft(again, tmp_path / "adapter")
    assert_same_logits(again, adapted)
    with pytest.raises(ValueError, match="except for servers.*token_embedding"):
        kd.to_peft(model, tmp_path / "server", layout="server")

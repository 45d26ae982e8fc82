"""Trained tokens, to PEFT and back."""

import copy

import numpy as np
import peft
import pytest

import keras_dylora as kd
from tests import backend
from tests.peft.twins import (
    adapter_config,
    assert_same_adapters,
    assert_same_logits,
    enabled,
    keras_logits,
    tokens,
    trained_by_peft,
)

pytestmark = pytest.mark.families

NAMES = {"roberta": "query", "gpt2": "c_attn", "llama": "v_proj"}
IDS = sorted({int(i) for i in tokens()[0][:, 1:3].ravel()})


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_same(name, pair, tmp_path):
    twin, model = pair(name)
    base = keras_logits(model)
    enabled(model, trainable_tokens=IDS)
    table = model.backbone.token_embedding
    rows = np.random.default_rng(3).normal(size=(len(IDS), 16)) * 0.3
    table.trained_tokens.assign(rows.astype("float32"))
    kd.to_peft(model, tmp_path / "adapter")
    assert np.abs(keras_logits(model) - base).max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "adapter"
    )
    assert_same_logits(model, adapted)
    _, again = pair(name)
    kd.from_peft(again, tmp_path / "adapter")
    assert again.dylora_config.trainable_tokens == tuple(IDS)
    assert_same_adapters(model, again, 3)
    assert_same_logits(again, adapted)
    with pytest.raises(ValueError, match="no trained tokens"):
        kd.to_peft(model, tmp_path / "server", layout="server")
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("name", NAMES)
def test_of_peft_itself(name, pair, tmp_path):
    twin, model = pair(name)
    given = IDS[::-1]  # in an order of its own
    trained_by_peft(
        copy.deepcopy(twin), tmp_path, r=3, target_modules=[NAMES[name]],
        trainable_token_indices=given,
    )  # fmt: skip
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    assert adapter_config(tmp_path)["trainable_token_indices"] == given
    kd.from_peft(model, tmp_path)
    rows = backend.to_numpy(model.backbone.token_embedding.trained_tokens)
    assert np.abs(rows).max() > 1e-4
    assert_same_logits(model, adapted)

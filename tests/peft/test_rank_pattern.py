"""PEFT's `rank_pattern`, both ways."""

import copy

import keras
import numpy as np
import peft
import pytest
import torch

import keras_dylora as kd
from tests import backend
from tests.peft.twins import (
    adapter_config,
    adapter_tensors,
    assert_same_logits,
    enabled,
    keras_logits,
    tokens,
    trained_by_peft,
    twin_logits,
)

pytestmark = pytest.mark.families
PATTERN = {r".*_0/.*query": 1, "query": 2}


def config_of(folder):
    config = adapter_config(folder)
    return config["r"], config["rank_pattern"], config["alpha_pattern"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_pattern_of_ours(rank, pair, tmp_path):
    twin, model = pair("roberta")
    enabled(model, rank_pattern=PATTERN)
    kd.to_peft(model, tmp_path, rank=rank)
    model.set_rank(rank)
    names = "roberta.encoder.layer.{}.attention.self.query"
    lower = {names.format(i): b for i, b in enumerate((1, 2)) if b < rank}
    # One alpha: each is scaled by alpha over its own rank, as in PEFT.
    assert config_of(tmp_path) == (rank, lower, {})
    assert adapter_config(tmp_path)["lora_alpha"] == 7
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert_same_logits(model, adapted)
    _, again = pair("roberta")
    kd.from_peft(again, tmp_path)
    assert [x.rank for x in again.dylora_layers] == [
        min(b, rank) for b in (1, 3, 2, 3)
    ]
    for b in range(1, rank + 1):
        model.set_rank(b)
        again.set_rank(b)
        np.testing.assert_allclose(
            keras_logits(again), keras_logits(model), atol=1e-5
        )


def test_a_gradient_is_that_of_peft(pair):
    """A LoRA with a pattern trains as PEFT's with the same one."""
    twin, model = pair("roberta")
    enabled(
        model, min_rank=3, rank_pattern=PATTERN, trainable_layers=(), seed=3
    )
    names = "layer.{}.attention.self.query"
    adapted = peft.get_peft_model(
        twin,
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["query", "value"],
            rank_pattern={names.format(i): b for i, b in enumerate((1, 2))},
        ),
    )
    modules = [
        x for x in adapted.modules() if isinstance(x, peft.tuners.lora.Linear)
    ]
    pairs = []
    for layer, module in zip(model.dylora_layers, modules, strict=True):
        a, b = module.lora_A.default.weight, module.lora_B.default.weight
        assert tuple(a.shape) == tuple(layer.down.shape)[::-1]
        a.data = torch.tensor(backend.to_numpy(layer.down).T.copy())
        b.data = torch.tensor(backend.to_numpy(layer.up).T.copy())
        pairs += [(layer.down, a), (layer.up, b)]
    assert_same_logits(model, adapted)
    ids, mask = tokens()
    adapted(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()
    ).logits.sum().backward()
    inputs = {"token_ids": ids, "padding_mask": mask.astype("int32")}

    def loss():
        with model.rank_scope(3):
            return keras.ops.sum(model(inputs, training=True))

    found = backend.gradients(loss, [ours for ours, _ in pairs])
    for gradient, (_, theirs) in zip(found, pairs, strict=True):
        np.testing.assert_allclose(
            gradient.T, theirs.grad.numpy(), atol=1e-4, rtol=1e-4
        )


def test_a_pattern_of_peft(pair, tmp_path):
    twin, model = pair("roberta")
    trained_by_peft(
        copy.deepcopy(twin),
        tmp_path / "theirs",
        target_modules=["query", "key", "value"],
        task_type="SEQ_CLS",
        rank_pattern={"query": 2, r"layer\.1\..*key": 5},
    )
    kd.from_peft(model, tmp_path / "theirs")
    assert [x.rank for x in model.dylora_layers] == [2, 4, 4, 2, 5, 4]
    assert model.rank == 5
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "theirs")
    assert_same_logits(model, adapted)
    kd.to_peft(model, tmp_path / "ours")
    ours, theirs = map(
        adapter_tensors, (tmp_path / "ours", tmp_path / "theirs")
    )
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items()
    }
    twin = peft.PeftModel.from_pretrained(pair("roberta")[0], tmp_path / "ours")
    np.testing.assert_allclose(
        twin_logits(twin), twin_logits(adapted), atol=1e-4
    )

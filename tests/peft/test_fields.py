"""Every field of PEFT's `LoraConfig`: read as PEFT reads it, or refused."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

import keras_dylora as kd
from keras_dylora.adapters.peft import fields
from tests.marks import once
from tests.peft.twins import (
    MODELS,
    assert_same_logits,
    keras_logits,
    twin_logits,
)

pytestmark = pytest.mark.families
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_field_is_known():
    assert fields.IGNORED | set(fields.READ) | set(fields.REFUSED) == FIELDS


def adapted(twin, folder, **config):
    """A model with random adapters and else trained weights, saved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        copy.deepcopy(twin), peft.LoraConfig(r=4, lora_alpha=6, **config)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return model


QUERY_VALUE = {"target_modules": ["query", "value"]}
TAKEN = {
    "exclude-list": ("roberta", {"exclude_modules": ["layer.0.output.dense"]}),
    "exclude-regex": ("roberta", {"exclude_modules": r".*\.1\..*(key|value)"}),
    "layer": ("roberta", {**QUERY_VALUE, "layers_to_transform": 1}),
    "layers": (
        "roberta",
        {
            **QUERY_VALUE,
            "layers_to_transform": [0],
            "layers_pattern": ["h", "layer"],
        },
    ),
    "regex-target": ("roberta", {"target_modules": r".*layer\.[1-3].*key"}),
    "regex-patterns": (
        "roberta",
        {
            **QUERY_VALUE,
            "rank_pattern": {r"^roberta\.encoder\.layer\.1\..*": 2, "query": 3},
            "alpha_pattern": {r".*\.layer\.0\..*": 5, r"value": 2.5},
            "use_rslora": True,
        },
    ),
    "saved-over-target": (
        "roberta",
        {
            "target_modules": ["query", "dense"],
            "modules_to_save": ["classifier"],
        },
    ),
    "part-of-the-head": ("roberta", {"modules_to_save": ["out_proj"]}),
    "both-tables": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "mica": ("roberta", {**QUERY_VALUE, "init_lora_weights": "mica"}),
    "orthogonal": (
        "roberta",
        {**QUERY_VALUE, "init_lora_weights": "orthogonal"},
    ),
    "velora": ("roberta", {**QUERY_VALUE, "velora_config": VeloraConfig()}),
    "fan-in-fan-out": ("roberta", {**QUERY_VALUE, "fan_in_fan_out": True}),
    "fan-out-fan-in": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": False},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case, pair, tmp_path):
    name, config = TAKEN[case]
    twin, model = pair(name)
    targets = (
        "query key output.dense" if name == "roberta" else "q_proj up_proj"
    )
    found = adapted(
        twin, tmp_path, **{"target_modules": targets.split(), **config}
    )
    base = keras_logits(model)
    kd.from_peft(model, tmp_path)
    assert np.abs(keras_logits(model) - base).max() > 1e-3
    assert_same_logits(model, found)
    # The layers are PEFT's, no more and no fewer.
    modules = found.targeted_module_names
    assert len(model.dylora_layers) == len(modules) * (
        3 if name == "gpt2" else 1
    )
    # And back.
    if config.get("modules_to_save") != ["embed_tokens", "lm_head"]:
        kd.to_peft(model, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(twin, tmp_path / "again")
        assert_same_logits(model, again)


REFUSED = {
    "bias": ("roberta", {"bias": "lora_only"}, True),
    "every-bias": ("roberta", {"bias": "all"}, True),
    "lora_bias": ("roberta", {"lora_bias": True}, True),
    "use_dora": ("roberta", {"use_dora": True}, True),
    "monteclora_config": (
        "roberta",
        {"monteclora_config": MontecloraConfig()},
        True,
    ),
    "kasa_config": ("roberta", {"kasa_config": KasaConfig()}, True),
    "init_lora_weights": ("roberta", {"init_lora_weights": "pissa"}, True),
    "modules_to_save": ("roberta", {"modules_to_save": ["LayerNorm"]}, True),
    "target_modules": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"]},
        True,
    ),
    "target_parameters": (
        "llama",
        {"target_parameters": ["mlp.up_proj.weight"]},
        True,
    ),
    "layer_replication": (
        "llama",
        {"layer_replication": [[0, 2], [1, 2]]},
        False,
    ),
    "alora_invocation_tokens": (
        "llama",
        {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        False,
    ),
    "use_bdlora": (
        "llama",
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
        True,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", once(REFUSED, but=["use_dora"]))
def test_what_is_refused_and_the_way_out(case, pair, tmp_path):
    name, config, merges = REFUSED[case]
    twin, model = pair(name)
    targets = ["query"] if name == "roberta" else ["q_proj"]
    found = adapted(
        twin, tmp_path / "adapter", **{"target_modules": targets, **config}
    )
    field = next(x for x in config if x != "task_type")
    way = "merge_and_unload.* " if merges else ""
    with pytest.raises(ValueError, match=f"{way}Received: {field}="):
        kd.from_peft(model, tmp_path / "adapter")
    assert not isinstance(model, kd.DyLoRAModel)
    if merges:
        expected = twin_logits(found)
        merged = found.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        _, _, backbone, build = MODELS[name]
        whole = build(backbone.from_preset(str(tmp_path / "merged")), merged)
        np.testing.assert_allclose(keras_logits(whole), expected, atol=1e-4)


def test_a_plain_one_of_one_that_changed_the_base(pair, tmp_path):
    twin, model = pair("roberta")
    config = peft.LoraConfig(
        r=4, target_modules=["query"], init_lora_weights="pissa"
    )
    found = peft.get_peft_model(copy.deepcopy(twin), config)
    found.peft_config["default"].init_lora_weights = True
    found.save_pretrained(tmp_path / "initial")
    found.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found.eval().save_pretrained(
        tmp_path / "plain",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    kd.from_peft(model, tmp_path / "plain")
    assert_same_logits(model, found)


@pytest.mark.parametrize(
    "change",
    [
        {"exclude_modules": ["query"]},
        {"layers_to_transform": [1]},
        {"modules_to_save": [r"layer\.0"]},
    ],
    ids=lambda x: next(iter(x)),
)
def test_tensors_that_the_configuration_leaves_out(change, pair, tmp_path):
    twin, model = pair("roberta")
    found = adapted(twin, tmp_path, **QUERY_VALUE)
    config = found.peft_config["default"]
    for name, value in change.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    (field,) = change
    with pytest.raises(ValueError, match=f"`{field}` .*Received: {field}="):
        kd.from_peft(model, tmp_path)


def test_patterns_of_a_task_count_in_a_bare_model(pair, tmp_path):
    """Their expressions name the layers as the task has them."""
    twin, model = pair("roberta")
    found = adapted(
        twin,
        tmp_path,
        target_modules=r"roberta\.encoder.*query",
        rank_pattern={r"^roberta\.encoder\.layer\.1.*": 2},
        alpha_pattern={r"^roberta\.encoder\.layer\.0.*": 30},
    )
    kd.from_peft(model, tmp_path)
    assert_same_logits(model, found)
    _, task = pair("roberta")
    kd.from_peft(task.backbone, tmp_path)
    pairs = zip(model.dylora_layers, task.backbone.dylora_layers, strict=True)
    for a, b in pairs:
        own = a.delta_kernel(a.rank), b.delta_kernel(b.rank)
        np.testing.assert_allclose(*own)


@pytest.mark.parametrize("pattern", ["layer", "block", None])
def test_layers_of_nested_blocks(pattern):
    """As PEFT's own function counts them, in T5 and ALBERT."""
    names = [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "albert.encoder.albert_layer_groups.1.albert_layers.0.q",
        "h.1.q",
    ]
    for number in (0, 1, [1], [0, 1], []):
        config = {
            "target_modules": ["q"],
            "layers_to_transform": number,
            "layers_pattern": pattern,
        }
        theirs = peft.LoraConfig(**config)
        for name in names:
            wanted = peft.tuners.tuners_utils.check_target_module_exists(
                theirs, name
            )
            assert fields.targets(config, name) == bool(wanted), (number, name)

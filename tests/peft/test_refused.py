"""PEFT adapters that aren't written or read: what the error says."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from keras_dylora.adapters import from_peft, to_peft
from tests import backend
from tests.models import (
    gpt2,
    mlp,
    randomize_adapters,
    roberta_backbone,
    roberta_classifier,
)
from tests.peft.twins import HUB, adapter_config, adapter_tensors, enabled

pytestmark = pytest.mark.families


def test_a_pickled_adapter_is_refused(pair, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"code")
    with pytest.raises(ValueError, match="runs code.*save_pretrained"):
        from_peft(pair("roberta")[1], tmp_path)


def with_a_trained_norm():
    layers = ["pooled_dense", "logits", "embeddings_layer_norm"]
    return enabled(roberta_classifier(), trainable_layers=layers)


def with_an_adapted_head():
    return enabled(
        roberta_classifier(), target_layers=["query", "pooled_dense"]
    )


def masked_lm():
    return enabled(HUB.RobertaMaskedLM(roberta_backbone()))


def with_a_narrow_head():
    return enabled(
        HUB.RobertaTextClassifier(
            roberta_backbone(), num_classes=2, hidden_dim=8, preprocessor=None
        )
    )


def resnet(pooling="avg", **options):
    """A ResNet as transformers has it, but for what is given."""
    backbone = HUB.ResNetBackbone(
        **{
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [7],
            "stackwise_num_filters": [64],
            "stackwise_num_blocks": [1],
            "stackwise_num_strides": [1],
            "block_type": "basic_block",
            "image_shape": (16, 16, 3),
            **options,
        }
    )
    model = HUB.ResNetImageClassifier(backbone, 2, pooling=pooling)
    return enabled(model, target_layers="all-conv")


NOT_SAVED = {
    "resnet-v2": (
        lambda: resnet(use_pre_activation=True),
        {},
        "Received: a ResNetBackbone of use_pre_activation=True",
    ),
    "resnet-vd": (
        lambda: resnet(block_type="basic_block_vd"),
        {},
        "block_type='basic_block_vd'",
    ),
    "resnet-pooling": (lambda: resnet("max"), {}, "pooling='max'"),
    "narrow-head": (with_a_narrow_head, {}, "as wide as the backbone, 16"),
    "not-enabled": (roberta_classifier, {}, "enable_dylora"),
    "rank-0": (lambda: enabled(roberta_classifier()), {"rank": 0}, "rank=0"),
    "rank-4": (lambda: enabled(roberta_classifier()), {"rank": 4}, "rank=4"),
    "ranks-4": (
        lambda: enabled(roberta_classifier()),
        {"ranks": [1, 4]},
        "between 1 and 3",
    ),
    "no-ranks": (
        lambda: enabled(roberta_classifier()),
        {"ranks": []},
        "at least one rank, and each once",
    ),
    "rank-and-ranks": (
        lambda: enabled(roberta_classifier()),
        {"rank": 1, "ranks": [1]},
        "not both",
    ),
    "dtype": (
        lambda: enabled(roberta_classifier()),
        {"dtype": "int8"},
        "dtype='int8'",
    ),
    "beyond-float16": (
        lambda: randomize_adapters(enabled(roberta_classifier()), scale=1e6),
        {"dtype": "float16"},
        "must be within float16's",
    ),
    "functional": (mlp, {}, "GPT2CausalLM.*Received: a .*Functional"),
    "masked-lm": (masked_lm, {}, "Received: a DyLoRARobertaMaskedLM"),
    "trained-norm": (
        with_a_trained_norm,
        {},
        "Received: trained weights .*embeddings_layer_norm/beta",
    ),
    "adapted-head": (
        with_an_adapted_head,
        {},
        r"Received: adapters at \['pooled_dense'\]",
    ),
}


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_cannot_be_saved(case, tmp_path):
    make, arguments, message = NOT_SAVED[case]
    with pytest.raises(ValueError, match=message):
        to_peft(make(), tmp_path / "adapter", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_rank_must_be_an_integer(tmp_path):
    with pytest.raises(TypeError, match="rank='2'"):
        to_peft(enabled(roberta_classifier()), tmp_path, rank="2")


def test_other_directories_are_left_alone(tmp_path):
    model = enabled(roberta_classifier())
    folder = tmp_path / "adapter"
    to_peft(model, folder)
    to_peft(model, folder, rank=1)
    assert adapter_config(folder)["r"] == 1
    with pytest.raises(ValueError, match="overwrite=True"):
        to_peft(model, folder, overwrite=False)
    (folder / "keras_dylora.json").unlink()  # as if PEFT had saved it
    with pytest.raises(
        ValueError, match="keras_dylora wrote.*holds 'README.md"
    ):
        to_peft(model, folder)
    assert adapter_config(folder)["r"] == 1


def edit(name, **entries):
    def act(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **entries}))

    return act


def as_plain(**entries):
    """The directory as PEFT would have saved it, with other entries."""

    def act(folder):
        (folder / "keras_dylora.json").unlink()
        edit("adapter_config.json", **entries)(folder)

    return act


def retensor(change):
    def act(folder):
        as_plain()(folder)
        tensors = change(adapter_tensors(folder))
        path = folder / "adapter_model.safetensors"
        safetensors.torch.save_file(tensors, path)

    return act


def for_nothing(folder):
    retensor(lambda tensors: {})(folder)
    other = {"target_modules": ["other"], "modules_to_save": None}
    edit("adapter_config.json", **other)(folder)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip(folder):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def from_model(make, **arguments):
    def act(folder):
        shutil.rmtree(folder)
        to_peft(enabled(make(), **arguments), folder)

    return act


def without(ending):
    return retensor(
        lambda tensors: {
            k: v for k, v in tensors.items() if not k.endswith(ending)
        }
    )


QUERY = "encoder.layer.1.attention.self.query.lora_A.weight"
SIDE = "keras_dylora.json"
NOT_LOADED = {
    "no-folder": (shutil.rmtree, "without adapter_config.json"),
    "no-weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "without adapter_model.safetensors",
    ),
    "json": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json must be a JSON file",
    ),
    "json-list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "cut-weights": (cut, "must be a safetensors file"),
    "other-weights": (flip, "SHA-256"),
    "newer": (edit(SIDE, format_version=99), "format_version=99"),
    "wide-up": (
        retensor(
            lambda tensors: {
                k: torch.cat([v, v[:1]]) if k.endswith("lora_B.weight") else v
                for k, v in tensors.items()
            }
        ),
        "mis-shaped: .*lora_B",
    ),
    "damaged-side-file": (edit(SIDE, config={}), "`to_peft` wrote"),
    "other-r": (edit("adapter_config.json", r=2), "must be"),
    "dora": (as_plain(use_dora=True), "plain LoRA.*use_dora=True"),
    "bias": (as_plain(bias="all"), "plain LoRA.*bias='all'"),
    "other-type": (as_plain(peft_type="IA3"), "plain LoRA.*peft_type='IA3'"),
    "pissa": (as_plain(init_lora_weights="pissa"), "plain LoRA.*'pissa'"),
    "new-variant": (
        as_plain(some_variant={"groups": 2}),
        "plain LoRA.*some_variant",
    ),
    "expression": (
        as_plain(alpha_pattern={"(query": 3}),
        r"`alpha_pattern` .* must have regular expressions.*'\(query'",
    ),
    "no-r": (as_plain(r=None), "`r` must be an integer"),
    "alpha": (as_plain(lora_alpha="7"), "`lora_alpha` must be a number"),
    "alpha-0": (as_plain(lora_alpha=0), "`alpha` must be a positive number"),
    "missing": (without(QUERY), f"missing: .*{QUERY}"),
    "missing-layer": (
        retensor(lambda t: {k: v for k, v in t.items() if "layer.1" not in k}),
        "missing: .*layer.1.attention.self.query.lora_B",
    ),
    "missing-head": (
        without("classifier.out_proj.bias"),
        "missing: .*classifier.out_proj.bias",
    ),
    "extra": (
        retensor(lambda t: {**t, "lm_head.weight": torch.zeros(2)}),
        "extra: lm_head.weight",
    ),
    "no-tensors": (retensor(lambda t: {}), "missing: "),
    "for-nothing": (for_nothing, "must adapt layers of the model"),
    "integers": (
        retensor(lambda t: {k: v.int() for k, v in t.items()}),
        "floating point.*I32",
    ),
    "other-model": (from_model(gpt2), "extra: .*transformer.h.0.attn.c_attn"),
    "other-shapes": (
        from_model(lambda: roberta_classifier(hidden_dim=32)),
        "mis-shaped: .*must be",
    ),
    "more-layers": (
        from_model(lambda: roberta_classifier(num_layers=3)),
        "extra: .*encoder.layer.2.attention",
    ),
}
NOT_LOADED_IF_ENABLED = {
    **{name: NOT_LOADED[name] for name in ("missing", "extra", "other-shapes")},
    "other-rank": (
        from_model(roberta_classifier, rank=2),
        "rank 2 for a model of rank 3",
    ),
    "other-layers": (
        from_model(roberta_classifier, target_layers=["query", "key"]),
        "without .*self_attention_layer/value.* with .*layer/key",
    ),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "adapter"
    to_peft(enabled(roberta_classifier()), folder)
    return folder


def refuses(model, act, message, written, folder):
    shutil.copytree(written, folder)
    act(folder)
    cls, before = type(model), backend.snapshot(model.weights)
    with pytest.raises((ValueError, TypeError), match=message):
        from_peft(model, folder)
    assert type(model) is cls
    for a, b in zip(before, backend.snapshot(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", NOT_LOADED)
def test_what_cannot_be_loaded(case, written, tmp_path):
    act, message = NOT_LOADED[case]
    refuses(roberta_classifier(), act, message, written, tmp_path / "adapter")


@pytest.mark.parametrize("case", NOT_LOADED_IF_ENABLED)
def test_what_an_enabled_model_refuses(case, written, tmp_path):
    act, message = NOT_LOADED_IF_ENABLED[case]
    model = enabled(roberta_classifier())
    refuses(model, act, message, written, tmp_path / "adapter")


def test_models_that_are_not_known(tmp_path):
    to_peft(enabled(roberta_classifier()), tmp_path)
    with pytest.raises(ValueError, match="Received: a RobertaMaskedLM"):
        from_peft(HUB.RobertaMaskedLM(roberta_backbone()), tmp_path)

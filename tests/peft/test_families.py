"""Families in PEFT's format: real transformers and peft, both directions."""

import copy
import json

import keras
import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import keras_dylora as kd
from keras_dylora.adapters.peft.families import layout_of
from keras_dylora.layers.tree import Tree
from tests import backend
from tests.models import VOCABULARY, allocation, randomize_adapters
from tests.peft.families import FAMILIES
from tests.peft.making import HUB, LENGTH

pytestmark = pytest.mark.families


def twin_of(name):
    twin_class, config = FAMILIES[name][0]
    torch.manual_seed(0)
    twin = twin_class(config).eval()
    for key, parameter in twin.named_parameters():  # so that biases count too
        if "token_type" in key and name == "xlm-roberta":
            parameter.data[:] = 0  # as published
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
        if name == "mistral":  # KerasHub reads it in half precision
            parameter.data = parameter.data.half().float()
    for key, value in twin.named_buffers():
        if key.endswith("running_mean"):
            value += 0.1 * torch.randn_like(value)
        elif key.endswith("running_var"):
            value += torch.rand_like(value)
    return twin


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A transformers model and its KerasHub twin; each made anew by a call."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    twin = twin_of(name)
    twin.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # As published ones have it, and KerasHub reads it.
    if hasattr(twin.config, "num_hidden_layers"):
        config.setdefault("num_hidden_layers", twin.config.num_hidden_layers)
    path.write_text(json.dumps(config))

    def make():
        twin = twin_of(name)
        return twin, FAMILIES[name][1](folder, twin)

    return make


def tokens():
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < np.array([[LENGTH], [5], [3]])
    # 1 is RoBERTa's padding, from which transformers takes the positions.
    return np.where(mask, rng.integers(3, VOCABULARY, mask.shape), 1), mask


def logits(model):
    """The logits of the text or the image, without those of padding."""
    ids, mask = tokens()
    numbers = mask.astype("int32")
    given = {
        "token_ids": ids,
        "padding_mask": numbers,
        "segment_ids": np.zeros_like(ids),
        "encoder_token_ids": ids,
        "encoder_padding_mask": numbers,
        "decoder_token_ids": ids,
        "decoder_padding_mask": numbers,
    }
    pixels = np.random.default_rng(1).normal(size=(3, 32, 32, 3))
    if not isinstance(model, keras.Model):
        ids, mask = torch.tensor(ids), torch.tensor(mask).long()
        names = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            names |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        if hasattr(model.config, "num_channels"):
            values = pixels.transpose(0, 3, 1, 2).astype("float32")
            names = {"pixel_values": torch.tensor(values)}
        with torch.no_grad():
            found = model(**names)
            found = getattr(found, "logits", found[0]).numpy()
    else:
        wanted = model.input
        inputs = (
            {name: given[name] for name in wanted}
            if isinstance(wanted, dict)
            else pixels.astype("float32")
        )
        found = model(inputs)
        if isinstance(found, dict):
            found = found["sequence_output"]
        found = backend.to_numpy(found)
    return found[tokens()[1]] if found.ndim == 3 else found


def assert_same(first, second):
    np.testing.assert_allclose(logits(first), logits(second), atol=1e-4)


def enabled(model, targets):
    if targets and "electra" in model.name:  # whose twin has no pooler
        targets = [".*self_attention_layer/.*", "feedforward.*", "embeddings.*"]
    if isinstance(model, HUB.ViTImageClassifier) and targets:
        targets = [".*mha/.*", ".*mlp/.*", "patch_embedding"]
    if isinstance(model, HUB.ResNetImageClassifier):
        targets = "all-conv"
    kd.enable_dylora(model, rank=3, alpha=3.0, target_layers=targets, verbose=0)
    # Small, so that T5's logits stay so.
    randomize_adapters(model, scale=0.1)
    mixed = allocation(model, [3, 0, 2, 1])
    return {"1": 1, "3": 3, "mixed": mixed}


@pytest.mark.parametrize(
    "targets",
    [pytest.param(None, marks=pytest.mark.long), "all-linear"],
    ids=str,
)
def test_from_keras_to_peft_and_back(pair, targets, tmp_path):
    twin, model = pair()
    assert_same(model, twin)
    base = logits(model)
    _, again = pair()
    for name, rank in enabled(model, targets).items():
        kd.to_peft(model, tmp_path / name, rank=rank)
        model.set_rank(rank)
        assert np.abs(logits(model) - base).max() > 1e-3
        adapted = peft.PeftModel.from_pretrained(
            copy.deepcopy(twin), tmp_path / name
        )
        assert_same(model, adapted)
        if hasattr(again, "dylora_config"):
            kd.disable_dylora(again)
        kd.from_peft(again, tmp_path / name)
        assert_same(again, adapted)


def served(twin, folder):
    """A model with an adapter as programs that serve them read it.

    After vLLM's `LoRAModel.from_local_checkpoint`: one scale, `lora_alpha / r`,
    for all layers, whatever the patterns say, and an error for a tensor of a
    module that the model hasn't.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    modules = dict(twin.named_modules())
    for name, down in tensors.items():
        name = name.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            module = modules[name.removesuffix(".lora_A.weight")]
            up = tensors[f"base_model.model.{name.replace('lora_A', 'lora_B')}"]
            assert down.shape[0] == up.shape[1] == config["r"]
            update = torch.einsum(
                "or,r...->o...", up.float().flatten(1), down.float()
            )
            module.weight.data += update * config["lora_alpha"] / config["r"]
        elif not name.endswith(".lora_B.weight"):  # of the head
            module, _, parameter = name.rpartition(".")
            getattr(modules[module], parameter).data[:] = down.float()
    return twin


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        ("float32", 1e-3),
        pytest.param("bfloat16", 1e-2, marks=pytest.mark.long),
    ],
)
def test_served(pair, dtype, atol, tmp_path):
    twin, model = pair()
    for name, rank in enabled(model, "all-linear").items():
        kd.to_peft(
            model, tmp_path / name, rank=rank, layout="server", dtype=dtype
        )
        model.set_rank(rank)
        found = logits(served(copy.deepcopy(twin), tmp_path / name))
        expected = logits(model)
        # A number in bfloat16 is off by a share of itself.
        size = np.abs(expected).max() if dtype == "bfloat16" else 1.0
        np.testing.assert_allclose(found, expected, atol=atol * size)


def test_from_peft_to_keras(pair, tmp_path):
    twin, model = pair()
    layout = layout_of(model)
    linear = set(layout.modules(Tree(model)))
    if hasattr(model, "generate"):  # an output may be tied to it
        linear.discard(f"{layout.prefix}{layout.embedding}")
    linear = sorted(linear)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=linear, init_lora_weights=False
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(twin, config)
    adapted.save_pretrained(tmp_path / "adapter")
    kd.from_peft(model, tmp_path / "adapter")
    assert_same(model, adapted)


TIED = ["gemma", "gemma2", "gemma3", "smollm3"]


@pytest.mark.parametrize("pair", TIED, indirect=True)
def test_an_embedding_and_the_output_that_is_tied_to_it(pair, tmp_path):
    twin, model = pair()
    base = logits(model)
    kd.enable_dylora(
        model,
        rank=3,
        target_layers=["token_embedding", r".*/(query|q_proj)"],
        verbose=0,
    )
    randomize_adapters(model, scale=0.1)
    kd.to_peft(model, tmp_path / "ours", rank=2)
    model.set_rank(2)
    assert np.abs(logits(model) - base).max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "ours"
    )
    assert_same(model, adapted)
    # And as PEFT itself ties them.
    config = peft.LoraConfig(
        target_modules=["embed_tokens", "q_proj"],
        ensure_weight_tying=True,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(twin, config)
    adapted.save_pretrained(tmp_path / "theirs")
    _, again = pair()
    kd.from_peft(again, tmp_path / "theirs")
    assert_same(again, adapted)


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
def test_a_table_in_full_that_is_tied_to_the_output(pair, tmp_path):
    twin, model = pair()
    kd.enable_dylora(
        model, rank=3, trainable_layers=["token_embedding"], verbose=0
    )
    randomize_adapters(model, scale=0.1)
    table = model.backbone.token_embedding.embeddings
    rng = np.random.default_rng(0)
    table.assign_add(0.1 * rng.normal(size=table.shape))
    kd.to_peft(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert_same(model, adapted)
    _, again = pair()
    kd.from_peft(again, tmp_path)
    assert_same(again, adapted)

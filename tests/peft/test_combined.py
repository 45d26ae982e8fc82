"""combine_adapters: the numbers of PEFT's own `add_weighted_adapter`."""

import json

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import keras_dylora as kd
from keras_dylora.adapters.peft.families import layout_of
from keras_dylora.layers.tree import Tree
from tests.models import randomize_adapters
from tests.peft.twins import (
    adapter_config,
    adapter_tensors,
    assert_same_logits,
    enabled,
    trained_by_peft,
)

pytestmark = pytest.mark.families

# What each method is in PEFT, its rank, and what it takes besides.
METHODS = {
    "svd": ("svd", 2, {}),
    "svd-whole": ("svd", 5, {}),
    "concatenate": ("cat", 5, {}),
    "ties": ("ties_svd", 3, {"density": 0.6}),
    "ties-frequency": (
        "ties_svd",
        3,
        {"density": 0.3, "majority_sign_method": "frequency"},
    ),
    "dare": ("dare_linear_svd", 3, {"density": 0.6}),
}
# Of a classifier, of an encoder alone, of an embedding, of groups of queries.
MODELS = {
    "roberta": None,
    "bert-backbone": "all-linear",
    "roberta-embedding": ["token_embedding", "value"],
    "llama": "all-linear",
}
WEIGHTS = 0.7, -1.3


def drop_head(folder):
    """PEFT combines no adapters that have heads."""
    config = adapter_config(folder)
    config |= {"modules_to_save": None, "task_type": None}
    tensors = {k: x for k, x in adapter_tensors(folder).items() if "lora_" in k}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def random_masks(model, combined):
    """What is random of the seed 0, by the name of a module, for each adapter.

    Of modules that are one layer in KerasHub; as `(inputs, outputs)`.
    """
    rng, by_path = np.random.default_rng(0), {}
    for path, factors in combined.layers.items():
        shape = factors.down.shape[0], factors.up.shape[1]
        by_path[path] = [rng.random(shape, "float32") for _ in WEIGHTS]
    modules = layout_of(model).modules(Tree(model))
    return {name: by_path.get(paths[0], []) for name, paths in modules.items()}


def combined_by_peft(twin, folders, method, model, combined, monkeypatch):
    """PEFT's model with the combined adapter of a method.

    What is random there is what it is here.
    """
    combination, rank, options = METHODS[method]
    for folder in folders:
        drop_head(folder)
    adapted = peft.PeftModel.from_pretrained(twin, folders[0], "a")
    adapted.load_adapter(folders[1], "b")
    masks, waiting = random_masks(model, combined), []
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Embedding):
            waiting += masks[name]
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            waiting += [mask.T for mask in masks[name]]

    def bernoulli(shares):
        mask = waiting.pop(0) < shares.max().item()
        assert mask.shape == tuple(shares.shape)
        return torch.from_numpy(mask.astype("float32"))

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    adapted.add_weighted_adapter(
        ["a", "b"], [*WEIGHTS], "both", combination, svd_rank=rank, **options
    )
    adapted.set_adapter("both")
    return adapted


def assert_same_updates(found, wanted, atol=1e-5):
    """Compares the kernels' changes of two PEFT models, adapter by adapter."""
    count = 0
    modules = dict(wanted.named_modules())
    for name, module in found.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            mine = module.get_delta_weight("default")
            torch.testing.assert_close(
                mine,
                modules[name].get_delta_weight("both"),
                atol=atol,
                rtol=0,
            )
            assert mine.abs().max() > 0.05
            count += 1
    assert count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_of_our_own(name, method, pair, tmp_path, monkeypatch):
    model_name = name.removesuffix("-embedding")
    arguments = {"target_layers": MODELS[name]}
    folders, natives = [], []
    for i, config in enumerate(
        ({"rank": 3}, {"rank": 2, "alpha": 5.0, "scaling": "sqrt"})
    ):
        twin, model = pair(model_name)
        enabled(model, **arguments, **config)
        randomize_adapters(model, seed=i, scale=0.4)
        folders.append(tmp_path / f"peft-{i}")
        natives.append(tmp_path / f"native-{i}")
        kd.to_peft(model, folders[-1])
        kd.save_adapter(model, natives[-1])
    _, rank, options = METHODS[method]
    weights = dict(zip(natives, WEIGHTS, strict=True))
    head = natives[0] if name.startswith("roberta") else None
    combined = kd.combine_adapters(
        weights, rank, method.split("-")[0], head=head, **options
    )
    twin, model = pair(model_name)
    kd.load_adapter(model, combined)
    kd.to_peft(model, tmp_path / "both")
    wanted = combined_by_peft(
        twin, folders, method, model, combined, monkeypatch
    )
    twin, _ = pair(model_name)
    found = peft.PeftModel.from_pretrained(twin, tmp_path / "both")
    exact = method == "concatenate"
    assert_same_updates(found, wanted, 1e-6 if exact else 1e-5)
    assert_same_logits(model, found)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama", method) for method in METHODS),
        ("gpt2", "svd-whole"),
        ("gpt2", "concatenate"),
    ],
)
def test_of_peft_itself(name, method, pair, tmp_path, monkeypatch):
    """Adapters that PEFT trained, by `model`.

    GPT-2's query, key and value are one layer there, and three here: the sum is
    the same, but not what is random, largest or closest of a layer.
    """
    target = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    folders = tmp_path / "a", tmp_path / "b"
    for folder, config in zip(
        folders, ({"r": 3}, {"r": 2, "use_rslora": True}), strict=True
    ):
        twin, model = pair(name)
        trained_by_peft(twin, folder, target_modules=target, **config)
    combination, rank, options = METHODS[method]
    weights = dict(zip(folders, WEIGHTS, strict=True))
    combined = kd.combine_adapters(
        weights, rank, method.split("-")[0], model=model, **options
    )
    kd.load_adapter(model, combined)
    twin, _ = pair(name)
    wanted = combined_by_peft(
        twin, folders, method, model, combined, monkeypatch
    )
    assert_same_logits(model, wanted)
    kd.to_peft(model, tmp_path / "both")
    twin, _ = pair(name)
    found = peft.PeftModel.from_pretrained(twin, tmp_path / "both")
    exact = combination == "cat"
    assert_same_updates(found, wanted, 1e-6 if exact else 1e-5)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_heads_that_peft_keeps(name, pair, tmp_path):
    """A PEFT folder beside the name of an adapter of the model."""
    _, model = pair(name)
    enabled(model)
    kd.to_peft(model, tmp_path / "other")
    both = {tmp_path / "other": 0.5, "default": 0.5}
    combined = kd.combine_adapters(both, model=model)
    again = pair(name)[1]
    kd.load_adapter(again, combined)
    adapted = peft.PeftModel.from_pretrained(pair(name)[0], tmp_path / "other")
    assert_same_logits(again, adapted)

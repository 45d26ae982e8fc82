"""PEFT computes the same with adapters of ours."""

import copy
import functools
import warnings

import huggingface_hub
import keras
import numpy as np
import peft
import pytest
import torch

import keras_dylora as kd
from keras_dylora.adapters import from_peft, to_peft
from keras_dylora.adapters.peft import files as peft_files
from keras_dylora.layers.factors import Factors
from tests import backend
from tests.models import (
    allocation,
    randomize_adapters,
    roberta_classifier,
    with_tuned_cuts,
)
from tests.peft.twins import (
    MODELS,
    TARGETS,
    adapter_config,
    adapter_tensors,
    assert_same_adapters,
    assert_same_logits,
    enabled,
    keras_logits,
)

pytestmark = pytest.mark.families


@pytest.fixture(scope="session")
def adapted_pair(pair):
    """A pair with random adapters and a changed head, and the logits before.

    Made once; tests may change the rank only.
    """

    @functools.cache
    def make(name, targets):
        twin, model = pair(name)
        assert_same_logits(model, twin)
        base = keras_logits(model)
        enabled(model, target_layers=TARGETS[targets])
        if hasattr(model, "num_classes"):
            logits = model.get_layer("logits")
            logits.set_weights([1.5 * w for w in logits.get_weights()])
        return twin, model, base

    return make


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same(name, targets, rank, adapted_pair, tmp_path):
    twin, model, base = adapted_pair(name, targets)
    to_peft(model, tmp_path / "adapter", rank=rank)
    model.set_rank(rank)
    assert np.abs(keras_logits(model) - base).max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(
            copy.deepcopy(twin), tmp_path / "adapter"
        )
    assert_same_logits(model, adapted)


def test_gpt2_blocks(pair, tmp_path):
    _, model = pair("gpt2")
    enabled(model)
    to_peft(model, tmp_path / "adapter", rank=2)
    config = adapter_config(tmp_path / "adapter")
    assert config["target_modules"] == ["c_attn"]
    assert (config["r"], config["lora_alpha"]) == (4, 14)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    up = adapter_tensors(tmp_path / "adapter")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    ]
    query, value = model.dylora_layers[:2]
    expected = np.zeros((48, 4), "float32")
    expected[:16, :2] = backend.to_numpy(query.up)[:2].T
    expected[32:, 2:] = backend.to_numpy(value.up)[:2].T
    np.testing.assert_array_equal(up, expected)


MIXED = [
    "transformer_layer_0/self_attention/query",
    "transformer_layer_1/self_attention/(query|key|value|attention_output)",
]


def test_gpt2_layers_with_other_numbers_of_adapters(pair, tmp_path):
    twin, model = pair("gpt2")
    enabled(model, target_layers=MIXED)
    to_peft(model, tmp_path / "adapter")
    config = adapter_config(tmp_path / "adapter")
    module = "transformer.h.1.attn.c_attn"
    assert (config["r"], config["lora_alpha"]) == (3, 7)
    assert config["rank_pattern"] == {module: 9}
    assert config["alpha_pattern"] == {module: 21}
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    assert_same_logits(model, adapted)
    _, again = pair("gpt2")
    from_peft(again, tmp_path / "adapter")
    assert_same_adapters(model, again, 3)


SHORT_NAMES = {
    "query-value": (None, ["query", "value"]),
    "one-layer": (
        ["transformer_layer_0/self_attention_layer/query"],
        ["roberta.encoder.layer.0.attention.self.query"],
    ),
    "ambiguous": (
        ["feedforward_output_dense"],
        [f"roberta.encoder.layer.{i}.output.dense" for i in range(2)],
    ),
}


@pytest.mark.parametrize("case", SHORT_NAMES)
def test_target_modules_are_short_where_they_can(case, tmp_path):
    targets, expected = SHORT_NAMES[case]
    to_peft(enabled(roberta_classifier(), target_layers=targets), tmp_path)
    assert adapter_config(tmp_path)["target_modules"] == expected


@pytest.mark.parametrize(
    ("scaling", "alpha", "rslora"),
    [("sqrt", 7, True), ("constant", 14 / 3, False)],
)
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_other_scalings(scaling, alpha, rslora, name, pair, tmp_path):
    twin, model = pair(name)
    enabled(model, alpha=7.0, scaling=scaling)
    to_peft(model, tmp_path, rank=2)
    config = adapter_config(tmp_path)
    assert config["use_rslora"] == rslora
    if name == "roberta":
        assert config["lora_alpha"] == pytest.approx(alpha)
    model.set_rank(2)
    assert_same_logits(model, peft.PeftModel.from_pretrained(twin, tmp_path))
    expected = keras_logits(model)
    kd.disable_dylora(model)
    from_peft(model, tmp_path)
    np.testing.assert_allclose(keras_logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("alpha", [16, 0.3])
def test_scale_is_alpha_over_rank(alpha, rank, tmp_path):
    model = enabled(roberta_classifier(), alpha=alpha)
    to_peft(model, tmp_path, rank=rank)
    config = adapter_config(tmp_path)
    assert config["r"] == rank
    assert config["lora_alpha"] / config["r"] == alpha / rank


def test_a_model_that_was_saved_by_keras(tmp_path):
    model = enabled(roberta_classifier())
    to_peft(model, tmp_path / "adapter")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    to_peft(again, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()


# GPT-2's first three layers of a block are one in transformers.
PEFT_RANKS = {
    "rank": [2, 1, 0, 3, 0, 2, 0, 0, 0, 1, 3],
    "sqrt": [0, 1, 2, 0, 1, 3, 1, 1, 1, 0, 0],
    "constant": [3, 3, 1, 2, 1, 0, 0, 2, 0, 3, 1],
}


@pytest.mark.parametrize(
    ("name", "scaling", "layout"),
    [
        ("roberta", "rank", "peft"),
        ("roberta", "sqrt", "server"),
        ("gpt2", "rank", "peft"),
        ("gpt2", "sqrt", "peft"),
        ("gpt2", "constant", "peft"),
        ("gpt2", "rank", "server"),
    ],
)
def test_a_rank_for_each_layer(name, scaling, layout, pair, tmp_path):
    twin, model = pair(name)
    kd.enable_dylora(
        model,
        rank=3,
        alpha=7.0,
        scaling=scaling,
        target_layers="all-linear",
        verbose=0,
    )
    randomize_adapters(model)
    chosen = allocation(model, PEFT_RANKS[scaling])
    kd.to_peft(model, tmp_path / "adapter", rank=chosen, layout=layout)
    model.set_rank(chosen)
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(twin), tmp_path / "adapter"
    )
    assert_same_logits(model, adapted)
    config = adapter_config(tmp_path / "adapter")
    if layout == "server":
        assert config["r"] == config["lora_alpha"]
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        assert not config["use_rslora"]
        sizes = {
            k: v.shape for k, v in adapter_tensors(tmp_path / "adapter").items()
        }
        assert {s[0] for k, s in sizes.items() if "lora_A" in k} == {
            config["r"]
        }
        assert {s[1] for k, s in sizes.items() if "lora_B" in k} == {
            config["r"]
        }
    else:
        assert config["rank_pattern"]
    _, again = pair(name)
    kd.from_peft(again, tmp_path / "adapter")
    assert_same_logits(again, adapted)
    if layout == "peft":
        assert again.rank.ranks == chosen.ranks


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_tuned_cuts(name, pair, tmp_path):
    twin, model = pair(name)
    enabled(model)
    with_tuned_cuts(model, 1, 2)
    for b in (1, 2, 3):
        to_peft(model, tmp_path / f"{b}", rank=b)
        config = adapter_config(tmp_path / f"{b}")
        assert config["r"] == b * (2 if name == "gpt2" else 1)
        model.set_rank(b)
        adapted = peft.PeftModel.from_pretrained(twin, tmp_path / f"{b}")
        assert_same_logits(model, adapted)
        twin = adapted.unload()
    tuned = keras_logits(model)
    small = allocation(model, [2, 1])
    with_tuned_cuts(model, small)
    to_peft(model, tmp_path / "small", rank=small)
    model.set_rank(small)
    assert np.abs(keras_logits(model) - tuned).max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "small")
    assert_same_logits(model, adapted)


def test_a_folder_for_each_rank(pair, tmp_path):
    twin, model = pair("gpt2")
    enabled(model)
    folder = tmp_path / "adapters"
    to_peft(model, folder, rank=2)
    to_peft(model, folder, ranks=[1, 3])  # in its place
    assert sorted(x.name for x in folder.iterdir()) == ["rank_1", "rank_3"]
    to_peft(model, folder, ranks=[3, 2])
    assert sorted(x.name for x in folder.iterdir()) == ["rank_2", "rank_3"]
    for b in (2, 3):
        model.set_rank(b)
        adapted = peft.PeftModel.from_pretrained(
            copy.deepcopy(twin), folder / f"rank_{b}"
        )
        assert_same_logits(model, adapted)
    (folder / "rank_2" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds 'rank_2/notes.txt'"):
        to_peft(model, folder, ranks=[1])


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float16", 2e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("layout", ["peft", "server"])
def test_half_precision(dtype, atol, layout, pair, tmp_path):
    twin, model = pair("llama")
    enabled(model)
    to_peft(model, tmp_path / "adapter", dtype=dtype, layout=layout)
    found = {x.dtype for x in adapter_tensors(tmp_path / "adapter").values()}
    assert found == {getattr(torch, dtype)}
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    assert_same_logits(model, adapted, atol)
    _, again = pair("llama")
    assert_same_logits(from_peft(again, tmp_path / "adapter"), twin, atol)


def test_the_base_is_found(twins, pair, tmp_path):
    twin, model = pair("gpt2")
    enabled(model)
    _, base = twins("gpt2")
    to_peft(model, tmp_path, base_model_name_or_path=str(base))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(model, adapted)


def test_a_server_may_take_few_ranks(pair, tmp_path):
    twin, model = pair("roberta")
    enabled(model)
    to_peft(model, tmp_path, rank=2, layout="server", server_rank=8)
    assert adapter_config(tmp_path)["r"] == 8
    model.set_rank(2)
    assert_same_logits(model, peft.PeftModel.from_pretrained(twin, tmp_path))
    with pytest.raises(ValueError, match="`server_rank` must be at least 3"):
        to_peft(model, tmp_path, layout="server", server_rank=2)
    with pytest.raises(ValueError, match="needs `layout='server'`"):
        to_peft(model, tmp_path, server_rank=8)


def test_model_card(pair, tmp_path):
    _, model = pair("roberta")
    enabled(model).compile(loss="mse", metrics=["mae"])
    x = {"token_ids": np.ones((2, 4)), "padding_mask": np.ones((2, 4))}
    report = kd.evaluate_ranks(model, x, np.ones((2, 3)), verbose=0)
    to_peft(
        model,
        tmp_path,
        ranks=[1, 3],
        base_model_name_or_path="some/base",
        report=report,
    )
    for b in (1, 3):
        card = huggingface_hub.ModelCard.load(tmp_path / f"rank_{b}/README.md")
        assert card.data.base_model == "some/base"
        assert card.data.library_name == "peft"
        value = f"{report.metrics[b]['mae']:.4f}"
        row = next(x for x in card.text.splitlines() if f"| **{b}** |" in x)
        assert value in row
        assert "AutoPeftModelForSequenceClassification" in card.text
    to_peft(model, tmp_path, rank=2)  # in its place
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds 'README.md'"):
        to_peft(model, tmp_path)


def test_model_card_of_a_lora(pair, tmp_path):
    _, model = pair("roberta")
    enabled(model, min_rank=3)
    to_peft(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base model, from a LoRA of rank 3, " in card


@pytest.mark.parametrize("alpha", [16 / 3, 0.1, 7, 1e-3])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lora_alpha_gives_the_scale_exactly(alpha, rank):
    down = np.zeros((2, rank), "float32")
    factors = Factors(down, down.T, alpha / rank)
    assert peft_files._lora_alpha(factors) / rank == alpha / rank

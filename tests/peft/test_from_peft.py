"""PEFT adapters: the real peft on the real transformers, both ways."""

import copy
import functools
import json
import shutil
import warnings

import huggingface_hub
import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import keras_dylora as kd
from keras_dylora.adapters import from_peft, peft_files, to_peft
from keras_dylora.geometry import Factors
from tests import backend
from tests.models import (
    VOCABULARY,
    allocation,
    gpt2,
    mlp,
    randomize_adapters,
    roberta_backbone,
    roberta_classifier,
)

pytestmark = pytest.mark.families
HUB = keras_hub.models
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
ROBERTA = transformers.RobertaConfig(
    **ENCODER, max_position_embeddings=14, layer_norm_eps=1e-5
)
BERT = transformers.BertConfig(
    **ENCODER, max_position_embeddings=12, hidden_act="gelu_pytorch_tanh"
)
GPT2 = transformers.GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=12,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def llama2(backbone):
    """A Llama 2 with the weights of a Llama 3, all that KerasHub converts."""
    config = backbone.get_config()
    names = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
    )
    older = HUB.LlamaBackbone(**{name: config[name] for name in names})
    older.set_weights(backbone.get_weights())
    return older


def with_head(model, twin, pairs):
    for layer, module in pairs.items():
        linear = twin.get_submodule(module)
        model.get_layer(layer).set_weights(
            [linear.weight.detach().numpy().T, linear.bias.detach().numpy()]
        )
    return model


def roberta(backbone, twin):
    return with_head(
        HUB.RobertaTextClassifier(backbone, num_classes=3),
        twin,
        {"pooled_dense": "classifier.dense", "logits": "classifier.out_proj"},
    )


def bert(backbone, twin):
    return with_head(
        HUB.BertTextClassifier(backbone, num_classes=3, dropout=0.0),
        twin,
        {"logits": "classifier"},
    )


# transformers config and class; KerasHub backbone; how to make the model.
MODELS = {
    "roberta": (
        ROBERTA,
        transformers.RobertaForSequenceClassification,
        HUB.RobertaBackbone,
        roberta,
    ),
    "bert": (
        BERT,
        transformers.BertForSequenceClassification,
        HUB.BertBackbone,
        bert,
    ),
    "bert-backbone": (
        BERT,
        transformers.BertModel,
        HUB.BertBackbone,
        lambda backbone, twin: backbone,
    ),
    "gpt2": (
        GPT2,
        transformers.GPT2LMHeadModel,
        HUB.GPT2Backbone,
        lambda backbone, twin: HUB.GPT2CausalLM(backbone),
    ),
    "llama": (
        LLAMA,
        transformers.LlamaForCausalLM,
        HUB.Llama3Backbone,
        lambda backbone, twin: HUB.LlamaCausalLM(llama2(backbone)),
    ),
    "llama3": (
        LLAMA,
        transformers.LlamaForCausalLM,
        HUB.Llama3Backbone,
        lambda backbone, twin: HUB.Llama3CausalLM(backbone),
    ),
}


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Transformers models by name, each with a folder that holds it."""
    made = {}

    def get(name):
        if name not in made:
            config, twin_class, _, _ = MODELS[name]
            torch.manual_seed(0)
            twin = twin_class(config).eval()
            for parameter in twin.parameters():  # so that biases count too
                parameter.data += 0.1 * torch.randn_like(parameter)
            if config is ROBERTA:  # zeros in the published weights
                twin.roberta.embeddings.token_type_embeddings.weight.data[:] = 0
            folder = tmp_path_factory.mktemp(name)
            twin.save_pretrained(folder)
            made[name] = twin, folder
        twin, folder = made[name]
        return copy.deepcopy(twin), folder

    return get


@pytest.fixture(scope="session")
def pair(twins):
    """A function that gives a transformers model and its Keras twin."""

    def make(name):
        twin, folder = twins(name)
        _, _, backbone_class, build = MODELS[name]
        return twin, build(backbone_class.from_preset(str(folder)), twin)

    return make


def tokens():
    rng = np.random.default_rng(0)
    mask = np.arange(8) < np.array([[8], [5], [3]])
    # 1 is RoBERTa's padding, from which transformers takes the positions.
    ids = np.where(mask, rng.integers(2, VOCABULARY, mask.shape), 1)
    return ids, mask


def keras_logits(model):
    ids, mask = tokens()
    inputs = {"token_ids": ids, "padding_mask": mask.astype("int32")}
    if "segment_ids" in model.input:
        inputs["segment_ids"] = np.zeros_like(ids)
    outputs = model(inputs)
    if isinstance(outputs, dict):
        outputs = outputs["pooled_output"]
    return _valid(backend.to_numpy(outputs))


def twin_logits(twin):
    ids, mask = (torch.tensor(x) for x in tokens())
    with torch.no_grad():
        outputs = twin(input_ids=ids, attention_mask=mask.long())
    logits = getattr(outputs, "logits", None)
    logits = outputs.pooler_output if logits is None else logits
    return _valid(logits.numpy())


def _valid(logits):
    return logits[tokens()[1]] if logits.ndim == 3 else logits


def assert_same_logits(model, twin, atol=1e-4):
    found, expected = keras_logits(model), twin_logits(twin)
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def enabled(model, **arguments):
    arguments = {"rank": 3, "alpha": 7.0, **arguments}
    kd.enable_dylora(model, **arguments)
    return randomize_adapters(model)


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def adapter_tensors(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


# From Keras to PEFT

TARGETS = {"query-value": None, "all-linear": "all-linear"}


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


# From PEFT to Keras


def bare(name, pair):
    """The base model in transformers of a task, and our backbone."""
    twin, model = pair(name)
    return twin.base_model, model.backbone


def hidden(model):
    ids, mask = tokens()
    outputs = model({"token_ids": ids, "padding_mask": mask.astype("int32")})
    return _valid(backend.to_numpy(outputs))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_a_bare_model_and_a_task_exchange_adapters(name, pair, tmp_path):
    twin, backbone = bare(name, pair)
    enabled(backbone)
    to_peft(backbone, tmp_path / "bare")
    expected = hidden(backbone)
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "bare")
    ids, mask = (torch.tensor(x) for x in tokens())
    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask.long())[0]
    np.testing.assert_allclose(_valid(found.numpy()), expected, atol=1e-4)
    _, task = pair(name)
    from_peft(task, tmp_path / "bare")
    np.testing.assert_allclose(hidden(task.backbone), expected, atol=1e-5)
    # And back, with or without our own file beside it.
    to_peft(task, tmp_path / "task")
    for plain in (False, True):
        _, again = bare(name, pair)
        if plain:
            (tmp_path / "task/keras_dylora.json").unlink()
        if name == "roberta":
            with pytest.raises(ValueError, match="extra: .*classifier"):
                from_peft(again, tmp_path / "task")
        from_peft(again, tmp_path / "task", head=False)
        np.testing.assert_allclose(hidden(again), expected, atol=1e-4)


def test_a_bare_model_of_another_base(pair, tmp_path):
    _, backbone = bare("roberta", pair)
    to_peft(enabled(backbone), tmp_path)
    _, task = pair("roberta")
    for weight in task.backbone.weights:
        weight.assign(weight + 1.0)
    with pytest.raises(ValueError, match="the base model that it was trained"):
        from_peft(task, tmp_path)
    assert not isinstance(task, kd.DyLoRAModel)
    from_peft(task, tmp_path, strict=False)


def test_a_head_of_other_classes_stays(pair, tmp_path):
    twin, model = pair("roberta")
    enabled(model)
    to_peft(model, tmp_path)
    other = HUB.RobertaTextClassifier(
        pair("roberta")[1].backbone, num_classes=5
    )
    head = backend.to_numpy(other.get_layer("logits").kernel)
    with pytest.raises(ValueError, match="mis-shaped"):
        from_peft(other, tmp_path)
    from_peft(other, tmp_path, strict=False, head=False)
    np.testing.assert_array_equal(other.get_layer("logits").kernel, head)
    assert_same_adapters(model, other, 3)


def test_several_by_name(pair, tmp_path):
    twin, model = pair("roberta")
    for seed, name in enumerate(("german", "french")):
        trained_by_peft(
            copy.deepcopy(twin),
            tmp_path / name,
            r=4 - seed,
            lora_alpha=6 + seed,
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
        )
        from_peft(model, tmp_path / name, name=name)
    assert model.adapter_names == ["german", "french"]
    adapted = peft.PeftModel.from_pretrained(
        twin, tmp_path / "german", "german"
    )
    adapted.load_adapter(tmp_path / "french", "french")
    for name, rank in (("german", 4), ("french", 3)):
        model.set_adapter(name)
        adapted.set_adapter(name)
        assert model.rank == rank
        assert_same_logits(model, adapted)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embeddings_of_added_tokens(name, pair, tmp_path):
    twin, model = pair(name)
    _, older = pair(name)
    module = {"gpt2": "c_attn", "llama": "q_proj"}[name]
    adapted = peft.get_peft_model(
        copy.deepcopy(twin),
        peft.LoraConfig(
            target_modules=[module],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            fan_in_fan_out=name == "gpt2",
        ),
    )
    inner = adapted.base_model.model
    for embedding in (inner.get_input_embeddings(), inner.lm_head):
        embedding.weight.data[-5:] += 1.0
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    from_peft(model, tmp_path)
    ids = {"token_ids": tokens()[0] * 0 + VOCABULARY - 2}
    ids["padding_mask"] = np.ones_like(ids["token_ids"])
    with torch.no_grad():
        wanted = adapted(input_ids=torch.tensor(ids["token_ids"])).logits
    np.testing.assert_allclose(
        backend.to_numpy(model(ids)), wanted.numpy(), atol=1e-4
    )
    # They stay with the adapter.
    kd.save_adapter(model, tmp_path / "ours")
    kd.load_adapter(older, tmp_path / "ours")
    np.testing.assert_allclose(
        backend.to_numpy(older(ids)), wanted.numpy(), atol=1e-4
    )


def test_embeddings_of_another_vocabulary(pair, tmp_path):
    twin, model = pair("gpt2")
    twin.resize_token_embeddings(VOCABULARY + 3)
    adapted = peft.get_peft_model(
        twin, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="the vocabulary of the model"):
        from_peft(model, tmp_path)


def test_another_rank(pair, tmp_path):
    """An adapter is cut for a model of a lower rank, and padded if named."""
    twin, model = pair("roberta")
    trained_by_peft(
        copy.deepcopy(twin),
        tmp_path,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    _, whole = pair("roberta")
    from_peft(whole, tmp_path).set_rank(2)
    enabled(model, rank=3, scaling="constant")
    with pytest.raises(ValueError, match="at most the rank.*rank 4"):
        from_peft(model, tmp_path, name="cut")
    from_peft(model, tmp_path, name="cut", rank=2)
    assert model.rank == 2
    np.testing.assert_allclose(
        keras_logits(model), keras_logits(whole), atol=1e-5
    )


def test_a_pickled_adapter_is_refused(pair, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"code")
    with pytest.raises(ValueError, match="runs code.*save_pretrained"):
        from_peft(pair("roberta")[1], tmp_path)


def assert_same_adapters(model, again, rank):
    assert len(again.dylora_layers) == len(model.dylora_layers)
    for a, b in zip(model.dylora_layers, again.dylora_layers, strict=True):
        assert a.path == b.path
        down, up = backend.to_numpy(a.down), backend.to_numpy(a.up)
        np.testing.assert_array_equal(backend.to_numpy(b.down), down[:, :rank])
        np.testing.assert_array_equal(backend.to_numpy(b.up), up[:rank])


@pytest.mark.parametrize(
    ("targets", "rank"), [("query-value", 2), ("all-linear", 3)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name, targets, rank, pair, tmp_path):
    _, model = pair(name)
    options = {"min_rank": 2, "frozen": True, "dropout": 0.1}
    enabled(model, target_layers=TARGETS[targets], **options)
    to_peft(model, tmp_path / "adapter", rank=rank)
    _, again = pair(name)
    head = again.get_layer("logits") if hasattr(again, "num_classes") else None
    if head is not None:
        head.set_weights([0 * w for w in head.get_weights()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert from_peft(again, tmp_path / "adapter") is again
    config = again.dylora_config
    assert (config.rank, config.min_rank, config.alpha) == (rank, 2, 7.0)
    assert (config.frozen, config.dropout) == (True, 0.1)
    assert_same_adapters(model, again, rank)
    model.set_rank(rank)
    np.testing.assert_allclose(
        keras_logits(again), keras_logits(model), atol=1e-5
    )


def trained_by_peft(twin, folder, dtype=torch.float32, **config):
    """Saves an adapter that PEFT trained for a few steps."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        twin, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    )
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=0.05
    )
    ids, mask = (torch.tensor(x) for x in tokens())
    for _ in range(3):
        logits = adapted(input_ids=ids, attention_mask=mask.long()).logits
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.to(dtype).save_pretrained(folder)


LLAMA_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
TRAINED = {
    "roberta": ("roberta", {"target_modules": ["query", "value"]}),
    "roberta-rslora": (
        "roberta",
        {"target_modules": "all-linear", "use_rslora": True},
    ),
    "roberta-patterns": (
        "roberta",
        {
            "target_modules": ["query", "key", "output.dense"],
            "rank_pattern": {"query": 2, r"layer\.1\..*key": 5},
            "alpha_pattern": {"attention.output.dense": 3},
        },
    ),
    "bert-float16": (
        "bert",
        {"target_modules": ["query", "dense"], "dtype": torch.float16},
    ),
    "gpt2-bfloat16": (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
            "dtype": torch.bfloat16,
        },
    ),
    "llama-one-layer": (
        "llama",
        {
            "target_modules": LLAMA_TARGETS.split(),
            "layers_to_transform": [1],
        },
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_adapters_that_peft_trained(case, pair, tmp_path):
    name, config = TRAINED[case]
    classifies = name in ("roberta", "bert")
    task = "SEQ_CLS" if classifies else "CAUSAL_LM"
    twin, model = pair(name)
    trained_by_peft(copy.deepcopy(twin), tmp_path, task_type=task, **config)
    base = keras_logits(model)
    from_peft(model, tmp_path)
    rank = 5 if case == "roberta-patterns" else 4
    assert model.dylora_config.rank == model.dylora_config.min_rank == rank
    adapted = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert np.abs(twin_logits(adapted) - base).max() > 1e-2
    assert_same_logits(model, adapted)
    # It can be cut: its first columns are the best of a lower rank.
    assert model.dylora_config.scaling == "constant"
    for layer in model.dylora_layers:
        singular = np.linalg.svd(
            layer.factors().product().astype("float64"), compute_uv=False
        )
        rest = layer.factors().product() - layer.factors(2).product()
        np.testing.assert_allclose(
            np.linalg.norm(rest, 2), singular[2], atol=1e-6
        )


def test_adapter_without_a_head(pair, tmp_path):
    twin, model = pair("roberta")
    config = {"target_modules": ["query"]}
    trained_by_peft(copy.deepcopy(twin), tmp_path, **config)
    from_peft(model, tmp_path)
    assert_same_logits(model, peft.PeftModel.from_pretrained(twin, tmp_path))


def test_an_enabled_model_keeps_its_alpha(tmp_path):
    source = enabled(roberta_classifier(), alpha=7.0)
    to_peft(source, tmp_path)
    model = kd.enable_dylora(roberta_classifier(), rank=3, alpha=2.0)
    from_peft(model, tmp_path, strict=False)
    assert model.dylora_config.alpha == 2.0
    for a, b in zip(source.dylora_layers, model.dylora_layers, strict=True):
        np.testing.assert_allclose(
            a.delta_kernel(2), b.delta_kernel(2), rtol=1e-5
        )


@pytest.mark.parametrize("trainable_layers", [(), "logits"], ids=str)
def test_a_head_that_is_not_trained_is_saved(trainable_layers, tmp_path):
    model = enabled(roberta_classifier(), trainable_layers=trainable_layers)
    to_peft(model, tmp_path)
    again = from_peft(roberta_classifier(), tmp_path, strict=False)
    for name in ("pooled_dense", "logits"):
        for a, b in zip(
            model.get_layer(name).weights,
            again.get_layer(name).weights,
            strict=True,
        ):
            np.testing.assert_array_equal(
                backend.to_numpy(a), backend.to_numpy(b)
            )


@pytest.mark.parametrize("alpha", [16 / 3, 0.1, 7, 1e-3])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lora_alpha_gives_the_scale_exactly(alpha, rank):
    down = np.zeros((2, rank), "float32")
    factors = Factors(down, down.T, alpha / rank)
    assert peft_files._lora_alpha(factors) / rank == alpha / rank


# What is refused


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


NOT_SAVED = {
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

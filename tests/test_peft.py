"""The PEFT format: against PEFT itself on Hugging Face's own models."""

import json
import warnings

import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save_file

import keras_dylora as kd
from keras_dylora.adapter import adapters_by_path
from keras_dylora.interop import from_peft
from keras_dylora.interop import to_peft
from tests.backend import to_numpy
from tests.models import VOCABULARY
from tests.models import mlp
from tests.models import randomize_adapters
from tests.models import tokens

RANK = 3
LENGTH = 8
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
    "initializer_range": 0.3,
}


def _roberta():
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **ENCODER,
            max_position_embeddings=LENGTH + 2,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    )


def _bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**ENCODER, max_position_embeddings=LENGTH)
    )


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=LENGTH,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **ENCODER, num_key_value_heads=1, tie_word_embeddings=False
        )
    )


# Hugging Face's model, KerasHub's backbone and task, and the layers of the
# head by Hugging Face's name.
ARCHITECTURES = {
    "roberta": (
        _roberta,
        "RobertaBackbone",
        "RobertaTextClassifier",
        {"classifier.dense": "pooled_dense", "classifier.out_proj": "logits"},
    ),
    "bert": (
        _bert,
        "BertBackbone",
        "BertTextClassifier",
        {"classifier": "logits"},
    ),
    "gpt2": (_gpt2, "GPT2Backbone", "GPT2CausalLM", {}),
    "llama": (_llama, "Llama3Backbone", "LlamaCausalLM", {}),
    "llama3": (_llama, "Llama3Backbone", "Llama3CausalLM", {}),
}
TARGETS = {
    "query_value": None,
    "all_linear": "all-linear",
    "one_block": [r"transformer_layer_1/.*(query|key|output.*)"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories with the base checkpoint of every architecture."""
    directories = {}
    for name, (make, *_) in ARCHITECTURES.items():
        torch.manual_seed(0)
        directories[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(directories[name])
    return directories


def reference(name, bases):
    return type(ARCHITECTURES[name][0]()).from_pretrained(bases[name])


def keras_model(name, bases):
    """The KerasHub task with the weights of Hugging Face's model."""
    _, backbone, task, head = ARCHITECTURES[name]
    backbone = getattr(keras_hub.models, backbone).from_preset(str(bases[name]))
    options = {"num_classes": 3} if head else {}
    model = getattr(keras_hub.models, task)(
        backbone, preprocessor=None, **options
    )
    modules = dict(reference(name, bases).named_modules())
    for module, layer in head.items():
        layer = model.get_layer(layer)
        layer.kernel.assign(modules[module].weight.detach().numpy().T)
        layer.bias.assign(modules[module].bias.detach().numpy())
    return model


def enabled(name, bases, targets="all-linear", seed=1, **kwargs):
    """An enabled model with random adapters and a random head."""
    model = keras_model(name, bases)
    kd.enable_dylora(model, rank=RANK, alpha=5, target_layers=targets, **kwargs)
    randomize_adapters(model, seed)
    rng = np.random.default_rng(seed)
    for path in ARCHITECTURES[name][3].values():
        for weight in model.get_layer(path).weights:
            weight.assign(rng.normal(size=weight.shape) * 0.3)
    return model


def keras_logits(name, model):
    x = tokens(size=4, length=LENGTH)
    if name == "bert":
        x["segment_ids"] = np.zeros_like(x["token_ids"])
    return model.predict(x, verbose=0)


def reference_logits(model):
    x = tokens(size=4, length=LENGTH)
    with torch.no_grad():
        return (
            model.eval()(
                input_ids=torch.tensor(x["token_ids"]).long(),
                attention_mask=torch.tensor(x["padding_mask"]).long(),
            )
            .logits.detach()
            .numpy()
        )


def difference(found, expected):
    """The largest difference where tokens aren't padded."""
    error = np.abs(found - expected)
    if error.ndim == 3:
        error = error[tokens(size=4, length=LENGTH)["padding_mask"]]
    return error.max()


def arrays(model):
    """Adapters and head by path."""
    found = {}
    for path, layer in adapters_by_path(model).items():
        found[f"{path}/down"] = to_numpy(layer.down)
        found[f"{path}/up"] = to_numpy(layer.up)
    for i, weight in enumerate(model.trainable_variables):
        found[f"trainable {i} {weight.name}"] = to_numpy(weight)
    return found


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], key)


def trained_by_peft(name, bases, directory, **settings):
    """An adapter of random values that PEFT itself wrote."""
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM" if "l" in name[:3] else "SEQ_CLS",
        "fan_in_fan_out": name == "gpt2",
        **settings,
    }
    if name in ("gpt2", "llama", "llama3"):
        settings["task_type"] = "CAUSAL_LM"
    torch.manual_seed(3)
    model = peft.get_peft_model(
        reference(name, bases), peft.LoraConfig(**settings)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("rank", range(1, RANK + 1))
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_computes_the_same_at_every_rank(
    name, targets, rank, bases, models, tmp_path
):
    model = models(name, TARGETS[targets])
    to_peft(model, tmp_path / "adapter", rank=rank)
    loaded = peft.PeftModel.from_pretrained(
        reference(name, bases), tmp_path / "adapter"
    )
    with model.rank_scope(rank):
        found = keras_logits(name, model)
    error = difference(found, reference_logits(loaded))
    print(f"MAXDIFF {name} {targets} {rank} {error:.2e}")
    assert error <= 1e-4
    # The adapter does something.
    base = reference_logits(reference(name, bases))
    assert difference(found, base) > 1e-2


@pytest.fixture(scope="module")
def models(bases):
    """Enabled models, each made once; tests leave them as they are."""
    made = {}

    def get(name, targets="all-linear"):
        key = name, str(targets)
        if key not in made:
            made[key] = enabled(name, bases, targets)
        return made[key]

    return get


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["roberta", "bert", "gpt2", "llama3"])
def test_round_trip_is_bit_equal(name, targets, bases, models, tmp_path):
    model = models(name, TARGETS[targets])
    to_peft(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh = from_peft(keras_model(name, bases), tmp_path / "adapter")
    assert_equal(arrays(fresh), arrays(model))


def test_truncated_round_trip_keeps_the_config(bases, tmp_path):
    model = enabled("gpt2", bases, None, frozen=True, min_rank=2, seed=4)
    to_peft(model, tmp_path / "adapter", rank=2)
    fresh = from_peft(keras_model("gpt2", bases), tmp_path / "adapter")
    config = fresh.dylora_config
    assert (config.rank, config.min_rank, config.frozen) == (2, 2, True)
    assert config.alpha == 5
    expected = adapters_by_path(model)
    for path, layer in adapters_by_path(fresh).items():
        np.testing.assert_array_equal(
            to_numpy(layer.down), to_numpy(expected[path].down)[:, :2]
        )
        np.testing.assert_array_equal(
            to_numpy(layer.up), to_numpy(expected[path].up)[:2]
        )


def test_untrained_adapter_round_trips(bases, tmp_path):
    """Where the up projections are zero, blocks can't be told by values."""
    model = keras_model("gpt2", bases)
    kd.enable_dylora(model, rank=2)
    to_peft(model, tmp_path / "adapter")
    fresh = from_peft(keras_model("gpt2", bases), tmp_path / "adapter")
    assert_equal(arrays(fresh), arrays(model))


@pytest.mark.parametrize("targets", TARGETS)
def test_fused_blocks_are_found_without_the_side_file(
    targets, bases, models, tmp_path
):
    model = models("gpt2", TARGETS[targets])
    to_peft(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "keras_dylora.json").unlink()
    with pytest.warns(UserWarning, match="no order"):
        fresh = from_peft(keras_model("gpt2", bases), tmp_path / "adapter")
    assert_equal(arrays(fresh), arrays(model))


def test_load_into_an_enabled_model(bases, models, tmp_path):
    to_peft(models("bert"), tmp_path / "adapter")
    other = enabled("bert", bases, seed=9)
    assert from_peft(other, tmp_path / "adapter") is other
    assert_equal(arrays(other), arrays(models("bert")))


def test_trained_pooler_is_saved(bases, tmp_path):
    layers = ["pooled_dense", "logits"]
    model = enabled("bert", bases, None, trainable_layers=layers)
    pooler = model.backbone.get_layer("pooled_dense")
    pooler.kernel.assign(-to_numpy(pooler.kernel))
    to_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        reference("bert", bases), tmp_path / "adapter"
    )
    found = keras_logits("bert", model)
    assert difference(found, reference_logits(loaded)) <= 1e-4
    fresh = from_peft(keras_model("bert", bases), tmp_path / "adapter")
    assert_equal(arrays(fresh), arrays(model))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["pooler.dense"], "target_modules": ["query"]},
        {"target_modules": ["c_attn"], "r": 6},
    ],
    ids=["all_linear", "rslora", "pooler", "c_attn"],
)
@pytest.mark.parametrize("name", ["roberta", "bert", "gpt2", "llama3"])
def test_adapter_trained_by_peft(name, settings, bases, tmp_path):
    if "modules_to_save" in settings and name != "bert":
        pytest.skip("only BERT's pooler is part of the base model")
    if settings.get("target_modules") == ["c_attn"] and name != "gpt2":
        pytest.skip("only GPT-2 has a fused projection")
    if name == "bert" and "target_modules" not in settings:
        # PEFT's "all-linear" leaves out the classifier alone.
        settings = {**settings, "target_modules": r".*(query|key|dense)"}
    expected = trained_by_peft(name, bases, tmp_path / "adapter", **settings)
    model = keras_model(name, bases)
    with pytest.warns(UserWarning, match="truncating it isn't meaningful"):
        from_peft(model, tmp_path / "adapter")
    rank = settings.get("r", 4)
    config = model.dylora_config
    assert (config.rank, config.min_rank) == (rank, rank)
    found = keras_logits(name, model)
    error = difference(found, reference_logits(expected))
    print(f"MAXDIFF-FROM {name} {settings} {error:.2e}")
    assert error <= 1e-4


def test_bfloat16_adapter(bases, tmp_path):
    trained_by_peft("gpt2", bases, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {k: v.bfloat16() for k, v in load_file(path).items()}
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="no order"):
        model = from_peft(keras_model("gpt2", bases), tmp_path / "adapter")
    key = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"
    layer = adapters_by_path(model)[
        "transformer_layer_1/feedforward_intermediate_dense"
    ]
    np.testing.assert_array_equal(
        to_numpy(layer.down), tensors[key].float().numpy().T
    )


def edit_config(directory, **settings):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def setting(**settings):
    return lambda directory: edit_config(directory, **settings)


def tensor(edit):
    return lambda directory: edit_tensors(directory, edit)


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def delete(name):
    return lambda directory: (directory / name).unlink()


QUERY = "base_model.model.roberta.encoder.layer.0.attention.self.query"
WEIGHTS = "adapter_model.safetensors"
BAD_FILES = {
    "other_type": (setting(peft_type="LOHA"), "peft_type='LOHA'"),
    "dora": (setting(use_dora=True), "use_dora=True"),
    "bias": (setting(bias="lora_only"), "bias='lora_only'"),
    "lora_bias": (setting(lora_bias=True), "lora_bias=True"),
    "pissa": (setting(init_lora_weights="pissa"), "'pissa'"),
    "no_rank": (setting(r=None), "r=None"),
    "rank_differs": (setting(r=2), "mis-shaped"),
    "negative_alpha": (setting(lora_alpha=-1), "lora_alpha=-1"),
    "dropout_one": (setting(lora_dropout=1), "lora_dropout=1"),
    "bad_pattern": (setting(rank_pattern={"(": 2}), "rank_pattern"),
    "mixed_alpha": (setting(alpha_pattern={"query": 1}), "one scale"),
    "unknown_layer": (
        tensor(lambda x: x.update({f"{QUERY}x.lora_A.weight": x["k"]})),
        "unknown",
    ),
    "missing_tensor": (
        tensor(lambda x: x.pop(f"{QUERY}.lora_B.weight")),
        f"missing: {QUERY}.lora_B.weight",
    ),
    "missing_bias": (
        tensor(lambda x: x.pop("base_model.model.classifier.dense.bias")),
        "missing: base_model.model.classifier.dense.bias",
    ),
    "wrong_shape": (
        tensor(lambda x: x.update({f"{QUERY}.lora_A.weight": torch.ones(4)})),
        r"mis-shaped: .*query.lora_A.weight is \(4,\), must be \(4, 16\)",
    ),
    "no_adapters": (lambda d: save_file({}, d / WEIGHTS), "none of these"),
    "no_weights": (delete(WEIGHTS), f"without {WEIGHTS}"),
    "no_config": (delete("adapter_config.json"), "without adapter_config"),
    "damaged_weights": (write(WEIGHTS, "?"), "must be a safetensors file"),
    "damaged_config": (write("adapter_config.json", "{"), "a JSON file"),
    "config_is_a_list": (write("adapter_config.json", "[]"), "JSON object"),
    "damaged_side_file": (write("keras_dylora.json", "{}"), "`to_peft` wrote"),
    "newer_side_file": (
        write("keras_dylora.json", '{"format_version": 2}'),
        "format_version=2",
    ),
}
BAD_FILES["unknown_layer"] = (
    tensor(lambda x: x.update({f"{QUERY}x.lora_A.weight": torch.ones(1)})),
    f"unknown: {QUERY}x.lora_A.weight",
)


@pytest.fixture(scope="module")
def plain_roberta(bases):
    """Loading into it always fails, so it stays as it is."""
    return keras_model("roberta", bases)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_changes_nothing(case, bases, plain_roberta, tmp_path):
    damage, message = BAD_FILES[case]
    trained_by_peft(
        "roberta", bases, tmp_path, target_modules=["query", "value"]
    )
    damage(tmp_path)
    before = [to_numpy(w) for w in plain_roberta.weights]
    with pytest.raises(ValueError, match=f"(?s){message}.*") as raised:
        from_peft(plain_roberta, tmp_path)
    assert "Received" in str(raised.value)
    assert not isinstance(plain_roberta, kd.DyLoRAModel)
    for weight, value in zip(plain_roberta.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), value)


def test_mixed_ranks_are_refused(bases, plain_roberta, tmp_path):
    trained_by_peft(
        "roberta",
        bases,
        tmp_path,
        target_modules=["query", "value"],
        rank_pattern={"query": 2},
    )
    with pytest.raises(ValueError, match="one rank.*Received"):
        from_peft(plain_roberta, tmp_path)


def test_changed_weights_are_refused(models, plain_roberta, tmp_path):
    to_peft(models("roberta"), tmp_path)
    edit_tensors(tmp_path, lambda x: x[f"{QUERY}.lora_A.weight"].mul_(2))
    with pytest.raises(ValueError, match="SHA-256"):
        from_peft(plain_roberta, tmp_path)


def test_missing_directory(plain_roberta, tmp_path):
    with pytest.raises(ValueError, match="nowhere' without adapter_config"):
        from_peft(plain_roberta, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "rank 2 for a model of rank 3|rank 3 for .* rank 2"),
        ({"alpha": 7}, "alpha 5.* for a model of alpha 7"),
        ({"target_layers": None}, "extra .*key"),
    ],
    ids=["rank", "alpha", "layers"],
)
def test_enabled_model_must_match(options, message, bases, models, tmp_path):
    to_peft(models("roberta"), tmp_path)
    other = keras_model("roberta", bases)
    options = {
        "rank": RANK,
        "alpha": 5,
        "target_layers": "all-linear",
        **options,
    }
    kd.enable_dylora(other, **options)
    before = arrays(other)
    with pytest.raises(ValueError, match=f"Received.*({message})"):
        from_peft(other, tmp_path)
    assert_equal(arrays(other), before)


def test_pooler_must_be_trained_in_an_enabled_model(bases, tmp_path):
    layers = ["pooled_dense", "logits"]
    to_peft(enabled("bert", bases, None, trainable_layers=layers), tmp_path)
    with pytest.raises(ValueError, match=r"Received: \['pooled_dense'\]"):
        from_peft(enabled("bert", bases, None), tmp_path)


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_rank_must_be_in_range(rank, models, tmp_path):
    with pytest.raises(ValueError, match=f"Received.*{rank}"):
        to_peft(models("gpt2"), tmp_path / "adapter", rank=rank)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["logits"], "trainable_layers": ()}, "adapted layer"),
        (
            {"targets": None, "trainable_layers": ["embeddings_layer_norm"]},
            "trained in full .*embeddings_layer_norm",
        ),
        (
            {
                "targets": ["pooled_dense"],
                "trainable_layers": ["pooled_dense"],
            },
            "not both",
        ),
    ],
    ids=["adapted_head", "layer_norm", "both"],
)
def test_layer_without_counterpart(options, message, bases, tmp_path):
    model = enabled("bert", bases, **options)
    with pytest.raises(ValueError, match=f"(?s){message}.*Received|{message}"):
        to_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_unknown_architecture(tmp_path):
    with pytest.raises(ValueError, match="RobertaTextClassifier.*Received"):
        to_peft(mlp(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="RobertaTextClassifier.*Received"):
        from_peft(mlp(), tmp_path)


def test_model_must_be_enabled(plain_roberta, tmp_path):
    with pytest.raises(ValueError, match="enable_dylora"):
        to_peft(plain_roberta, tmp_path / "adapter")


def test_existing_adapter_is_kept_unless_overwritten(models, tmp_path):
    to_peft(models("gpt2"), tmp_path / "adapter", rank=1)
    with pytest.raises(ValueError, match="overwrite=True"):
        to_peft(models("gpt2"), tmp_path / "adapter", overwrite=False)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["rank_pattern"] and config["r"] == 3
    assert config["lora_alpha"] / config["r"] == 5

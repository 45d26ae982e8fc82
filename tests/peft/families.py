"""Families in PEFT's format: real transformers and peft, both directions."""

import copy
import json

import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import keras_dylora as kd
from keras_dylora.adapters.families import layout_of
from keras_dylora.layers import geometry
from keras_dylora.paths import layer_paths, weight_paths
from tests import backend
from tests.models import VOCABULARY, allocation, randomize_adapters
from tests.test_peft import ENCODER, with_head

pytestmark = pytest.mark.families

HUB = keras_hub.models
LENGTH = 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
DECODER = {
    **SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def of(twin, config, **options):
    """A class of transformers with a configuration."""
    return (
        getattr(transformers, twin),
        getattr(transformers, config)(**options),
    )


def classifier(cls, backbone, head):
    """A function that makes a KerasHub classifier with the head of its twin."""

    def build(folder, twin):
        body = getattr(HUB, backbone).from_preset(str(folder))
        model = getattr(HUB, cls)(body, num_classes=3)
        return with_head(model, twin, head)

    return build


def task(cls):
    def build(folder, twin):
        return getattr(HUB, cls).from_preset(str(folder), preprocessor=None)

    return build


def by_hand(cls, backbone, names, **sizes):
    """A function that makes a model that KerasHub converts no checkpoint of.

    `names` is a dict of the names of variables that aren't of linear layers to
    those of transformers, with the number of the block left open; or makes it
    of KerasHub's variables by path.
    """

    def build(folder, twin):
        body = getattr(HUB, backbone)(
            **{
                "num_layers": 2,
                "hidden_dim": 16,
                "intermediate_dim": 24,
                **sizes,
            }
        )
        head = {"num_classes": 3} if cls.endswith("Classifier") else {}
        model = getattr(HUB, cls)(body, **head) if cls != backbone else body
        values = {k: x.detach().numpy() for k, x in twin.named_parameters()}
        layers, layout = layer_paths(model), layout_of(model)
        for module, paths in layout.modules(model).items():
            ours = [layers[path] for path in paths]
            columns = layout.columns(ours)
            for layer, places in zip(ours, columns, strict=True):
                matrix = values[f"{module}.weight"].T[:, places]
                layer.kernel.assign(geometry(layer).kernel(matrix))
                if layer.bias is not None:
                    bias = values[f"{module}.bias"][places]
                    layer.bias.assign(bias.reshape(layer.bias.shape))
        weights = weight_paths(model)
        pairs = names(weights) if callable(names) else names
        for name, theirs in pairs.items():
            for i in range(2) if "{}" in name else [0]:
                weight = weights[name.format(i)]
                value = values[theirs.format(i)]
                if name.endswith(("reverse_embeddings", "/kernel")):
                    value = value.T
                # OPT has two rows before that of the first position.
                weight.assign(value[-weight.shape[0] :])
        return model

    return build


def norms(pairs, keras="gamma beta"):
    """The names of two norms' variables, by those of the norms."""
    theirs = ["weight", "bias"]
    return {
        f"{ours}/{a}": f"{name}.{b}"
        for ours, name in pairs.items()
        for a, b in zip(keras.split(), theirs, strict=False)
    }


LAYER = "transformer_layer_{}"
ENCODER_NORMS = {
    f"{LAYER}/self_attention_layer_norm": (
        "encoder.layer.{}.attention.output.LayerNorm"
    ),
    f"{LAYER}/feedforward_layer_norm": "encoder.layer.{}.output.LayerNorm",
}


def t5_names(weights):
    places = {"encoder": (0, 1), "decoder": (0, 1, 2)}
    theirs = [
        f"{half}.block.{i}.layer.{n}.layer_norm.weight"
        for half, numbers in places.items()
        for i in range(2)
        for n in numbers
    ]
    # Keras numbers them by itself, in this order.
    ours = [path for path in weights if "t5_layer_norm" in path]
    names = dict(zip(ours, theirs, strict=True))
    names["token_embedding/embeddings"] = "shared.weight"
    for half in places:
        names[f"{half}_output_layer_norm/weight"] = (
            f"{half}.final_layer_norm.weight"
        )
        bias = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names[f"transformer_{half}_layer_0/self_attention/embeddings"] = (
            f"{bias}.weight"
        )
    return names


def t5(gated):
    return (
        of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-relu" if gated else "relu",
        ),
        by_hand(
            "T5Seq2SeqLM",
            "T5Backbone",
            t5_names,
            vocabulary_size=VOCABULARY,
            num_heads=2,
            activation="relu",
            use_gated_activation=gated,
            dropout=0.0,
        ),
    )


FAMILIES = {
    "xlm-roberta": (
        of(
            "XLMRobertaForSequenceClassification",
            "XLMRobertaConfig",
            **ENCODER,
            max_position_embeddings=14,
            layer_norm_eps=1e-5,
        ),
        classifier(
            "XLMRobertaTextClassifier",
            "XLMRobertaBackbone",
            {
                "pooled_dense": "classifier.dense",
                "logits": "classifier.out_proj",
            },
        ),
    ),
    "distilbert": (
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
            sinusoidal_pos_embds=False,
        ),
        classifier(
            "DistilBertTextClassifier",
            "DistilBertBackbone",
            {"pooled_dense": "pre_classifier", "logits": "classifier"},
        ),
    ),
    "albert": (
        of(
            "AlbertForSequenceClassification",
            "AlbertConfig",
            **ENCODER,
            embedding_size=8,
            max_position_embeddings=2 * LENGTH,
            hidden_act="gelu_pytorch_tanh",
        ),
        classifier(
            "AlbertTextClassifier", "AlbertBackbone", {"logits": "classifier"}
        ),
    ),
    "mistral": (
        of("MistralForCausalLM", "MistralConfig", **DECODER),
        task("MistralCausalLM"),
    ),
    "mixtral": (
        of(
            "MixtralForCausalLM",
            "MixtralConfig",
            **DECODER,
            num_local_experts=2,
        ),
        task("MixtralCausalLM"),
    ),
    "qwen2": (
        of("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
        task("QwenCausalLM"),
    ),
    "qwen3": (
        of(
            "Qwen3ForCausalLM",
            "Qwen3Config",
            **DECODER,
            head_dim=4,
            rms_norm_eps=1e-5,
        ),
        task("Qwen3CausalLM"),
    ),
    "gemma": (
        of(
            "GemmaForCausalLM",
            "GemmaConfig",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
        ),
        task("GemmaCausalLM"),
    ),
    "gemma2": (
        of(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
            query_pre_attn_scalar=4,
        ),
        task("GemmaCausalLM"),
    ),
    "gemma3": (
        of(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**DECODER, "tie_word_embeddings": True},
            head_dim=4,
            query_pre_attn_scalar=4,
        ),
        task("Gemma3CausalLM"),
    ),
    "smollm3": (
        of(
            "SmolLM3ForCausalLM",
            "SmolLM3Config",
            **{**DECODER, "tie_word_embeddings": True},
        ),
        task("SmolLM3CausalLM"),
    ),
    "phi3": (
        of("Phi3ForCausalLM", "Phi3Config", **DECODER),
        by_hand(
            "Phi3CausalLM",
            "Phi3Backbone",
            {
                "token_embedding/embeddings": "model.embed_tokens.weight",
                "token_embedding/reverse_embeddings": "lm_head.weight",
                **norms(
                    {
                        f"{LAYER}/pre_attention_layernorm": (
                            "model.layers.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "model.layers.{}.post_attention_layernorm"
                        ),
                        "sequence_output_layernorm": "model.norm",
                    },
                    "scale",
                ),
            },
            vocabulary_size=VOCABULARY,
            num_query_heads=4,
            num_key_value_heads=2,
            layer_norm_epsilon=1e-5,
        ),
    ),
    "opt": (
        of(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            word_embed_proj_dim=16,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
        ),
        by_hand(
            "OPTCausalLM",
            "OPTBackbone",
            {
                "embeddings/token_embedding/embeddings": (
                    "model.decoder.embed_tokens.weight"
                ),
                "embeddings/position_embedding/embeddings": (
                    "model.decoder.embed_positions.weight"
                ),
                **norms(
                    {
                        f"{LAYER}/self_attention_layer_norm": (
                            "model.decoder.layers.{}.self_attn_layer_norm"
                        ),
                        f"{LAYER}/feedforward_layer_norm": (
                            "model.decoder.layers.{}.final_layer_norm"
                        ),
                        "layer_norm": "model.decoder.final_layer_norm",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            max_sequence_length=2 * LENGTH,
        ),
    ),
    "bloom": (
        of(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            n_layer=2,
            n_head=2,
        ),
        by_hand(
            "BloomCausalLM",
            "BloomBackbone",
            {
                "token_embedding/embeddings": (
                    "transformer.word_embeddings.weight"
                ),
                **norms(
                    {
                        "embedding_layernorm": (
                            "transformer.word_embeddings_layernorm"
                        ),
                        f"{LAYER}/pre_attention_layernorm": (
                            "transformer.h.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "transformer.h.{}.post_attention_layernorm"
                        ),
                        "final_layernorm": "transformer.ln_f",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            intermediate_dim=64,
        ),
    ),
    "falcon": (
        of(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=24,
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
        ),
        by_hand(
            "FalconCausalLM",
            "FalconBackbone",
            {
                "token_embedding/embeddings": (
                    "transformer.word_embeddings.weight"
                ),
                **norms(
                    {
                        f"{LAYER}/input_layernorm": (
                            "transformer.h.{}.input_layernorm"
                        ),
                        f"{LAYER}/post_attention_layernorm": (
                            "transformer.h.{}.post_attention_layernorm"
                        ),
                        "final_layernorm": "transformer.ln_f",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_attention_heads=2,
        ),
    ),
    "gpt-neox": (
        of(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **SIZES,
            num_attention_heads=2,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True,
            hidden_act="gelu_pytorch_tanh",
        ),
        by_hand(
            "GPTNeoXCausalLM",
            "GPTNeoXBackbone",
            {
                "token_embedding/embeddings": "gpt_neox.embed_in.weight",
                **norms(
                    {
                        f"{LAYER}/self_attention_layer_norm": (
                            "gpt_neox.layers.{}.input_layernorm"
                        ),
                        f"{LAYER}/feedforward_layer_norm": (
                            "gpt_neox.layers.{}.post_attention_layernorm"
                        ),
                        "layer_norm": "gpt_neox.final_layer_norm",
                    }
                ),
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
        ),
    ),
    "electra": (
        of(
            "ElectraModel",
            "ElectraConfig",
            **ENCODER,
            embedding_size=8,
            max_position_embeddings=2 * LENGTH,
            hidden_act="gelu_pytorch_tanh",
        ),
        by_hand(
            "ElectraBackbone",
            "ElectraBackbone",
            {
                "token_embedding/embeddings": (
                    "embeddings.word_embeddings.weight"
                ),
                "position_embedding/embeddings": (
                    "embeddings.position_embeddings.weight"
                ),
                "segment_embedding/embeddings": (
                    "embeddings.token_type_embeddings.weight"
                ),
                **norms(
                    {
                        "embeddings_layer_norm": "embeddings.LayerNorm",
                        **ENCODER_NORMS,
                    }
                ),
            },
            vocab_size=VOCABULARY,
            num_heads=2,
            embedding_dim=8,
            max_sequence_length=2 * LENGTH,
        ),
    ),
    "deberta-v3": (
        of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **ENCODER,
            # KerasHub rounds the last distance otherwise on TensorFlow.
            max_position_embeddings=2 * LENGTH,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            pooler_dropout=0.0,
            pooler_hidden_size=16,
            layer_norm_eps=1e-7,
        ),
        by_hand(
            "DebertaV3TextClassifier",
            "DebertaV3Backbone",
            {
                "token_embedding/embeddings": (
                    "deberta.embeddings.word_embeddings.weight"
                ),
                "rel_embedding/rel_embedding": (
                    "deberta.encoder.rel_embeddings.weight"
                ),
                **norms(
                    {
                        "embeddings_layer_norm": "deberta.embeddings.LayerNorm",
                        "rel_embedding/rel_embeddings_layer_norm": (
                            "deberta.encoder.LayerNorm"
                        ),
                        **{
                            f"disentangled_attention_encoder_{ours[12:]}": (
                                f"deberta.{name}"
                            )
                            for ours, name in ENCODER_NORMS.items()
                        },
                    }
                ),
                "pooled_dense/kernel": "pooler.dense.weight",
                "pooled_dense/bias": "pooler.dense.bias",
                "logits/kernel": "classifier.weight",
                "logits/bias": "classifier.bias",
            },
            vocabulary_size=VOCABULARY,
            num_heads=2,
            max_sequence_length=2 * LENGTH,
            bucket_size=4,
        ),
    ),
    "t5": t5(gated=False),
    "t5-gated": t5(gated=True),
    "bart": (
        of(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=2 * LENGTH,
            dropout=0.0,
        ),
        task("BartSeq2SeqLM"),
    ),
    "vit": (
        of(
            "ViTForImageClassification",
            "ViTConfig",
            **{k: v for k, v in ENCODER.items() if k != "vocab_size"},
            image_size=32,
            patch_size=8,
        ),
        classifier(
            "ViTImageClassifier", "ViTBackbone", {"predictions": "classifier"}
        ),
    ),
}


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
        if hasattr(model.config, "patch_size"):
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
            update = up.float() @ down.float() * config["lora_alpha"]
            module.weight.data += update / config["r"]
        elif not name.endswith(".lora_B.weight"):  # of the head
            module, _, parameter = name.rpartition(".")
            getattr(modules[module], parameter).data[:] = down.float()
    return twin


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        ("float32", 1e-3),
        pytest.param("bfloat16", 2e-2, marks=pytest.mark.long),
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
        np.testing.assert_allclose(found, expected, atol=atol)


def test_from_peft_to_keras(pair, tmp_path):
    twin, model = pair()
    linear = sorted(layout_of(model).modules(model))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=linear, init_lora_weights=False
    )
    torch.manual_seed(1)
    adapted = peft.get_peft_model(twin, config)
    adapted.save_pretrained(tmp_path / "adapter")
    kd.from_peft(model, tmp_path / "adapter")
    assert_same(model, adapted)

"""Transformers models and their Keras twins, and what both compute."""

import json

import keras_hub
import numpy as np
import peft
import safetensors.torch
import torch
import transformers

import keras_dylora as kd
from tests import backend
from tests.models import VOCABULARY, randomize_adapters

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
    if "position_ids" in model.input:
        inputs["position_ids"] = np.broadcast_to(np.arange(8), ids.shape)
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


TARGETS = {"query-value": None, "all-linear": "all-linear"}


def assert_same_adapters(model, again, rank):
    assert len(again.dylora_layers) == len(model.dylora_layers)
    for a, b in zip(model.dylora_layers, again.dylora_layers, strict=True):
        assert a.path == b.path
        down, up = backend.to_numpy(a.down), backend.to_numpy(a.up)
        np.testing.assert_array_equal(backend.to_numpy(b.down), down[:, :rank])
        np.testing.assert_array_equal(backend.to_numpy(b.up), up[:rank])


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

"""PEFT adapters: the real peft on the real transformers, both ways."""

import copy
import json
import warnings

import keras_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import keras_dylora as kd
from keras_dylora.interop import from_peft
from keras_dylora.interop import to_peft
from tests import backend
from tests.models import VOCABULARY
from tests.models import randomize_adapters

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
    vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12
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
    """The same weights in the other class; KerasHub converts Llama 3 only."""
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


@pytest.fixture
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


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same(name, targets, rank, pair, tmp_path):
    twin, model = pair(name)
    assert_same_logits(model, twin)
    base = keras_logits(model)
    enabled(model, target_layers=TARGETS[targets])
    if hasattr(model, "num_classes"):  # a head that was trained
        logits = model.get_layer("logits")
        logits.set_weights([1.5 * w for w in logits.get_weights()])
    to_peft(model, tmp_path / "adapter", rank=rank)
    model.set_rank(rank)
    assert np.abs(keras_logits(model) - base).max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    assert_same_logits(model, adapted)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name, targets, rank, pair, tmp_path):
    _, model = pair(name)
    enabled(model, target_layers=TARGETS[targets], min_rank=2, frozen=True)
    to_peft(model, tmp_path / "adapter", rank=rank)
    _, again = pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert from_peft(again, tmp_path / "adapter") is again
    config = again.dylora_config
    assert (config.rank, config.min_rank) == (rank, min(2, rank))
    assert (config.alpha, config.frozen) == (7.0, True)
    assert len(again.dylora_layers) == len(model.dylora_layers)
    for a, b in zip(model.dylora_layers, again.dylora_layers, strict=True):
        assert a.path == b.path
        np.testing.assert_array_equal(
            backend.to_numpy(a.down)[:, :rank], backend.to_numpy(b.down)
        )
        np.testing.assert_array_equal(
            backend.to_numpy(a.up)[:rank], backend.to_numpy(b.up)
        )

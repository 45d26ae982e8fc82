"""Keras computes the same with adapters of PEFT's, and of ours again."""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch

import keras_dylora as kd
from keras_dylora.adapters import from_peft, to_peft
from tests import backend
from tests.models import (
    VOCABULARY,
    roberta_classifier,
)
from tests.peft.twins import (
    HUB,
    MODELS,
    TARGETS,
    _valid,
    assert_same_adapters,
    assert_same_logits,
    enabled,
    keras_logits,
    tokens,
    trained_by_peft,
    twin_logits,
)

pytestmark = pytest.mark.families


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
            with pytest.raises(ValueError, match="modules_to_save.*classifier"):
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

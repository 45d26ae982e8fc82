"""SmolLM2-135M from its package: what transformers computes, and a run."""

import json

import keras
import numpy as np
import pytest

import keras_dylora as kd
from examples import smollm2
from tests import backend

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.pretrained(tmp_path_factory.mktemp("smollm2"))


def by_transformers(folder, x, adapter=None):
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    ids, mask = (torch.tensor(v).long() for v in x.values())
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def assert_same(found, wanted, mask, atol=1e-3):  # of logits up to 40
    used = mask.astype(bool)
    found = backend.to_numpy(found)[used]
    np.testing.assert_allclose(found, wanted[used], atol=atol)


def test_the_model_is_that_of_transformers(folder):
    import transformers

    tokenizer = smollm2.Tokenizer(folder)
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json")
    )
    text = "I love 2024 and naïve café owners, don't you?\n  :-)"
    assert tokenizer([text]) == [other(text)["input_ids"]]
    assert tokenizer.detokenize(tokenizer([text])[0]) == text
    _, _, (x, _, _) = smollm2.tweets(tokenizer, 8, 4)
    model = smollm2.causal_lm(folder)
    assert_same(model(x), by_transformers(folder, x), x["padding_mask"])
    model.compile(sampler="greedy")
    written = smollm2.written(model, tokenizer, "The capital of France is")
    assert "Paris" in written


def test_a_run_of_every_rank(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "pretrained", lambda _: folder)
    monkeypatch.setattr(smollm2, "RANKS", [2, 8])
    models = []

    def causal_lm(path, make=smollm2.causal_lm):
        models.append(make(path))
        return models[-1]

    monkeypatch.setattr(smollm2, "causal_lm", causal_lm)
    smollm2.main(["--limit", "80", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "rank 2: 'I love" in shown and "tuned" in shown
    (model,) = models
    tokenizer = smollm2.Tokenizer(folder)
    _, _, (x, _, _) = smollm2.tweets(tokenizer, 8, 4)
    for rank in (2, 8):
        adapter = tmp_path / f"smollm2-tweets-{rank}"
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["r"] == rank
        with model.rank_scope(rank):
            found = model(x)
        wanted = by_transformers(folder, x, adapter)
        assert_same(found, wanted, x["padding_mask"])
    assert isinstance(model, kd.DyLoRAModel) and isinstance(model, keras.Model)

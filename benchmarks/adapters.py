"""Several adapters on one base: swaps, steps, and one artifact for all."""

import pathlib
import shutil
import statistics
import tempfile
import time

import numpy as np

from benchmarks import competitors, table
from examples import markdown

ADAPTERS, RANK, LENGTH = 10, 8, 16


def main(args):
    import keras_dylora as kd

    model = competitors.classifier(args.size)
    base = 4 * model.count_params()
    kd.enable_dylora(model, rank=RANK)
    model.compile("adamw", "sparse_categorical_crossentropy")
    one = [_step_time(args, model) for _ in range(args.rounds)]
    names = [f"adapter_{i}" for i in range(1, ADAPTERS)]
    for name in names:
        model.add_adapter(name)
    model.set_adapter("default")
    several = [_step_time(args, model) for _ in range(args.rounds)]
    swaps = _milliseconds(lambda i: model.set_adapter(names[i % len(names)]))
    model.optimizer = None
    serving = _milliseconds(lambda i: model.set_adapter(names[i % len(names)]))
    own = (
        4 * ADAPTERS * sum(np.prod(v.shape) for v in model.trainable_variables)
    )
    parent = pathlib.Path(tempfile.mkdtemp())
    try:
        path = parent / "export"
        kd.export_ranks(model, path, adapters="all", verify=False)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        alike, mixed = _served(args, path, model.adapter_names)
    finally:
        shutil.rmtree(parent)
    ratio = table.spread(m / a for m, a in zip(mixed, alike, strict=True))
    steps = table.spread(s / o for s, o in zip(several, one, strict=True))
    table.write(
        args,
        [
            markdown.table(
                ("", "median", "quartiles"),
                [
                    ("`set_adapter`, ms", *table.spread(serving)),
                    ("with an optimizer's state, ms", *table.spread(swaps)),
                    (f"step with {ADAPTERS} / with one", *steps),
                    ("batch of 16, mixed / alike", *ratio),
                    (
                        f"artifact of {ADAPTERS} adapters of {RANK} ranks / "
                        "base and their own bytes",
                        f"{size / (base + own):.3f}",
                        "",
                    ),
                ],
            ),
        ],
        {
            "one alike": statistics.median(alike) * 1e3,
            "mixed": statistics.median(mixed) * 1e3,
        },
        "ms for a batch of 16",
    )


def _step_time(args, model):
    tokens, labels = competitors.examples(args.size, args.steps)
    data = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    model.fit(data, labels, batch_size=competitors.BATCH, verbose=0)
    start = time.perf_counter()
    model.fit(data, labels, batch_size=competitors.BATCH, verbose=0)
    return time.perf_counter() - start


def _milliseconds(call):
    found = []
    for i in range(30):
        start = time.perf_counter()
        call(i)
        found.append((time.perf_counter() - start) * 1e3)
    return found[5:]


def _served(args, path, names):
    """Seconds for a batch at one adapter and rank, and for one that mixes."""
    import tensorflow as tf

    serve = tf.saved_model.load(str(path)).signatures["serve"]
    tokens, _ = competitors.examples(args.size, 1)
    tokens = tf.constant(tokens[:, :LENGTH])
    inputs = {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}
    size = len(tokens)
    choices = {
        "alike": ([names[0]] * size, [RANK] * size),
        "mixed": (
            [names[i % len(names)] for i in range(size)],
            [i % RANK + 1 for i in range(size)],
        ),
    }
    found = {name: [] for name in choices}
    for i in range(args.rounds * 10 + 5):
        for name, (adapter, rank) in choices.items():
            start = time.perf_counter()
            serve(
                **inputs,
                adapter=tf.constant(adapter),
                rank=tf.constant(rank),
            )
            if i >= 5:
                found[name].append(time.perf_counter() - start)
    return found["alike"], found["mixed"]

"""Several adapters on one base: swaps, steps, and one artifact for all."""

import pathlib
import shutil
import statistics
import tempfile
import time

from benchmarks import competitors, table

ADAPTERS, RANK, LENGTH = 10, 8, 16


def main(args):
    import keras_dylora as kd

    size = competitors.SIZES[args.size]
    prepare = competitors.dylora(rank=RANK)
    one, several = (competitors.KerasTraining(size, prepare) for _ in range(2))
    model = several.model
    base = 4 * (model.count_params() - several.parameters)
    own = 4 * ADAPTERS * several.parameters
    names = [f"adapter_{i}" for i in range(1, ADAPTERS)]
    for name in names:
        model.add_adapter(name)
        several.seconds(1)  # equal heads would be stored once
    model.set_adapter("default")
    steps = []
    for turn in range(args.rounds + 1):
        order = (one, several) if turn % 2 else (several, one)
        seconds = {each: each.seconds(args.steps) for each in order}
        if turn:  # the first steps compile
            steps.append(seconds[several] / seconds[one])
    swaps = _milliseconds(lambda i: model.set_adapter(names[i % len(names)]))
    model.optimizer = None
    serving = _milliseconds(lambda i: model.set_adapter(names[i % len(names)]))
    parent = pathlib.Path(tempfile.mkdtemp())
    try:
        path = parent / "export"
        kd.export_ranks(model, path, adapters="all", verify=False)
        stored = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        alike, mixed = _served(args, size, path, model.adapter_names)
    finally:
        shutil.rmtree(parent)
    ratio = table.spread(m / a for m, a in zip(mixed, alike, strict=True))
    table.write(
        args,
        [
            table.markdown(
                ("", "median", "quartiles"),
                [
                    ("`set_adapter`, ms", *table.spread(serving)),
                    ("with an optimizer's state, ms", *table.spread(swaps)),
                    (f"step with {ADAPTERS} / with one", *table.spread(steps)),
                    ("batch of 16, mixed / alike", *ratio),
                    (
                        f"artifact of {ADAPTERS} adapters of {RANK} ranks / "
                        "base and their own bytes",
                        f"{stored / (base + own):.3f}",
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


def _milliseconds(call):
    found = []
    for i in range(30):
        start = time.perf_counter()
        call(i)
        found.append((time.perf_counter() - start) * 1e3)
    return found[5:]


def _served(args, size, path, names):
    """Seconds for a batch at one adapter and rank, and for one that mixes."""
    import tensorflow as tf

    serve = tf.saved_model.load(str(path)).signatures["serve"]
    tokens, _ = competitors.examples(size, 1)
    tokens = tf.constant(tokens[:, :LENGTH])
    inputs = {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}
    rows = len(tokens)
    choices = {
        "alike": ([names[0]] * rows, [RANK] * rows),
        "mixed": (
            [names[i % len(names)] for i in range(rows)],
            [i % RANK + 1 for i in range(rows)],
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

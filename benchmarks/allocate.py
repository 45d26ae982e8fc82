"""Time of choosing a rank for each layer, beside evaluating one for all."""

import time

import numpy as np

from benchmarks import competitors, table
from benchmarks.workers import workers
from examples import markdown

SENTENCES, LENGTH = 400, 32
BUDGETS = [0.125, 0.25, 0.5]


def main(args):
    rounds = []
    for _ in range(args.processes):
        with workers(start, [args.backend], args.size) as running:
            for _ in range(args.rounds):
                rounds.append(running[args.backend].ask())
                print(f"round {len(rounds)}", flush=True)
    seconds = {
        label: table.median(r[label] for r in rounds)
        for label in ("allocate_ranks", "evaluate_ranks")
    }
    labels = {
        "allocate_ranks": f"allocate_ranks, {len(BUDGETS)} budgets",
        "evaluate_ranks": "evaluate_ranks, 8 ranks",
    }
    head = f"{SENTENCES} sentences of {LENGTH} tokens, all linear layers"
    rows = [
        (labels[name], f"{s:.1f}", f"{max(r[name] for r in rounds):.1f}")
        for name, s in seconds.items()
    ]
    traces = "none" if args.backend == "torch" else rounds[-1]["traces"]
    table.write(
        args,
        [
            markdown.table((head, "seconds", "the longest"), rows),
            f"Traces in a search, of batches of 32 and of the rest: {traces}",
        ],
        seconds,
        "seconds",
    )


def start(backend, size):
    import keras_dylora as kd

    size = competitors.SIZES[size]
    prepare = competitors.dylora(competitors.LINEAR, scaling="constant")
    model = competitors.KerasTraining(size, prepare).model
    rng = np.random.default_rng(0)
    for layer in model.dylora_layers:  # at zero there is no gain
        layer.up.assign(0.01 * rng.normal(size=layer.up.shape))
    shape = SENTENCES, LENGTH
    tokens = rng.integers(5, size.vocabulary, shape).astype("int32")
    x = {"token_ids": tokens, "padding_mask": np.ones(shape, "bool")}
    y = rng.integers(0, 2, SENTENCES)
    compute_loss, traces = model.compute_loss, []

    def counted(*args, **kwargs):
        traces.append(1)
        return compute_loss(*args, **kwargs)

    def answer():
        traces.clear()
        model.compute_loss = counted
        begin = time.perf_counter()
        kd.allocate_ranks(model, x, y, BUDGETS, verbose=0)
        allocated = time.perf_counter() - begin
        model.compute_loss = compute_loss
        found = {"allocate_ranks": allocated, "traces": len(traces)}
        begin = time.perf_counter()
        kd.evaluate_ranks(model, x, y, verbose=0)
        return {**found, "evaluate_ranks": time.perf_counter() - begin}

    return answer

"""Training, evaluating and writing on one card, on every installed backend."""

import concurrent.futures
import dataclasses
import importlib.util
import os
import time

import numpy as np

from benchmarks import competitors, table
from benchmarks.competitors import PEFT, PEFT_COMPILED, PEFT_LINEAR, SIZES
from benchmarks.workers import device, in_turn, workers
from examples import markdown

RIVALS = {
    "DyLoRA, q+v": (
        "LoRA of ours, q+v",
        "Keras LoRA 8, q+v",
        PEFT,
        PEFT_COMPILED,
    ),
    "DyLoRA, linear": ("Keras LoRA 8, linear", PEFT_LINEAR),
}
OTHERS = ("fine-tuning",)
RANKS = range(1, 9)
# What evaluates and writes: the ranks of it.
SERVED = {
    "DyLoRA, q+v": (1, 8),
    "Keras LoRA 8, q+v": (None,),
    PEFT: (None,),
}
PROMPT, WRITTEN = 32, 64


BATCHES = {
    "tiny": (4, 16),
    "tiny-gpt2": (4, 16),
    "minilm": (32, 128),
    "roberta-base": (32, 128),
    "gpt2-medium": (8, 256),
}
SEVERAL = {
    "tiny": ("tiny", "tiny-gpt2"),
    "card": ("roberta-base", "gpt2-medium"),
}


def sizes(name):
    """The models of this name, one or several, in bfloat16."""
    found = {}
    for model in SEVERAL.get(name, (name,)):
        batch, length = BATCHES[model]
        found[model] = dataclasses.replace(
            SIZES[model], batch=batch, length=length, dtype="bfloat16"
        )
    return found


def main(args):
    # A process must leave room for those beside it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    backends = [args.backend] if args.backend else installed()
    rows, begin = [], time.perf_counter()
    for backend in backends:
        os.environ["KERAS_BACKEND"] = backend
        for name, size in sizes(args.size).items():
            for row in measured(args, backend, size):
                rows.append({"backend": backend, "model": name, **row})
            seconds = time.perf_counter() - begin
            print(f"{backend}, {name}: {seconds:.0f} s", flush=True)
            # After every model: a lease may end at any time.
            write(args, backends, rows)


def write(args, backends, rows):
    bars = {
        ", ".join((row["backend"], row["model"], row["method"])): 1e3
        * table.median(row["seconds"])
        for row in rows
    }
    table.write(
        args,
        [rows[0]["device"], markdown.table(HEADER, map(cells, rows))],
        bars,
        "ms a step",
        backends,
        data=rows,
    )


def installed():
    return [
        backend
        for backend in ("tensorflow", "jax", "torch")
        if importlib.util.find_spec(backend)
    ]


def measured(args, backend, size):
    """A dict for each method, with the seconds of every round."""
    names = [*RIVALS, *(n for rivals in RIVALS.values() for n in rivals)]
    names += OTHERS
    if backend != "torch":
        names = [n for n in names if "PEFT" not in n]
    with workers(start, names, size) as running:
        # The first steps compile, all at once.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = {
                name: pool.submit(worker.ask, "prepare", args.steps)
                for name, worker in running.items()
            }
            rows = {
                name: {"method": name, **answer.result(), "seconds": []}
                for name, answer in asked.items()
            }
        for answers in in_turn(running, args.rounds, "train", args.steps):
            for name, seconds in answers.items():
                rows[name]["seconds"].append(seconds)
        for name, ranks in SERVED.items():
            for ask in ("evaluate", "generate") if name in running else ():
                rows[name][ask] = running[name].ask(ask, ranks, args.steps)
    for ours, rivals in RIVALS.items():
        for rival in rivals:
            if ours in rows and rival in rows:
                rows[rival]["ours"] = rows[ours]["seconds"]
    return rows.values()


def start(name, size):
    competitor = competitors.make(name, size)

    def prepare(steps):
        competitor.seconds(steps)
        label, peak = device()
        return {
            "device": label,
            "parameters": competitor.parameters,
            "peak": peak,
        }

    def evaluate(ranks, steps):
        """Seconds of a batch, at one rank after another."""
        if not hasattr(competitor, "evaluate"):
            return None
        data = competitor.data(steps)
        ranks = ranks if ranks == (None,) else RANKS
        seconds = _median(competitor.evaluate, data, ranks)
        return seconds / (len(ranks) * steps)

    def generate(ranks, steps):
        """Tokens a second, at each of some ranks."""
        if not size.writes:
            return None
        prompts = competitors.examples(size, 1)[0][:, :PROMPT]
        length = min(PROMPT + WRITTEN, size.positions)
        tokens = prompts.shape[0] * (length - prompts.shape[1])
        return {
            str(rank or competitors.RANK): tokens
            / _median(competitor.generate, prompts, length, rank)
            for rank in ranks
        }

    requests = {
        "prepare": prepare,
        "train": competitor.seconds,
        "evaluate": evaluate,
        "generate": generate,
    }
    return lambda request, *arguments: requests[request](*arguments)


def _median(call, *arguments):
    """Seconds of a call, after a first one that compiles."""
    call(*arguments)
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        call(*arguments)
        found.append(time.perf_counter() - begin)
    return table.median(found)


HEADER = (
    "backend",
    "model",
    "method",
    "trained",
    "ms a step",
    "ours / this",
    "peak, MB",
    "evaluate, ms a batch",
    "tokens/s at rank",
)


def cells(row):
    ratio = ""
    if "ours" in row:
        ratio = "{} ({})".format(
            *table.spread(np.divide(row["ours"], row["seconds"]))
        )
    evaluate, generate = row.get("evaluate"), row.get("generate")
    return (
        row["backend"],
        row["model"],
        row["method"],
        f"{row['parameters']:,}",
        f"{1e3 * table.median(row['seconds']):.1f}",
        ratio,
        f"{row['peak'] / 1e6:,.0f}",
        f"{1e3 * evaluate:.1f}" if evaluate else "",
        ", ".join(f"{rank}: {n:.0f}" for rank, n in (generate or {}).items()),
    )

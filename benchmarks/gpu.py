"""Training, evaluating and writing on one card, on every installed backend."""

import dataclasses
import importlib.util
import os
import statistics
import time

from benchmarks import competitors, grid, table
from benchmarks.competitors import (
    COMPILED,
    PEFT,
    PEFT_LINEAR,
    SIZES,
    TRACED,
)
from benchmarks.peaks import device

RIVALS = {
    "DyLoRA, q+v": (
        "LoRA of ours, q+v",
        "Keras LoRA 8, q+v",
        "DyLoRA, q+v" + TRACED,
        "DyLoRA, q+v" + COMPILED,
        PEFT,
        PEFT + COMPILED,
    ),
    "DyLoRA, linear": (
        "Keras LoRA 8, linear",
        "DyLoRA, linear" + TRACED,
        "DyLoRA, linear" + COMPILED,
        PEFT_LINEAR,
        PEFT_LINEAR + COMPILED,
    ),
}
OTHERS = ("fine-tuning",)
RANKS = range(1, 9)
# What evaluates and writes: the ranks of it.
SERVED = {
    "DyLoRA, q+v": (1, 8),
    "DyLoRA, q+v" + COMPILED: (1, 8),
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
            found = grid.measured(
                args,
                OnCard,
                names(backend),
                size,
                at_once=None,
                ours={b: a for a, rivals in RIVALS.items() for b in rivals},
            )
            rows += [{"backend": backend, "model": name, **x} for x in found]
            seconds = time.perf_counter() - begin
            print(f"{backend}, {name}: {seconds:.0f} s", flush=True)
            # After every model: a lease may end at any time.
            table.write(
                args,
                [rows[0]["device"], table.of_rows(COLUMNS, rows)],
                {
                    f"{row['backend']}, {row['model']}, {row['method']}": 1e3
                    * table.middle(row)
                    for row in rows
                },
                "ms a step",
                backends,
                data=rows,
            )


def names(backend):
    """The methods that are compared on a backend."""
    rivals = [name for names in RIVALS.values() for name in names]
    every = [*RIVALS, *rivals, *OTHERS]
    return [name for name in every if competitors.run_on(backend, name)]


def installed():
    return [
        backend
        for backend in ("tensorflow", "jax", "torch")
        if importlib.util.find_spec(backend)
    ]


class OnCard(grid.Training):
    """Steps of a competitor, and what it serves where it does."""

    def prepare(self, steps):
        found = super().prepare(steps)
        label, peak = device()
        return {**found, "device": label, "peak": peak}

    def finish(self, steps):
        found, ranks = {}, SERVED.get(self.name)
        if ranks and hasattr(self.competitor, "evaluate"):
            found["evaluate"] = self.evaluate(ranks, steps)
        if ranks and self.size.writes:
            found["generate"] = self.generate(ranks)
        return found

    def evaluate(self, ranks, steps):
        """Seconds of a batch, at one rank after another."""
        data = self.competitor.data(steps)
        ranks = ranks if ranks == (None,) else RANKS
        seconds = _median(self.competitor.evaluate, data, ranks)
        return seconds / (len(ranks) * steps)

    def generate(self, ranks):
        """Tokens a second, at each of some ranks."""
        prompts = competitors.examples(self.size, 1)[0][:, :PROMPT]
        length = min(PROMPT + WRITTEN, self.size.positions)
        tokens = prompts.shape[0] * (length - prompts.shape[1])
        return {
            str(rank or competitors.RANK): tokens
            / _median(self.competitor.generate, prompts, length, rank)
            for rank in ranks
        }


def _median(call, *arguments):
    """Seconds of a call, after a first one that compiles."""
    call(*arguments)
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        call(*arguments)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


COLUMNS = {
    "backend": lambda row: row["backend"],
    "model": lambda row: row["model"],
    "method": lambda row: row["method"],
    "trained": lambda row: f"{row['parameters']:,}",
    "ms a step": lambda row: f"{1e3 * table.middle(row):.1f}",
    "ours / this": table.over,
    "peak, MB": lambda row: f"{row['peak'] / 1e6:,.0f}",
    "evaluate, ms a batch": lambda row: (
        f"{1e3 * row['evaluate']:.1f}" if "evaluate" in row else ""
    ),
    "tokens/s at rank": lambda row: ", ".join(
        f"{rank}: {n:.0f}" for rank, n in row.get("generate", {}).items()
    ),
}

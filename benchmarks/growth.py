"""Time and memory of a step by rank, layers, batch, length, model and base.

On Linux, which lets a process forget the most it held so far.
"""

import dataclasses
import gc
import sys

from matplotlib.figure import Figure

from benchmarks import competitors, grid, table
from benchmarks.competitors import SIZES
from benchmarks.peaks import forget_peak, held, import_packages

OURS, KERAS, PEFT = METHODS = ("DyLoRA", "Keras LoRA", "PEFT LoRA")
QV = ("query", "value")
BASE = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantized": "int8"},
    "int4": {"quantized": "int4"},
}

MEASURED = {
    "seconds a step": table.middle,
    "GB held while training": lambda row: row["bytes"] / 1e9,
}


def axes(name):
    """Dict of axis to dict of label to size and rank, around one size."""
    middle = SIZES[name]
    small = dataclasses.replace(middle, batch=4)
    large = small if name == "tiny" else SIZES["roberta-base"]
    models = ("tiny", "tiny-gpt2")
    if name != "tiny":
        models = ("minilm", "roberta-base", "gpt2-medium")
    rank = competitors.RANK

    def of(size, key, values):
        return {
            value: (dataclasses.replace(size, **{key: value}), rank)
            for value in values
        }

    return {
        "rank": {
            b: (middle, b) for b in (1, 4, 16, 64, 256) if b <= middle.hidden
        },
        "layers": of(middle, "layers", (2, 6, 12, 24)),
        "batch": of(middle, "batch", (4, 16, 64)),
        "length": of(small, "length", (64, 128, 256, 512)),
        "model": {
            model: (dataclasses.replace(SIZES[model], batch=4), rank)
            for model in models
        },
        "base": {
            label + again: (
                dataclasses.replace(large, remat=bool(again), **changes),
                rank,
            )
            for label, changes in BASE.items()
            for again in ("", ", remat")
        },
    }


def main(args):
    chosen = axes(args.size)
    unknown = set(args.axes or ()) - chosen.keys()
    if unknown:
        sys.exit(
            f"`--axes` are of {', '.join(chosen)}. Received: "
            + ", ".join(sorted(unknown))
        )
    rows = []
    for axis in args.axes or chosen:
        for label, (size, rank) in chosen[axis].items():
            if size.remat and args.backend != "torch":
                # Keras 3.15 can't: in a compiled step `training` is traced.
                continue
            names = [OURS, KERAS]
            if args.backend == "torch" and not (size.quantized or size.remat):
                names.append(PEFT)
            ours = dict.fromkeys(names[1:], OURS)
            rows += [
                {"axis": axis, "at": label, **row}
                for row in grid.measured(
                    args, Growth, names, size, rank, ours=ours
                )
            ]
        # After every axis: all of them take long.
        path = table.write(args, [table.of_rows(COLUMNS, rows)], data=rows)
        draw(path.with_suffix(".png"), rows)


class Growth(grid.Training):
    """Steps at a rank, and what the process holds while it trains."""

    def __init__(self, name, size, rank):
        import_packages(name == PEFT)
        self.imported = held("VmRSS")
        if name == PEFT:
            targets = competitors.PEFT_TARGETS[False, size.writes]
            self.competitor = competitors.PeftTraining(size, targets, rank=rank)
        else:
            prepare = {
                OURS: competitors.dylora(QV, rank),
                KERAS: competitors.keras_lora(rank, QV),
            }[name]
            self.competitor = competitors.KerasTraining(size, prepare)

    def prepare(self, steps):
        found = super().prepare(steps)
        gc.collect()  # what built the model is let go
        forget_peak()
        return found

    def finish(self, steps):
        return {"bytes": held("VmHWM") - self.imported}


COLUMNS = {
    "axis": lambda row: row["axis"],
    "at": lambda row: row["at"],
    "method": lambda row: row["method"],
    "trained": lambda row: f"{row['parameters']:,}",
    "seconds a step": lambda row: f"{table.middle(row):.3f}",
    "ours / this": table.over,
    "MB": lambda row: f"{row['bytes'] / 1e6:,.0f}",
}


def draw(path, rows):
    """Time, and memory at its right, two axes side by side."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    height = (len(names) + 1) // 2
    figure = Figure((12, 3 * height), layout="constrained")
    pairs = figure.subplots(height, 4, squeeze=False).reshape(-1, 2)
    for panel in pairs[len(names) :].flat:
        panel.set_axis_off()
    for axis, panels in zip(names, pairs, strict=False):
        own = [row for row in rows if row["axis"] == axis]
        for panel, (label, of) in zip(panels, MEASURED.items(), strict=True):
            draw_axis(panel, axis, own, of)
            panel.set_ylabel(label)
    pairs[0, 0].legend()
    figure.savefig(path, dpi=110)


def draw_axis(panel, name, rows, of):
    """A line for each method, or points where `at` is no number."""
    numbers = all(isinstance(row["at"], int) for row in rows)
    for method in METHODS:
        points = [row for row in rows if row["method"] == method]
        at, y = [row["at"] for row in points], list(map(of, points))
        panel.plot(at, y, "o-" if numbers else "o", label=method)
    if numbers:
        panel.set_xscale("log", base=2)
        ticks = sorted({row["at"] for row in rows})
        panel.set_xticks(ticks, ticks)
    else:
        panel.tick_params("x", rotation=60)
    panel.set_xlabel(name)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)

"""Time of a training step, beside what a user could train with instead."""

import sys

from benchmarks import competitors, grid, table
from benchmarks.competitors import (
    COMPILED,
    FORWARD,
    FORWARDS,
    PEFT,
    PEFT_LINEAR,
    TRACED,
)

# What is compared, and what the divisor counts for.
RATIOS = [
    ("DyLoRA, q+v", "LoRA of ours, q+v", 1),
    ("DyLoRA frozen, q+v", "LoRA of ours, q+v", 1),
    ("DyLoRA per example, q+v", "LoRA of ours, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 8, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 1, q+v", 1),
    ("DyLoRA, linear", "Keras LoRA 8, linear", 1),
    ("DyLoRA, q+v", PEFT, 1),
    ("DyLoRA, linear", PEFT_LINEAR, 1),
    ("DyLoRA, q+v", "fine-tuning", 1),
    ("DyLoRA, q+v", FORWARD, 2),
    ("DyLoRA, q+v", "DyLoRA, first layer", 1),
    ("DyLoRA 64, q+v", "DyLoRA, q+v", 1),
    *(
        (f"{name}, tuned", name, 1)
        for name in FORWARDS
        if f"{name}, tuned" in FORWARDS
    ),
    ("DyLoRA, 4 of 6 layers", "DyLoRA, 1 of 6 layers", 1),
    *(
        (ours + stage, rival + theirs, 1)
        for ours, rival in (
            ("DyLoRA, q+v", PEFT),
            ("DyLoRA, linear", PEFT_LINEAR),
        )
        for stage, theirs in (
            (TRACED, ""),
            (COMPILED, ""),
            (COMPILED, COMPILED),
        )
    ),
]


def main(args):
    ratios = [
        ratio
        for ratio in RATIOS
        if competitors.run_on(args.backend, *ratio[:2])
        and args.over in ratio[1]
    ]
    if not ratios:
        sys.exit(f"Nothing is named so. Received: --over {args.over}")
    names = list(dict.fromkeys(n for ratio in ratios for n in ratio[:2]))
    rows = grid.measured(
        args,
        grid.Training,
        names,
        competitors.SIZES[args.size],
        processes=args.processes,
    )
    table.write_step_times(args, rows, ratios)

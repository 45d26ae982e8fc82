"""Time of a training step, beside what a user could train with instead."""

import sys

from benchmarks import competitors, table
from benchmarks.competitors import FORWARD, PEFT, PEFT_LINEAR
from benchmarks.workers import in_turn, workers
from examples import markdown

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
    ("DyLoRA, 4 of 6 layers", "DyLoRA, 1 of 6 layers", 1),
]


def main(args):
    ratios = [
        ratio
        for ratio in RATIOS
        if (args.backend == "torch" or "PEFT" not in ratio[1])
        and args.over in ratio[1]
    ]
    if not ratios:
        sys.exit(f"Nothing is named so. Received: --over {args.over}")
    names = list(dict.fromkeys(n for ratio in ratios for n in ratio[:2]))
    rounds, parameters = [], {}
    for _ in range(args.processes):
        with workers(start, names, args.size) as running:
            for name, worker in running.items():
                # The first steps compile.
                _, parameters[name] = worker.ask(args.steps)
            for answers in in_turn(running, args.rounds, args.steps):
                rounds.append(
                    {n: seconds for n, (seconds, _) in answers.items()}
                )
                print(f"round {len(rounds)}", flush=True)
    rows = [
        (name, parameters[name], table.median(r[name] for r in rounds))
        for name in names
    ]
    table.write(
        args,
        [
            markdown.table(
                ("", "trained parameters", "seconds a step"),
                [
                    (n, "" if n == FORWARD else f"{p:,}", f"{s:.3f}")
                    for n, p, s in rows
                ],
            ),
            markdown.table(
                ("ratio of step times", "median", "quartiles"),
                [
                    (
                        f"{a} / {'' if times == 1 else f'{times} × '}{b}",
                        *table.spread(r[a] / r[b] / times for r in rounds),
                    )
                    for a, b, times in ratios
                ],
            ),
        ],
        {name: seconds for name, _, seconds in rows},
        "seconds a step",
    )


def start(name, size):
    competitor = competitors.make(name, competitors.SIZES[size])

    def answer(steps):
        return competitor.seconds(steps), competitor.parameters

    return answer

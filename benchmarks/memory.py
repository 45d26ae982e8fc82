"""Peak memory of training, beside what a user could train with instead."""

from benchmarks import competitors, table
from benchmarks.competitors import PEFT
from benchmarks.workers import import_packages, peak_memory, workers
from examples import markdown

NAMES = [
    "DyLoRA, q+v",
    "DyLoRA frozen, q+v",
    "LoRA of ours, q+v",
    "Keras LoRA 8, q+v",
    "Keras LoRA 1, q+v",
    "DyLoRA, linear",
    "Keras LoRA 8, linear",
    "fine-tuning",
]
RATIOS = [
    ("DyLoRA, q+v", "LoRA of ours, q+v"),
    ("DyLoRA, q+v", "Keras LoRA 8, q+v"),
    ("DyLoRA frozen, q+v", "Keras LoRA 8, q+v"),
    ("DyLoRA, q+v", "Keras LoRA 1, q+v"),
    ("DyLoRA, linear", "Keras LoRA 8, linear"),
    ("DyLoRA, q+v", "fine-tuning"),
]


def main(args):
    names = NAMES + [PEFT] * (args.backend == "torch")
    rounds = []
    for _ in range(args.rounds):
        peaks = {}
        for name in names:
            with workers(start, [name], args.size) as running:
                peaks[name] = running[name].ask(args.steps)
        rounds.append(peaks)
        print(f"round {len(rounds)}", flush=True)

    def peak(name, part):
        return table.median(r[name][part] for r in rounds) / 1e6

    def over(a, b, part):
        return table.spread(r[a][part] / r[b][part] for r in rounds)

    table.write(
        args,
        [
            markdown.table(
                ("", "peak, MB", "of it by the model and its training, MB"),
                [
                    (
                        name,
                        f"{peak(name, 0):.0f}",
                        f"{peak(name, 1):.0f}",
                    )
                    for name in names
                ],
            ),
            markdown.table(
                (
                    "ratio",
                    "of the peaks",
                    "quartiles",
                    "of the parts",
                    "quartiles",
                ),
                [
                    (f"{a} / {b}", *over(a, b, 0), *over(a, b, 1))
                    for a, b in RATIOS
                ],
            ),
        ],
        {name: peak(name, 0) for name in names},
        "peak memory, MB",
    )


def start(name, size):
    def answer(steps):
        import_packages(name == PEFT)
        before = peak_memory()
        competitors.make(name, competitors.SIZES[size]).seconds(steps)
        peak = peak_memory()
        return peak, peak - before

    return answer

"""Peak memory of training, beside what a user could train with instead."""

from benchmarks import competitors, grid, table
from benchmarks.competitors import COMPILED, PEFT, TRACED
from benchmarks.peaks import forget_peak, held, import_packages

NAMES = [
    "DyLoRA, q+v",
    "DyLoRA frozen, q+v",
    "LoRA of ours, q+v",
    "Keras LoRA 8, q+v",
    "Keras LoRA 1, q+v",
    "DyLoRA, linear",
    "Keras LoRA 8, linear",
    "fine-tuning",
    "DyLoRA, q+v" + TRACED,
    "DyLoRA, q+v" + COMPILED,
    PEFT,
]
RATIOS = [
    ("DyLoRA, q+v", "LoRA of ours, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 8, q+v", 1),
    ("DyLoRA frozen, q+v", "Keras LoRA 8, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 1, q+v", 1),
    ("DyLoRA, linear", "Keras LoRA 8, linear", 1),
    ("DyLoRA, q+v", "fine-tuning", 1),
    ("DyLoRA, q+v" + TRACED, "DyLoRA, q+v", 1),
    ("DyLoRA, q+v" + COMPILED, "DyLoRA, q+v", 1),
    ("DyLoRA, q+v", PEFT, 1),
]


def main(args):
    rows = grid.measured(
        args,
        Peak,
        [n for n in NAMES if competitors.run_on(args.backend, n)],
        competitors.SIZES[args.size],
        processes=args.rounds,
        rounds=1,
        alone=True,
    )

    def peak(row, of="peak"):
        return table.middle(row, of) / 1e6

    columns = {
        "": lambda row: row["method"],
        **{
            f"{heading}, MB": lambda row, key=key: f"{peak(row, key):.0f}"
            for key, heading in PEAKS.items()
        },
    }
    ratios = [
        ratio
        for ratio in RATIOS
        if competitors.run_on(args.backend, *ratio[:2])
    ]
    table.write(
        args,
        [
            table.of_rows(columns, rows),
            table.of_ratios(("ratio", *PEAKS.values()), rows, ratios, PEAKS),
        ],
        {row["method"]: peak(row) for row in rows},
        "peak memory, MB",
    )


PEAKS = {
    "peak": "the process",
    "part": "the model and its training",
    "later": "the model and later steps",
}


class Peak(grid.Cell):
    """The most that a process holds, and how much more than its packages.

    Later steps are those after the first ones, which compile.
    """

    def measure(self, steps):
        import_packages(self.name == PEFT)
        forget_peak()
        before = held("VmHWM")
        competitor = competitors.make(self.name, self.size)
        competitor.seconds(steps)
        peak = held("VmHWM")
        forget_peak()
        competitor.seconds(steps)
        later = held("VmHWM") - before
        return {"peak": peak, "part": peak - before, "later": later}

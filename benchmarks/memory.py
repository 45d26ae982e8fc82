"""Peak memory of training, beside what a user could train with instead."""

from benchmarks import competitors, grid, table
from benchmarks.competitors import PEFT
from benchmarks.peaks import import_packages, peak_memory

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
    ("DyLoRA, q+v", "LoRA of ours, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 8, q+v", 1),
    ("DyLoRA frozen, q+v", "Keras LoRA 8, q+v", 1),
    ("DyLoRA, q+v", "Keras LoRA 1, q+v", 1),
    ("DyLoRA, linear", "Keras LoRA 8, linear", 1),
    ("DyLoRA, q+v", "fine-tuning", 1),
]


def main(args):
    rows = grid.measured(
        args,
        Peak,
        NAMES + [PEFT] * (args.backend == "torch"),
        competitors.SIZES[args.size],
        processes=args.rounds,
        rounds=1,
        alone=True,
    )

    def peak(row, of="peak"):
        return table.middle(row, of) / 1e6

    columns = {
        "": lambda row: row["method"],
        "peak, MB": lambda row: f"{peak(row):.0f}",
        "of it by the model and its training, MB": lambda row: (
            f"{peak(row, 'part'):.0f}"
        ),
    }
    headings = ("ratio", "of the peaks", "of the parts")
    table.write(
        args,
        [
            table.of_rows(columns, rows),
            table.of_ratios(headings, rows, RATIOS, ("peak", "part")),
        ],
        {row["method"]: peak(row) for row in rows},
        "peak memory, MB",
    )


class Peak(grid.Cell):
    """The most that a process holds, and how much more than its packages."""

    def measure(self, steps):
        import_packages(self.name == PEFT)
        before = peak_memory()
        competitors.make(self.name, self.size).seconds(steps)
        peak = peak_memory()
        return {"peak": peak, "part": peak - before}

"""Time that a language model takes to write, beside Keras's LoRA and PEFT."""

import sys
import time

from benchmarks import competitors, grid, table
from benchmarks.competitors import COMPILED, PEFT, RANK, TRACED
from benchmarks.gpu import PROMPT

BASE, KERAS = "no adapters", "Keras LoRA 8, q+v"
OURS = [f"DyLoRA, q+v{stage}" for stage in ("", TRACED, COMPILED)]
# The ranks of each method that is measured.
METHODS = {
    BASE: (None,),
    KERAS: (None,),
    OURS[0]: (1, RANK),
    **dict.fromkeys(OURS[1:], (RANK,)),
    PEFT: (None,),
}
CELLS = {
    f"{method}, rank {rank}" if rank else method: (method, rank)
    for method, ranks in METHODS.items()
    for rank in ranks
}


class Writing(grid.Cell):
    """Tokens that a competitor writes after prompts of 32."""

    def __init__(self, name, size):
        super().__init__(name, size)
        method, self.rank = CELLS[name]
        self.competitor = competitors.make(method, size)
        self.prompts = competitors.examples(size, 1)[0][:, :PROMPT]

    def prepare(self, steps):
        self.measure(steps)  # what compiles
        return {"rows": len(self.prompts)}

    def measure(self, steps):
        length = self.prompts.shape[1] + steps
        begin = time.perf_counter()
        self.competitor.generate(self.prompts, length, self.rank)
        return {"seconds": (time.perf_counter() - begin) / steps}


def main(args):
    name = {"tiny": "tiny-gpt2"}.get(args.size, args.size)
    size = competitors.SIZES[name]
    if not size.writes:
        sys.exit(f"Only GPT-2 writes. Received: --size {args.size}")
    names = [x for x in CELLS if competitors.run_on(args.backend, CELLS[x][0])]
    rows = grid.measured(args, Writing, names, size, processes=args.processes)
    columns = {
        "": lambda row: row["method"],
        "ms a token": lambda row: f"{1e3 * table.middle(row):.1f}",
        "tokens a second, all rows": lambda row: (
            f"{row['rows'] / table.middle(row):,.0f}"
        ),
    }
    ratios = [(name, KERAS, 1) for name in names if name != KERAS]
    if PEFT in names:
        ratios += [(name, PEFT, 1) for name in names if "DyLoRA" in name]
    table.write(
        args,
        [
            table.of_rows(columns, rows),
            table.of_ratios(("ratio", "median"), rows, ratios),
        ],
        {row["method"]: 1e3 * table.middle(row) for row in rows},
        "ms a token",
        data=rows,
    )

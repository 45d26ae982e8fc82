"""Time of evaluating all ranks, beside one `evaluate` a rank."""

import time

from benchmarks import competitors, grid, table

TOGETHER, ONE_BY_ONE = "evaluate_ranks, 8 ranks", "8 × (set_rank, evaluate)"


def main(args):
    rows = grid.measured(
        args,
        Evaluation,
        [TOGETHER, ONE_BY_ONE],
        competitors.SIZES[args.size],
        processes=args.processes,
    )
    eager = args.backend == "torch"
    columns = {
        "": lambda row: row["method"],
        "seconds": lambda row: f"{table.middle(row):.2f}",
        "times traced, in all": lambda row: "eager" if eager else row["traces"],
    }
    pairs = [(TOGETHER, ONE_BY_ONE, 1)]
    table.write(
        args,
        [
            table.of_rows(columns, rows),
            table.of_ratios(("ratio", "median"), rows, pairs),
        ],
        {row["method"]: table.middle(row) for row in rows},
        "seconds",
    )


class Evaluation(grid.Cell):
    """Evaluates all ranks of one model, together or one by one."""

    def __init__(self, name, size):
        super().__init__(name, size)
        self.traces = 0
        self.trained = competitors.KerasTraining(size, competitors.dylora())
        test_step = self.trained.model.test_step

        def counted(*args):
            self.traces += 1
            return test_step(*args)

        self.trained.model.test_step = counted

    def prepare(self, steps):
        self.measure(steps)
        return {}

    def measure(self, steps):
        import keras_dylora as kd

        model, data = self.trained.model, self.trained.data(steps)
        begin = time.perf_counter()
        if self.name == TOGETHER:
            kd.evaluate_ranks(model, *data, verbose=0)
        else:
            for rank in range(1, 9):
                model.set_rank(rank)
                model.evaluate(*data, verbose=0)
        return {"seconds": time.perf_counter() - begin}

    def finish(self, steps):
        return {"traces": self.traces}

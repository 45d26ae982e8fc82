"""Time of choosing a rank for each layer, beside evaluating one for all."""

import time

import numpy as np

from benchmarks import competitors, grid, table

SENTENCES, LENGTH = 400, 32
BUDGETS = [0.125, 0.25, 0.5]
CHOSEN = f"allocate_ranks, {len(BUDGETS)} budgets"
EVALUATED = "evaluate_ranks, 8 ranks"


def main(args):
    rows = grid.measured(
        args,
        Search,
        [CHOSEN, EVALUATED],
        competitors.SIZES[args.size],
        processes=args.processes,
    )
    head = f"{SENTENCES} sentences of {LENGTH} tokens, all linear layers"
    columns = {
        head: lambda row: row["method"],
        "seconds": lambda row: f"{table.middle(row):.1f}",
        "the longest": lambda row: f"{max(row['seconds']):.1f}",
    }
    traces = "none" if args.backend == "torch" else rows[0]["traces"]
    table.write(
        args,
        [
            table.of_rows(columns, rows),
            f"Traces in a search, of batches of 32 and of the rest: {traces}",
        ],
        {row["method"]: table.middle(row) for row in rows},
        "seconds",
    )


class Search(grid.Cell):
    """The search, or the evaluation, on a model whose adapters bring a gain."""

    def __init__(self, name, size):
        self.name, self.traces = name, 0
        prepare = competitors.dylora(competitors.LINEAR, scaling="constant")
        self.model = competitors.KerasTraining(size, prepare).model
        rng = np.random.default_rng(0)
        for layer in self.model.dylora_layers:  # at zero there is no gain
            layer.up.assign(0.01 * rng.normal(size=layer.up.shape))
        shape = SENTENCES, LENGTH
        tokens = rng.integers(5, size.vocabulary, shape).astype("int32")
        x = {"token_ids": tokens, "padding_mask": np.ones(shape, "bool")}
        self.data = x, rng.integers(0, 2, SENTENCES)
        if name == CHOSEN:
            compute_loss = self.model.compute_loss

            def counted(*args, **kwargs):
                self.traces += 1
                return compute_loss(*args, **kwargs)

            self.model.compute_loss = counted

    def measure(self, steps):
        import keras_dylora as kd

        self.traces = 0
        begin = time.perf_counter()
        if self.name == CHOSEN:
            kd.allocate_ranks(self.model, *self.data, BUDGETS, verbose=0)
        else:
            kd.evaluate_ranks(self.model, *self.data, verbose=0)
        return {"seconds": time.perf_counter() - begin}

    def finish(self, steps):
        return {"traces": self.traces}

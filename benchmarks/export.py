"""Size and time of every way to export eight ranks.

At the size of RoBERTa-base, 8 GB of disk are needed for a moment.
"""

import pathlib
import tempfile
import time

from benchmarks import competitors, grid, table

SHARED, MERGED = "shared, 8 ranks", "merged, 8 ranks"
ONE, EIGHT = "one model.export()", "eight merge().export()"


def main(args):
    names = [ONE, SHARED, MERGED, EIGHT]
    if args.backend != "tensorflow":
        # Keras can't export this model with a free length.
        names = [SHARED, MERGED]
    rows = grid.measured(
        args,
        Export,
        names,
        competitors.SIZES[args.size],
        rounds=1,
        alone=True,
    )
    columns = {
        "": lambda row: row["method"],
        "MB": lambda row: f"{row['size'] / 1e6:.1f}",
        "over the base": lambda row: f"{row['size'] / row['base']:.3f}",
        "seconds": lambda row: f"{table.middle(row):.1f}",
    }
    base = rows[0]["base"] / 1e6
    table.write(
        args,
        [
            f"{base:.1f} MB: the base's parameters in float32",
            table.of_rows(columns, rows),
        ],
        {row["method"]: row["size"] / 1e6 for row in rows},
        "MB",
    )


class Export(grid.Cell):
    """A way to export a model."""

    def __init__(self, name, size):
        import keras_dylora as kd

        self.name, self.model = name, competitors.keras_task(size)
        self.found = {"base": 4 * self.model.count_params()}
        kd.enable_dylora(self.model, rank=8)

    def measure(self, steps):
        with tempfile.TemporaryDirectory() as parent:
            start = time.perf_counter()
            self.write(pathlib.Path(parent, "export"))
            seconds = time.perf_counter() - start
            files = [f for f in pathlib.Path(parent).rglob("*") if f.is_file()]
            self.found["size"] = sum(f.stat().st_size for f in files)
        return {"seconds": seconds}

    def write(self, folder):
        import keras_dylora as kd

        if self.name == ONE:
            self.model.export(folder, verbose=False)
        elif self.name == EIGHT:
            for rank in range(1, 9):
                plain = kd.merge(self.model, rank)
                plain.export(folder / str(rank), verbose=False)
        else:
            kd.export_ranks(
                self.model,
                folder,
                layout="merged" if self.name == MERGED else "shared",
                verify=False,
                verbose=False,
            )

    def finish(self, steps):
        return self.found

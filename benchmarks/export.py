"""Size and time of every way to export eight ranks.

At the size of RoBERTa-base, 8 GB of disk are needed for a moment.
"""

import pathlib
import shutil
import tempfile
import time

from benchmarks import competitors, table
from examples import markdown


def main(args):
    import keras_dylora as kd

    model = competitors.keras_task(competitors.SIZES[args.size])
    base = 4 * model.count_params()
    kd.enable_dylora(model, rank=8)
    rows = {}
    for name, export in ways(model).items():
        parent = pathlib.Path(tempfile.mkdtemp())
        try:
            start = time.perf_counter()
            export(parent / "export")
            seconds = time.perf_counter() - start
            files = [f for f in parent.rglob("*") if f.is_file()]
            rows[name] = sum(f.stat().st_size for f in files), seconds
        finally:
            shutil.rmtree(parent)
        print(name, flush=True)
    table.write(
        args,
        [
            f"{base / 1e6:.1f} MB: the base's parameters in float32",
            markdown.table(
                ("", "MB", "over the base", "seconds"),
                [
                    (
                        name,
                        f"{size / 1e6:.1f}",
                        f"{size / base:.3f}",
                        f"{seconds:.1f}",
                    )
                    for name, (size, seconds) in rows.items()
                ],
            ),
        ],
        {name: size / 1e6 for name, (size, _) in rows.items()},
        "MB",
    )


def ways(model):
    import keras

    import keras_dylora as kd

    options = {"verify": False, "verbose": False}

    def one(folder):
        model.export(folder, verbose=False)

    def shared(folder):
        kd.export_ranks(model, folder, **options)

    def merged(folder):
        kd.export_ranks(model, folder, layout="merged", **options)

    def eight(folder):
        for rank in range(1, 9):
            kd.merge(model, rank).export(folder / str(rank), verbose=False)

    ours = {"shared, 8 ranks": shared, "merged, 8 ranks": merged}
    if keras.backend.backend() != "tensorflow":
        return ours  # Keras can't export this model with a free length.
    return {"one model.export()": one, **ours, "eight merge().export()": eight}

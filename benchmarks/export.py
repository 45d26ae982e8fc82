"""Size and time of every way to export eight ranks, at RoBERTa-base sizes.

    KERAS_BACKEND=tensorflow python -m benchmarks.export

Weights are random; about 13 GB of disk are needed for a moment.
"""

import pathlib
import shutil
import tempfile
import time

import keras_hub

import keras_dylora as kd


def roberta_base():
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=50265,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=512,
    )
    return keras_hub.models.RobertaTextClassifier(backbone, num_classes=2)


def eight_exports(model, folder):
    for rank in range(1, 9):
        kd.merge(model, rank).export(folder / str(rank), verbose=False)


def ways(model):
    options = {"verify": False, "verbose": False}
    return {
        "one model.export()": lambda folder: model.export(
            folder, verbose=False
        ),
        "shared, 8 ranks": lambda folder: kd.export_ranks(
            model, folder, **options
        ),
        "merged, 8 ranks": lambda folder: kd.export_ranks(
            model, folder, layout="merged", **options
        ),
        "eight merge().export()": lambda folder: eight_exports(model, folder),
    }


def main():
    model = roberta_base()
    base = 4 * model.count_params()
    kd.enable_dylora(model, rank=8)
    print(f"parameters of the base: {base / 1e6:.1f} MB of float32\n")
    print("| what | MB | over the base | seconds |\n|---|---|---|---|")
    for name, export in ways(model).items():
        parent = pathlib.Path(tempfile.mkdtemp())
        try:
            start = time.perf_counter()
            export(parent / "export")
            seconds = time.perf_counter() - start
            files = [f for f in parent.rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in files)
        finally:
            shutil.rmtree(parent)
        print(
            f"| {name} | {size / 1e6:.1f} | {size / base:.3f} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()

"""Exports of a model at every rank, and their sizes side by side.

Exports the MiniLM-L6 classifier with rank-8 adapters in both layouts:

    KERAS_BACKEND=jax python -m examples.export_every_rank --output serving

`--adapter demo/adapter` takes the adapter that the quickstart saved;
otherwise the adapters are untrained. `examples/serve_ranks.py` then answers
requests with TensorFlow alone.
"""

import argparse
import json
import pathlib

import keras_dylora as kd
from examples.data import NotFetchedError
from examples.presets import MINILM
from examples.quickstart import classifier


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="serving", type=pathlib.Path)
    parser.add_argument("--adapter", type=pathlib.Path)
    parser.add_argument("--rank", default=8, type=int)
    args = parser.parse_args(argv)

    try:
        model = classifier(MINILM, sequence_length=24)
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")
    if args.adapter:
        kd.load_adapter(model, args.adapter)
    else:
        kd.enable_dylora(model, rank=args.rank)
    base = 4 * model.count_params()
    print(f"parameters: {base / 1e6:.1f} MB")
    for layout in ("shared", "merged"):
        folder = args.output / layout
        kd.export_ranks(model, folder, layout=layout, overwrite=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(
            f"{layout}: ranks {manifest['ranks']} in {size / 1e6:.1f} MB, "
            f"{size / base:.2f} times the parameters"
        )
    print(
        "Next: a batch with a rank for each row, by TensorFlow alone,\n"
        f"  python examples/serve_ranks.py {args.output / 'shared'} 1 "
        f"{manifest['ranks'][-1]}"
    )


if __name__ == "__main__":
    main()

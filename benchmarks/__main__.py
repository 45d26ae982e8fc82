"""Speed, memory and size, side by side in one run.

python -m benchmarks step --backend jax
"""

import argparse
import importlib
import os
import pathlib

BENCHMARKS = (
    "step",
    "kinds",
    "memory",
    "ranks",
    "allocate",
    "export",
    "adapters",
    "generate",
    "gpu",
    "large",
    "growth",
)
# Where it isn't minilm.
DEFAULT_SIZES = {"generate": "gpt2", "gpu": "card", "large": "llama-1b"}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--backend",
        choices=("tensorflow", "jax", "torch"),
        help="jax; of gpu, every one that is installed",
    )
    parser.add_argument(
        "--size",
        choices=(
            "tiny",
            "small",
            "minilm",
            "roberta-base",
            "gpt2",
            "gpt2-medium",
            "llama-1b",
        ),
        help="minilm; of generate gpt2; of gpu roberta-base and gpt2-medium; "
        "of large llama-1b",
    )
    parser.add_argument(
        "--processes", default=2, type=int, help="fresh ones, a competitor"
    )
    parser.add_argument(
        "--rounds", default=4, type=int, help="of all competitors in turn"
    )
    parser.add_argument("--steps", default=8, type=int, help="a round")
    parser.add_argument(
        "--over",
        default="",
        help="of step and kinds: the ratios to what has this name",
    )
    parser.add_argument(
        "--axes", nargs="+", help="of growth: rank, layers, …; all of them"
    )
    parser.add_argument("--output", default="results", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.benchmark != "gpu":
        args.backend = args.backend or "jax"
        # The processes that measure inherit it.
        os.environ["KERAS_BACKEND"] = args.backend
    args.size = args.size or DEFAULT_SIZES.get(args.benchmark, "minilm")
    is_llama = args.size == "llama-1b"
    if args.size != "tiny" and is_llama != (args.benchmark == "large"):
        parser.error(
            "large is of llama-1b or tiny, and no other of llama-1b. "
            f"Received: {args.benchmark} --size {args.size}"
        )
    importlib.import_module(f"benchmarks.{args.benchmark}").main(args)


if __name__ == "__main__":
    main()

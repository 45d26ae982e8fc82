"""combine_adapters: one adapter made of several, on the same base."""

import math
import os
from collections.abc import Mapping
from typing import Literal

import keras
import numpy as np

from keras_dylora import ranks as rank_functions
from keras_dylora import training
from keras_dylora.adapters import sources, sums
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.allocation import Rank
from keras_dylora.checks import check_one_of, is_number
from keras_dylora.config import DyLoRAConfig
from keras_dylora.layers.tree import Tree
from keras_dylora.live.targets import listing

# The further options of the methods, with their defaults.
OPTIONS = {"density": None, "majority_sign_method": "total", "seed": 0}
METHODS: dict[str, tuple[str, ...]] = {
    "svd": (),
    "concatenate": (),
    "ties": ("density", "majority_sign_method"),
    "dare": ("density", "seed"),
}
MAJORITIES = "total", "frequency"


def combine_adapters(
    adapters: Mapping[str | os.PathLike[str], float],
    rank: Rank | None = None,
    method: Literal["svd", "concatenate", "ties", "dare"] = "svd",
    *,
    model: keras.Model | None = None,
    head: str | os.PathLike[str] | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> AdapterWeights:
    """Combines adapters of one base into a weighted sum of their updates.

    The kernel of each layer changes by `sum(weight * scale * down @ up)`:

    | method | what the result is | `add_weighted_adapter` of PEFT |
    |---|---|---|
    | `"svd"` | the adapter of `rank` that is closest to the sum | `"svd"` |
    | `"concatenate"` | the sum itself, with the ranks of all | `"cat"` |
    | `"ties"` | the largest values, by a vote on their sign | `"ties_svd"` |
    | `"dare"` | random values, made larger | `"dare_linear_svd"` |

    `"ties"` and `"dare"` also work on products, not on `down` and `up` by
    themselves, as many factors have the same product. They build the updates of
    one kernel at a time. The first two methods build nothing as large as a
    kernel. All methods but `"concatenate"` put the columns in order, as
    `order_ranks` does, so that lower ranks are good cuts.

    An adapter counts at its maximum rank, whatever `set_rank` says. If its
    layers have different ranks, it counts at those. Tuned cuts of lower ranks
    are ignored. The result has `scaling="constant"` and `min_rank=rank`, like a
    LoRA that was trained at one rank. `load_adapter` and `save_adapter` take
    it.

    Args:
        adapters: dict of a directory or a name to a weight, any finite number.
            A directory is one that `save_adapter` wrote. With `model`, it can
            also be a PEFT adapter that `from_peft` reads. A name is that of an
            adapter of the model, active or not, and is looked up first.
        rank: int, or `RankAllocation`. The rank of the result. Defaults to
            `None`: the highest rank of the adapters. With `"concatenate"`,
            which keeps all columns, it is the sum of their ranks, and no lower
            rank is allowed.
        method: str. Defaults to `"svd"`.
        model: a built model, enabled or not. It isn't changed. Defaults to
            `None`.
        head: a key of `adapters`. The result gets the task head of this
            adapter, and everything else that it trained in full. Defaults to
            `None`: the weighted mean of all.
        density: float in `(0, 1]`. The share of the values that are kept.
            `"ties"` and `"dare"` need it.
        majority_sign_method: str. Whether the votes of `"ties"` are the values
            (`"total"`) or only their signs (`"frequency"`). Defaults to
            `"total"`.
        seed: int. The seed of `"dare"`. Defaults to `0`.

    Returns:
        An `AdapterWeights`, in NumPy.
        `load_adapter(model, weights, name="both")` puts it on a model, and
        `save_adapter(weights, "both/")` writes it.

    Raises:
        TypeError: if `adapters` isn't a dict, or a key, a weight or a rank has
            the wrong type.
        ValueError: if a value is out of range or not for the method; if a key
            is neither a directory nor a name; if the adapters are of different
            models or bases, or adapt different layers; or if their heads can't
            be averaged.

    Example:

    ```python
    both = keras_dylora.combine_adapters({"german/": 0.7, "french/": 0.3})
    keras_dylora.load_adapter(clf, both, name="both")

    names = {"german": 1.0, "french": 1.0}
    clf_both = keras_dylora.combine_adapters(
        names, 8, "ties", model=clf, density=0.5
    )
    keras_dylora.save_adapter(clf_both, "both/", rank=4)
    ```

    Reference:

    - [TIES, 2023](https://arxiv.org/abs/2306.01708)
    - [DARE, 2023](https://arxiv.org/abs/2311.03099)
    - [PEFT](https://huggingface.co/docs/peft/developer_guides/model_merging)
    """
    options = {
        "density": density,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
    }
    _check_method(method, options)
    _check_adapters(adapters, head)
    tree = None
    if model is not None:
        training.write_back(model)
        tree = Tree(model)
    read = sources.of_one_model(
        {k: sources.read(k, tree, head in (None, k)) for k in adapters}, tree
    )
    sources.check_layers(read)
    weights = dict(zip(read, map(float, adapters.values()), strict=True))
    trained = _trained(read, weights, head)
    first = next(iter(read.values()))
    scale = first.config.scale.at(first.config.rank)
    layers = _summed(read, weights, rank, method, scale, options)
    highest = max(x.rank for x in layers.values())
    config = DyLoRAConfig(
        rank=highest,
        min_rank=highest,
        alpha=scale * highest,
        scaling="constant",
        dropout=first.config.dropout,
        target_layers=list(layers),
        trainable_tokens=_tokens(read, head),
    )
    return AdapterWeights(layers, trained, config, first.identity)


def _check_method(method, options):
    check_one_of("method", method, METHODS)
    for name, value in options.items():
        if name not in METHODS[method] and value != OPTIONS[name]:
            raise ValueError(
                f"The method {method!r} takes no `{name}`. "
                f"Received: {name}={value!r}"
            )
    density = options["density"]
    if "density" in METHODS[method] and not (
        is_number(density) and 0 < density <= 1
    ):
        raise ValueError(
            f"The method {method!r} needs a `density` in (0, 1]. "
            f"Received: density={density!r}"
        )
    majority = options["majority_sign_method"]
    check_one_of("majority_sign_method", majority, MAJORITIES)
    rank_functions.as_rank(options["seed"], 0, name="seed")


def _check_adapters(adapters, head):
    if not isinstance(adapters, Mapping):
        raise TypeError(
            "`adapters` must be a dict of names or directories to weights. "
            f"Received: adapters={adapters!r} (of type "
            f"{type(adapters).__name__})"
        )
    if not adapters:
        raise ValueError(
            "`adapters` must have at least one entry. Received: adapters={}"
        )
    for key, weight in adapters.items():
        if not isinstance(key, (str, os.PathLike)) or not is_number(weight):
            raise TypeError(
                "`adapters` must be a dict of names or directories to weights, "
                f"which are numbers. Received: {key!r}: {weight!r}"
            )
        if not math.isfinite(weight):
            raise ValueError(
                f"Weights must be finite. Received: {key!r}: {weight!r}"
            )
    if head is not None and head not in adapters:
        raise ValueError(
            "`head` must be one of the adapters. "
            f"Received: head={head!r} for {list(adapters)}"
        )


def _trained(adapters, weights, head):
    """The weights that are trained in full: those of one, or their mean."""
    if head is not None:
        return adapters[head].trained
    (one, first), *others = adapters.items()
    shapes = {path: x.shape for path, x in first.trained.items()}
    for key, other in others:
        theirs = {path: x.shape for path, x in other.trained.items()}
        unlike = [
            f"{path}: {shapes.get(path)} and {theirs.get(path)}"
            for path in shapes | theirs
            if shapes.get(path) != theirs.get(path)
        ]
        if unlike:
            raise ValueError(
                "Heads, and whatever else was trained in full, must have the "
                "same weights and shapes to be averaged. `head=…` names the "
                "adapter whose head the result gets. Received, for "
                f"{one!r} and {key!r}: {listing(unlike)}"
            )
    total = sum(weights.values())
    if shapes and total <= 0:
        raise ValueError(
            "Weights must have a positive sum to average heads. `head=…` names "
            "the adapter whose head the result gets. "
            f"Received: weights {weights}"
        )
    return {
        path: sum(
            x.trained[path] * np.float32(weights[key] / total)
            for key, x in adapters.items()
        )
        for path in shapes
    }


def _tokens(adapters, head):
    """The tokens whose rows are trained in full, or `None`."""
    found = {
        key: x.config.trainable_tokens if x.has_tokens else None
        for key, x in adapters.items()
    }
    if head is not None:
        return found[head]
    if len(set(found.values())) > 1:
        raise ValueError(
            "Adapters must have the same `trainable_tokens` to be averaged. "
            "`head=…` names the adapter whose tokens the result gets. "
            f"Received: {found}"
        )
    return next(iter(found.values()))


def _summed(adapters, weights, rank, method, scale, options):
    """Dict of path to the `Factors` of the sum."""
    parts = {
        path: [(weights[key], x.layers[path]) for key, x in adapters.items()]
        for path in next(iter(adapters.values())).layers
    }
    columns = {p: sum(x.rank for _, x in each) for p, each in parts.items()}
    high = max(columns.values())
    if rank is None:
        rank = max(x.config.rank for x in adapters.values())
        rank = high if method == "concatenate" else rank
    exact = method in ("svd", "concatenate")
    bound = high if exact else rank_functions.INT32_MAX
    ranks = rank_functions.by_layer(rank, dict.fromkeys(parts, bound), 1)
    if method == "concatenate":
        if max(ranks.values()) < high:
            raise ValueError(
                "The method 'concatenate' keeps all columns; use 'svd' to cut. "
                f"Received: rank={rank!r} of {high}"
            )
        return {p: sums.concatenated(x, scale) for p, x in parts.items()}
    if method == "svd":
        return {
            path: sums.closest(each, ranks[path], scale)
            for path, each in parts.items()
        }
    rng = np.random.default_rng(options["seed"])
    density, found = options["density"], {}
    for path, each in parts.items():
        if not (columns[path] and ranks[path]):
            found[path] = sums.closest(each, 0, scale)
            continue
        if method == "ties":
            majority = options["majority_sign_method"]
            update = sums.ties(each, density, majority)
        else:
            update = sums.dare(each, density, rng)
        found[path] = sums.closest_to(update, ranks[path], scale)
    return found

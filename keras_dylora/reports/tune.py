"""tune_ranks: the best cut of trained columns, for each rank that is used.

All cuts are tuned at once: the examples of a batch take turns, so that a pass
serves each cut. With one layer's columns `down` and rows `up`, cut `c` computes
`(x @ down) @ left[c] @ right[c] @ up`; nothing but `left` and `right` changes.
"""

from collections.abc import Iterable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_dylora import ranks as rank_functions
from keras_dylora import training
from keras_dylora.allocation import Rank
from keras_dylora.distributions import Categorical
from keras_dylora.layers.tuned import TunedCut
from keras_dylora.live.model import Model, adaptation_of
from keras_dylora.reports.evaluation import check_compiled
from keras_dylora.reports.evaluation_data import cycled

STEPS = 100
RATE = 0.05  # Adam's, which falls to zero in a line
DECAYS = 0.9, 0.98


def tune_ranks(
    model: Model,
    x: Any,
    y: Any = None,
    ranks: Iterable[Rank] | None = None,
    steps: int | None = None,
    sample_weight: Any = None,
    batch_size: int = 32,
    verbose: int | Literal["auto"] = "auto",
) -> Model:
    """Tunes the cut of each rank, so that lower ranks lose less.

    Rank `b` is the first `b` columns of every adapter. Tuned, it is the best
    `b` mixtures of all columns, found on some batches of the training data,
    while the base, the adapters and the head stay as they are. The model
    computes with a tuned cut wherever its rank is used: `set_rank`,
    `evaluate_ranks`, `merge`, `save_adapter`, `to_peft`, `export_ranks`. Cut
    so, the adapter is a plain LoRA of rank `b`.

    The maximum rank needs no cut. Training goes on from the columns as they
    are, without the tuned cuts, which are dropped then. The result is the same
    each time.

    Args:
        model: an enabled, compiled model that is trained. It may be a LoRA
            whose columns `order_ranks` put in order, also one of `from_peft`.
        x: inputs, as for `model.evaluate`, of the training data.
        y: targets, as for `model.evaluate`.
        ranks: ints below the maximum, and `RankAllocation`s. Defaults to
            `None`: those of a `Categorical` distribution, otherwise the
            powers of two.
        steps: int. How many batches are taken. Defaults to `None`, 100.
        sample_weight: as for `model.evaluate`. Defaults to `None`.
        batch_size: int. Examples of a step, which the cuts share; a dataset
            has its own. Defaults to `32`.
        verbose: whether to show a progress bar. Defaults to `"auto"`, yes.

    Returns:
        `model` itself. Cuts of other ranks that it had are kept.

    Raises:
        TypeError: if a rank or `steps` isn't an integer.
        ValueError: if a rank isn't in `1..maximum - 1`, an allocation is of
            another model or at the maximum everywhere, the data is empty or
            lacks targets, the model isn't enabled or compiled, or no adapter
            was ever trained. The model keeps the cuts that it had.

    Example:

    ```python
    keras_dylora.tune_ranks(clf, texts, labels, ranks=[1, 2, 4])
    print(keras_dylora.evaluate_ranks(clf, val_texts, val_labels))
    ```

    Reference:

    - [LoRA-XS, 2024](https://arxiv.org/abs/2405.17604), whose core this is
    """
    adaptation = adaptation_of(model)
    check_compiled(model)
    training.write_back(model)
    chosen = _chosen(adaptation, ranks)
    steps = rank_functions.as_rank(
        STEPS if steps is None else steps, 1, name="steps"
    )
    layers = adaptation.layers.values()
    if not any(ops.convert_to_numpy(x.up).any() for x in layers):
        raise ValueError(
            "Cuts of trained columns are tuned, so the model must be trained "
            f"first. Received: {model.name}, whose adapters add nothing yet"
        )
    cuts = _Tuning(model, chosen).run(
        cycled(model, x, y, sample_weight, batch_size, steps),
        steps,
        keras.utils.Progbar(steps, verbose=int(verbose != 0)),
    )
    known = [c for c in adaptation.named.cuts if c.ranks not in chosen]
    adaptation.set_tuned_cuts([*known, *cuts])
    return model


def _chosen(adaptation, ranks):
    """The ranks as dicts of path to rank, each once."""
    high = adaptation.max_rank
    if ranks is None:
        distribution = adaptation.config.distribution
        ranks = [2**i for i in range(high.bit_length())]
        if isinstance(distribution, Categorical):
            ranks = list(distribution.by_rank)
        ranks = [b for b in ranks if b < high]
    chosen = []
    for each in rank_functions.as_list(ranks):
        by_path = rank_functions.by_layer(each, adaptation.layers, high, 1)
        if min(by_path.values()) == high:
            raise ValueError(
                "A cut is below the maximum rank, which has all columns. "
                f"Received: rank={each!r} of a model of rank {high}"
            )
        if by_path not in chosen:
            chosen.append(by_path)
    if not chosen:
        raise ValueError(
            "`ranks` must name a rank below the maximum. "
            f"Received: ranks={ranks!r} for a model of rank {high}"
        )
    return chosen


class _Tuning:
    """The cuts of some ranks, tuned together.

    Args:
        model: an enabled model.
        chosen: list of dicts of path to rank.
    """

    def __init__(self, model, chosen):
        self.model, self.chosen = model, chosen
        config, self.paths = model.dylora_config, list(chosen[0])
        ranks = np.array([list(each.values()) for each in chosen])
        eye = np.eye(config.rank)[:, : ranks.max()]
        # Entries beyond the rank of a layer are zero, and so stay: each side
        # is multiplied by zeros of the other.
        used = np.arange(ranks.max()) < ranks[..., None]
        self.left = (eye * used[..., None, :]).astype("float32")
        self.right = self.left.swapaxes(-1, -2).copy()
        scale = np.vectorize(config.scale.at)(np.maximum(ranks, 1))
        self.scale = scale.astype("float32")[..., None, None]

    def run(self, batches, steps, bar):
        """The `TunedCut`s, in the order of the ranks."""
        gradient = training.loss_gradient(self.model, self._cores)
        rate = keras.optimizers.schedules.PolynomialDecay(RATE, steps, 0.0)
        optimizer = keras.optimizers.Adam(rate, *DECAYS, epsilon=1e-9)
        sides = [keras.Variable(x) for x in (self.left, self.right)]
        optimizer.build(sides)
        for step, batch in zip(range(steps), batches, strict=False):
            size = len(keras.tree.flatten(batch)[0])
            turns = (np.arange(size) + step) % len(self.chosen)
            values = [ops.convert_to_numpy(v) for v in sides]
            loss, gradients = gradient(values, turns.astype("int32"), batch)
            optimizer.apply(
                [ops.convert_to_tensor(g.astype("float32")) for g in gradients],
                sides,
            )
            bar.add(1, [("loss", loss)])
        left, right = (ops.convert_to_numpy(v) for v in sides)
        return [
            TunedCut(
                {p: left[c, i, :, :b] for i, (p, b) in enumerate(each.items())},
                {p: right[c, i, :b] for i, (p, b) in enumerate(each.items())},
            )
            for c, each in enumerate(self.chosen)
        ]

    def _cores(self, sides, turns):
        """What the layers read: one core, or that of each example's turn."""
        left, right = sides
        cores = ops.convert_to_tensor(self.scale) * (left @ right)
        found = {}
        for i, path in enumerate(self.paths):
            each = cores[:, i]
            if len(self.chosen) > 1:
                each = ops.take(each, turns, axis=0)
            found[path] = each
        return found

"""tune_ranks: finds the best cut of trained columns for each rank."""

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import keras
from keras import ops

from keras_dylora import ranks as rank_functions
from keras_dylora import training
from keras_dylora.allocation import Rank
from keras_dylora.live.model import Model, adaptation_of
from keras_dylora.live.tuning import Tuning
from keras_dylora.reports.evaluation import check_compiled
from keras_dylora.reports.evaluation_data import cycled

STEPS = 100


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

    An untuned rank `b` is the first `b` columns of every adapter. A tuned rank
    `b` is the best `b` mixtures of all columns. They are found on some batches
    of the training data, while the base, the adapters and the head stay as
    they are. The model computes with a tuned cut wherever its rank is used:
    `set_rank`, `evaluate_ranks`, `merge`, `save_adapter`, `to_peft`,
    `export_ranks`. A tuned cut is a plain LoRA of rank `b`.

    The maximum rank needs no cut. If you train on, the columns move, and the
    tuned cuts are dropped. The result is the same each time.

    Args:
        model: an enabled, compiled model that is trained. It may be a LoRA
            whose columns `order_ranks` put in order, also one of `from_peft`.
        x: inputs, as for `model.evaluate`, of the training data.
        y: targets, as for `model.evaluate`.
        ranks: ints below the maximum, and `RankAllocation`s. Defaults to
            `None`: the ranks of a `Categorical` distribution, otherwise the
            powers of two.
        steps: int. The number of batches. Defaults to `None`, 100.
        sample_weight: as for `model.evaluate`. Defaults to `None`.
        batch_size: int. The number of examples in a step, which the cuts
            share. A dataset has its own. Defaults to `32`.
        verbose: whether to show a progress bar. Defaults to `"auto"`, yes.

    Returns:
        `model` itself. It keeps the cuts of other ranks that it had.

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

    - [LoRA-XS, 2024](https://arxiv.org/abs/2405.17604), for the core
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
    tuning = Tuning(model, chosen, steps)
    bar = keras.utils.Progbar(steps, verbose=int(verbose != 0))
    batches = cycled(model, x, y, sample_weight, batch_size, steps)
    for batch in itertools.islice(batches, steps):
        loss = tuning.step(batch)
        bar.add(1, [("loss", loss)])
    known = [c for c in adaptation.named.cuts if c.ranks not in chosen]
    adaptation.set_tuned_cuts([*known, *tuning.cuts()])
    return model


def _chosen(adaptation, ranks):
    """The ranks as dicts of path to rank, without duplicates."""
    high = adaptation.max_rank
    if ranks is None:
        ranks = [b for b in adaptation.config.tuned_ranks if b < high]
    chosen = []
    for each in rank_functions.as_list(ranks):
        by_path = adaptation.by_layer(each, 1)
        if by_path == adaptation.max_ranks:
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

"""order_ranks: columns sorted by their weight, so that every cut is good."""

import dataclasses
import warnings

import numpy as np

from keras_dylora import training
from keras_dylora.live.model import Model, adaptation_of


def order_ranks(model: Model) -> Model:
    """Sorts the columns of every adapter by their weight, in place.

    Then the first `b` columns are the adapter of rank `b` that is closest to
    the whole (Eckart and Young). So a LoRA that was trained at one rank can be
    used at every lower rank: call `order_ranks`, then `set_rank`, `truncate` or
    `evaluate_ranks`. The outputs at the maximum rank stay the same, and so do
    those at ranks that `tune_ranks` tuned. The state that the optimizer keeps
    for the columns is transformed with them.

    Lower ranks then have the scale of the maximum rank: `scaling` becomes
    `"constant"`. During `full_rank_steps`, the call ends these steps, and
    `scaling` stays as it is. `fit` makes this call itself; a training loop of
    your own must make it.

    Args:
        model: an enabled model or a `DyLoRAModel`.

    Returns:
        `model` itself.

    Raises:
        ValueError: if the model isn't enabled, or an adapter isn't finite.

    Warns:
        UserWarning: if the model may have been trained at lower ranks with
            another scaling. What it computed at these ranks is lost.

    Example:

    ```python
    keras_dylora.enable_dylora(clf, rank=8, min_rank=8)  # LoRA
    clf.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    clf.fit(texts, labels)
    keras_dylora.order_ranks(clf)
    print(keras_dylora.evaluate_ranks(clf, val_texts, val_labels))
    ```

    Reference:

    - [Eckart and Young, 1936](https://doi.org/10.1007/BF02288367)
    - [LoRA-Squeeze, 2026](https://arxiv.org/abs/2602.10993)
    """
    adaptation = adaptation_of(model)
    config = adaptation.config
    training.write_back(model)
    pending = training.at_full_rank(adaptation)
    if not pending and config.scaling != "constant":
        adaptation.named.check_alone("A change of `scaling`")
    optimizer = getattr(model, "optimizer", None)
    if pending or config.scaling == "constant":
        training.order_columns(model, optimizer)
        return model
    alpha, before = config.scale.at(config.rank) * config.rank, config.scale
    after = dataclasses.replace(config, scaling="constant", alpha=alpha)
    changed = training.order_columns(model, optimizer, after.scale)
    if changed and config.min_rank < config.rank:
        warnings.warn(
            "Columns are ordered for one scale at all ranks. What this model "
            f"computed at ranks {config.min_rank}..{config.rank - 1}, if it "
            "was trained at them, is lost; the maximum rank is unchanged. "
            "Train with `scaling='constant'`, or train lower ranks only after "
            f"the order. Received: scaling={config.scaling!r}",
            stacklevel=2,
        )
    config = after
    cuts = [
        cut.mapped(
            lambda _, x: x,
            lambda _, x: x * np.float32(_ratio(before, config.scale, len(x))),
        )
        for cut in adaptation.named.cuts
    ]
    spec = adaptation.spec.with_config(config)
    for path, layer in adaptation.layers.items():
        layer.set_arguments(spec.adapted[path])
    for gate in adaptation.gates:
        gate.rescale(config.scale)
    adaptation.reconfigure(config)
    adaptation.set_tuned_cuts(cuts)
    return model


def _ratio(before, after, rank):
    return before.at(rank) / after.at(rank) if rank else 1.0

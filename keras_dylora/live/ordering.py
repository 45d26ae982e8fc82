"""order_ranks: columns in the order of their weight, so that a cut is good."""

import dataclasses
import warnings

import numpy as np

from keras_dylora import training
from keras_dylora.live.model import Model, adaptation_of


def order_ranks(model: Model) -> Model:
    """Puts the columns of every adapter in the order of their weight, in place.

    Of all adapters of a lower rank, the first columns are then the one that is
    closest to the whole (Eckart and Young). So a LoRA that was trained at one
    rank can be used at each: `order_ranks`, then `set_rank`, `truncate` or
    `evaluate_ranks`. What the model computes at the maximum rank stays, and
    what the optimizer keeps for the columns is turned with them.

    At a rank that `tune_ranks` tuned, the model computes what it did.

    Lower ranks are at the scale of the maximum then: `scaling` becomes
    `"constant"`. Within `full_rank_steps` it ends them, and `scaling` stays;
    `fit` does so by itself, a training loop of your own calls this.

    Args:
        model: an enabled model or a `DyLoRAModel`.

    Returns:
        `model` itself.

    Raises:
        ValueError: if the model isn't enabled, or an adapter isn't finite.

    Warns:
        UserWarning: if lower ranks of the model, at which it may have been
            trained, are scaled otherwise. What they compute is lost.

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
            "was trained at them, is lost; the maximum is as it was. "
            "Train with `scaling='constant'`, or at lower ranks after the "
            f"order only. Received: scaling={config.scaling!r}",
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

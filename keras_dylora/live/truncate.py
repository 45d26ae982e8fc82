"""truncate: a live model cut to a lower maximum rank."""

import warnings

from keras_dylora import training
from keras_dylora.allocation import Rank, RankAllocation
from keras_dylora.layers.gate import GateRow, RankGate
from keras_dylora.live.model import Model, adaptation_of
from keras_dylora.live.recompile import new_optimizer


def truncate(model: Model, rank: Rank) -> Model:
    """Cuts the adapters of a live model to a lower maximum rank, in place.

    Outputs at ranks up to the new maximum stay the same. Training continues at
    the same position of the rank sequence, with ranks up to the new maximum and
    a new optimizer state.

    If `tune_ranks` tuned the new maximum rank, the outputs at that rank stay
    the same. Tuned cuts of lower ranks are dropped, as they mix columns that
    are gone.

    A `RankAllocation` becomes the current rank of the model, and its highest
    rank becomes the maximum. In each layer, the columns above the layer's rank
    are zero and stay zero.

    Args:
        model: an enabled model or a `DyLoRAModel`.
        rank: int in `1..config.rank`, the new maximum rank; or
            `RankAllocation`.

    Returns:
        `model` itself.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range or the model isn't enabled.

    Warns:
        UserWarning: if tuned cuts of lower ranks are dropped.

    Example:

    ```python
    keras_dylora.truncate(clf, 4)
    clf.fit(texts, labels)
    ```
    """
    adaptation = adaptation_of(model)
    adaptation.named.check_alone("`truncate`")
    kept = adaptation.by_layer(rank, 1)
    training.write_back(model)
    active = kept
    if not isinstance(rank, RankAllocation):
        active = {p: min(b, rank) for p, b in adaptation.ranks.items()}
    layers = adaptation.layers
    adaptation.warn_of_cut(rank)
    factors = adaptation.factors(kept)
    cuts = adaptation.named.cuts
    if kept != adaptation.max_ranks:
        cuts = []
    lost = [cut for cut in adaptation.named.cuts if cut.ranks != kept]
    if lost and not cuts:
        warnings.warn(
            "A tuned cut mixes all columns of an adapter, so `truncate` keeps "
            "only that of the new maximum. Call `tune_ranks` again for lower "
            f"ranks. Received: rank={rank!r} for a model with "
            f"{len(lost)} other tuned cuts",
            stacklevel=2,
        )
    config = adaptation.config.at_maximum(max(kept.values()))
    spec, optimizer = adaptation.spec.with_config(config), new_optimizer(model)
    highest = {path: each.rank for path, each in spec.adapted.items()}
    cut = {
        id(gate): RankGate(rows, config.scale)
        for gate, rows in adaptation.by_gate(highest).items()
    }
    for path, layer in layers.items():
        row = GateRow(cut[id(layer._gate.gate)], layer._gate.index)
        layer.truncate(spec.adapted[path], row, factors[path])
    adaptation.named.cuts = []
    adaptation.reconfigure(config, optimizer)
    adaptation.set_tuned_cuts(cuts)
    adaptation.set_ranks(active)
    return model

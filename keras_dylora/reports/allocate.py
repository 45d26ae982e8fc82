"""allocate_ranks: the best rank of each layer within a number of parameters.

The search treats ranks as real numbers: at `2.25`, the gate of a layer is three
quarters of that of rank 2 and a quarter of that of rank 3. So the loss has a
gradient with respect to the ranks, and one pass says for every layer how much
more rank would help there. The ranks move along the gradient per parameter,
with as many parameters up as down. At the end, they are rounded.
"""

import numbers
from collections.abc import Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_dylora import training
from keras_dylora.allocation import RankAllocation
from keras_dylora.layers.kinds import matrix_shape
from keras_dylora.live.model import adaptation_of
from keras_dylora.reports.evaluation import check_compiled
from keras_dylora.reports.evaluation_data import cycled

STEPS = 24  # of a search for one budget, each with one batch
FIRST, LAST = 0.1, 0.0125  # largest change in a step, as a share of the maximum
MOMENTUM = 0.5


@overload
def allocate_ranks(
    model: keras.Model,
    x: Any,
    y: Any = None,
    budget: float = 0.5,
    sample_weight: Any = None,
    batch_size: int = 32,
    verbose: int | Literal["auto"] = "auto",
) -> RankAllocation: ...


@overload
def allocate_ranks(
    model: keras.Model,
    x: Any,
    y: Any = None,
    budget: Sequence[float] = ...,
    sample_weight: Any = None,
    batch_size: int = 32,
    verbose: int | Literal["auto"] = "auto",
) -> list[RankAllocation]: ...


def allocate_ranks(
    model: keras.Model,
    x: Any,
    y: Any = None,
    budget: float | Sequence[float] = 0.5,
    sample_weight: Any = None,
    batch_size: int = 32,
    verbose: int | Literal["auto"] = "auto",
) -> RankAllocation | list[RankAllocation]:
    """Finds a rank for each layer under a budget of adapter parameters.

    Layers gain from rank by different amounts. A model that was trained for
    every rank can have another rank in each layer, without more training. The
    search follows the gradient of the loss with respect to the ranks. A few
    hundred examples of the training data are enough for it. The model doesn't
    change, and the result is the same each time.

    Args:
        model: an enabled, compiled model that was trained for every rank, or
            whose columns are ordered.
        x: inputs, as for `model.evaluate`.
        y: targets, as for `model.evaluate`.
        budget: float in `(0, 1]`, a share of the adapters' parameters at the
            maximum rank; or int, a number of parameters; or an ascending list
            of these. In a list, each allocation is within the next one, so one
            adapter at the last allocation serves all. Defaults to `0.5`.
        sample_weight: as for `model.evaluate`. Defaults to `None`.
        batch_size: int. The number of examples in a step; there are 24 steps
            for each budget. A dataset has its own batches. Defaults to `32`.
        verbose: whether to show a progress bar. Defaults to `"auto"`: yes.

    Returns:
        A `RankAllocation`, or a list of them for a list of budgets.

    Raises:
        TypeError: if a budget isn't a number.
        ValueError: if a budget is out of range or less than one column; if the
            list isn't ascending; if the data is empty or lacks targets; or if
            the model isn't enabled or compiled.

    Warns:
        UserWarning: if the model was neither trained at the lower ranks nor
            ordered.

    Example:

    ```python
    small = keras_dylora.allocate_ranks(clf, texts[:400], labels[:400], 0.25)
    print(keras_dylora.evaluate_ranks(clf, val_texts, val_labels, [2, small]))
    keras_dylora.save_adapter(clf, "small/", rank=small)
    ```
    """
    adaptation = adaptation_of(model)
    check_compiled(model)
    search = _Search(model)
    sizes = search.sizes(budget)
    adaptation.warn_of_cut(1)
    steps = STEPS * len(sizes)
    batches = cycled(model, x, y, sample_weight, batch_size, steps)
    bar = keras.utils.Progbar(steps, verbose=int(verbose != 0))
    training.write_back(model)
    found = [
        RankAllocation.of(
            model, dict(zip(adaptation.layers, ranks, strict=True))
        )
        for ranks in search.run(sizes, batches, bar)
    ]
    return found if isinstance(budget, (list, tuple)) else found[0]


class _Search:
    """Ranks of the layers as real numbers, within a number of parameters."""

    def __init__(self, model):
        self.model = model
        config = model.dylora_config
        self.high = np.array([*model._dylora.max_ranks.values()])
        self.gates = keras.ops.convert_to_numpy(
            config.scale.gate(np.arange(self.high.max() + 1))
        )
        self.costs = np.array(
            [sum(matrix_shape(x)) for x in model.dylora_layers]
        )

    def sizes(self, budget):
        """The budgets as numbers of parameters."""
        budgets = budget if isinstance(budget, (list, tuple)) else [budget]
        whole, least = self.high @ self.costs, self.costs.min()
        found = []
        for each in budgets:
            if isinstance(each, bool) or not isinstance(each, numbers.Real):
                raise TypeError(
                    "`budget` must be a share or a number of parameters. "
                    f"Received: budget={budget!r}"
                )
            share = not isinstance(each, numbers.Integral)
            size = each * whole + 1e-6 if share else each
            if not least <= size < whole + 1:
                raise ValueError(
                    f"`budget` must be from {least} parameters, which is one "
                    f"column of the smallest layer, to {whole}, or a share "
                    f"of the latter. Received: budget={budget!r}"
                )
            found.append(int(size))
        if not found or sorted(set(found)) != found:
            raise ValueError(
                "A list of budgets must be ascending. "
                f"Received: budget={budget!r}"
            )
        return found

    def run(self, sizes, batches, bar):
        """Integer ranks for each ascending size; each is within the next."""
        layers = self.model._dylora.layers
        gradient = training.loss_gradient(
            self.model,
            lambda values, _: {p: values[0][i] for i, p in enumerate(layers)},
        )
        lowest, found = np.zeros(len(self.costs), int), []
        for size in sizes:
            free = self.high - lowest
            share = (size - lowest @ self.costs) / (free @ self.costs or 1)
            ranks = lowest + share * free
            ranks = self.anneal(ranks, size, lowest, gradient, batches, bar)
            lowest = self.rounded(ranks, size)
            found.append(lowest.tolist())
        return found

    def anneal(self, ranks, size, lowest, gradient, batches, bar):
        """Moves the ranks for `STEPS` steps; the mean of the last quarter."""
        gain, last = 0.0, []
        for step, batch in zip(range(STEPS), batches, strict=False):
            new = self.gain(ranks, gradient, batch)
            gain = MOMENTUM * gain + (1 - MOMENTUM) * new if step else new
            change = FIRST * (LAST / FIRST) ** (step / (STEPS - 1))
            change *= self.high.max()
            ranks = self.moved(ranks, gain, change, size, lowest)
            if step >= 0.75 * STEPS:
                last.append(ranks)
            bar.add(1)
        return np.mean(last, axis=0)

    def gain(self, ranks, gradient, batch):
        """How much more rank lowers the loss, per parameter."""
        below, above = np.floor(ranks), np.ceil(ranks)
        share = (ranks - below)[:, None]
        gates = self.gates[below.astype(int)] * (1 - share)
        gates += self.gates[above.astype(int)] * share
        # At an integer, the mean of both sides.
        low = np.maximum(above - 1, 0).astype(int)
        high = np.minimum(below + 1, self.high).astype(int)
        slope = (self.gates[high] - self.gates[low]) / (high - low)[:, None]
        _, (found,) = gradient([gates], (), batch)
        return -np.sum(found * slope, axis=1) / self.costs

    def moved(self, ranks, gain, change, size, lowest):
        """The ranks after a step of at most `change`, at a given size.

        A layer gains rank if its gain is above a price, and loses rank if it is
        below. The price is the one that gives the size.
        """
        gain = gain / (np.median(np.abs(gain)) or 1.0)

        def at(price):
            step = change * np.tanh((gain - price) / 2)
            return np.clip(ranks + step, lowest, self.high)

        low, high = gain.min() - 50, gain.max() + 50
        for _ in range(60):
            price = (low + high) / 2
            low, high = (
                (price, high) if at(price) @ self.costs > size else (low, price)
            )
        return at(high)

    def rounded(self, ranks, size):
        """Rounds down, then up where most was lost, as long as one fits."""
        whole = np.floor(ranks + 1e-6).astype(int)
        while True:
            fits = whole @ self.costs + self.costs <= size
            free = np.flatnonzero(fits & (whole < self.high))
            if not len(free):
                return whole
            lost = ranks[free] - whole[free]
            whole[free[np.argmax(lost)]] += 1

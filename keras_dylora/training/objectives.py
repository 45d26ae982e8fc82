"""The objectives: what gate a step has, and what loss.

An objective is one class: its name in `OBJECTIVES` is the one that
`DyLoRAConfig` takes.
"""

import contextlib

from keras import ops

from keras_dylora import ranks


class Sampled:
    """One rank is drawn for a step (Algorithm 1)."""

    draws = True

    def __init__(self, config):
        self.config = config

    def gate(self, adaptation):
        """The gate `(rank,)` of a step, and a dict of what the step logs.

        If a rank is drawn, the model's place in the rank sequence moves on.
        """
        rank = adaptation.draw(adaptation.ranks_drawn)
        adaptation.ranks_drawn.assign(adaptation.ranks_drawn + 1)
        return self._gate_at(rank), {"rank": rank}

    def loss(self, model, forward, compute_loss, x, y, y_pred, *args, **kwargs):
        """The loss of a step, a scalar tensor.

        Args:
            model: the `DyLoRAModel`.
            forward: a context manager of the model and `x` that yields
                predictions; within it, `model.losses` are of that call.
            compute_loss: Keras's, which takes all other arguments; `y_pred`
                are predictions at the gate of the step.
        """
        return compute_loss(x, y, y_pred, *args, **kwargs)

    def _gate_at(self, rank):
        return ranks.gate(rank, self.config.rank, self.config.alpha)


class Summed(Sampled):
    """The loss at every rank, weighted by its probability (Eq. 2).

    Keras's own step calls it, so its gradients, loss scaling and metrics (of
    the highest rank that is trained) are Keras's. What layers add to the
    loss, as activity regularization, is of the same rank.
    """

    draws = False

    def gate(self, adaptation):
        return self._gate_at(max(self.config.rank_probabilities)), {}

    def loss(self, model, forward, compute_loss, x, y, y_pred, *args, **kwargs):
        total, probabilities = 0.0, self.config.rank_probabilities
        highest = max(probabilities)
        # The highest first, while `model.losses` are those beside `y_pred`.
        for b in sorted(probabilities, reverse=True):
            if b == highest:
                loss = compute_loss(x, y, y_pred, *args, **kwargs)
            else:
                with (
                    _unchanged(model.metrics_variables),
                    model._dylora.overridden(self._gate_at(b)),
                    forward(model, x) as predictions,
                ):
                    loss = compute_loss(x, y, predictions, *args, **kwargs)
            total = total + probabilities[b] * loss
        return total


class Matryoshka(Sampled):
    """One pass at the mean of the ranks' gates: MatryoshkaLoRA's diagonal.

    Reference: [Modoranu et al., 2026](https://arxiv.org/abs/2605.07850)
    """

    draws = False

    def gate(self, adaptation):
        probabilities = self.config.rank_probabilities
        weights = ops.convert_to_tensor(list(probabilities.values()), "float32")
        return ops.matmul(weights, self._gate_at(list(probabilities))), {}


OBJECTIVES = {
    "sampled": Sampled,
    "summed": Summed,
    "matryoshka": Matryoshka,
}


@contextlib.contextmanager
def _unchanged(variables):
    """Gives variables their values back at the end of a `with` block."""
    values = [ops.copy(v) for v in variables]
    yield
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

"""The objectives: each is a class that gives a step its gates and its loss.

`OBJECTIVES` maps the names that `DyLoRAConfig` takes to the classes.
"""

import contextlib
import functools

import keras
from keras import ops

from keras_dylora.distributions import RankDraw, Uniform

CUT_SHARE = 0.3  # the weight of the loss at cuts; the maximum rank has 1


class Sampled:
    """A rank is drawn for a step (Algorithm 1), or one for each example."""

    draws = True
    own_loss = False

    def __init__(self, config):
        self.config = config

    def gate(self, adaptation, x):
        """Returns the gates of a step on inputs `x`, and a dict of its logs.

        The gates are a dict of path to `(rank,)`, or to `(batch, rank)` with a
        gate for each example. The model moves on in its rank sequence.
        """
        place, logs = adaptation.ranks_drawn, {}
        rank = self._rank(adaptation, place, x)
        if self.draws and self.config.draw == "step":
            logs["rank"] = rank
        place.assign(place + 1)
        return self._gates_at(adaptation, rank), logs

    def _rank(self, adaptation, place, x):
        """The rank at a place of the sequence, or those of the examples."""
        if self.config.draw == "example":
            drawn = adaptation.draw.for_examples(place, _size(x))
        else:
            drawn = adaptation.draw(place)
        if self.config.full_rank_steps:
            full = ops.greater(adaptation.full_rank, 0)
            drawn = ops.where(full, self.config.rank, drawn)
        return drawn

    def loss(self, model, forward, compute_loss, x, y, y_pred, *args, **kwargs):
        """The loss of a step, a scalar tensor.

        Args:
            model: the `DyLoRAModel`.
            forward: function of the model and `x` that returns a context
                manager. It yields predictions; within it, `model.losses` are
                the losses of that call.
            compute_loss: Keras's method, which takes all other arguments.
                `y_pred` are the predictions at the gate of the step.
        """
        if self.config.draw == "example":
            _check_examples(x, y_pred)
        return compute_loss(x, y, y_pred, *args, **kwargs)

    def _gates_at(self, adaptation, rank):
        return adaptation.by_maximum(functools.partial(self._gate_at, rank))

    def _gate_at(self, rank, most):
        """The gate at a rank, of a layer of a maximum rank."""
        if most < self.config.rank:
            rank = ops.minimum(rank, most)
        return self.config.scale.gate(rank)


class WithCuts(Sampled):
    """The loss at the maximum rank plus `CUT_SHARE` of the loss at cuts.

    Each example is at one of the cuts, drawn at random. Set `sides`, the two
    sides of all cuts, before each step.

    Args:
        config: `DyLoRAConfig`.
        cuts: int. The number of cuts.
        cores_at: function of the sides and of the cut of each example, int32
            of `(batch,)`. It gives a dict of path to `(batch, rank, rank)`.
    """

    own_loss = True

    def __init__(self, config, cuts, cores_at):
        super().__init__(config)
        self.draw = RankDraw(Uniform(), 0, cuts - 1, config.seed)
        self.cores_at = cores_at

    def _rank(self, adaptation, place, x):
        self.cut = self.draw.for_examples(place, _size(x))
        return ops.convert_to_tensor(self.config.rank, "int32")

    def loss(self, model, forward, compute_loss, x, y, y_pred, *args, **kwargs):
        adaptation = model._dylora
        loss = compute_loss(x, y, y_pred, *args, **kwargs)
        with (
            _unchanged(model.metrics_variables),
            adaptation.overridden(self.cores_at(self.sides, self.cut)),
            forward(model, x) as predictions,
        ):
            _check_examples(x, predictions)
            cut = compute_loss(x, y, predictions, *args, **kwargs)
        return loss + CUT_SHARE * cut


class Summed(Sampled):
    """The loss at every rank, weighted by its probability (Eq. 2).

    Keras's own step calls it, so gradients, loss scaling and metrics are
    Keras's. The metrics are those of the highest rank that is trained. The
    losses that layers add, such as activity regularization, belong to the rank
    of their pass.
    """

    draws = False
    own_loss = True

    def _rank(self, adaptation, place, x):
        return max(self.config.rank_probabilities)

    def loss(self, model, forward, compute_loss, x, y, y_pred, *args, **kwargs):
        adaptation = model._dylora
        total, probabilities = 0.0, self.config.rank_probabilities
        highest = max(probabilities)
        # The highest first, while `model.losses` belong to `y_pred`.
        for b in sorted(probabilities, reverse=True):
            if b == highest:
                loss = compute_loss(x, y, y_pred, *args, **kwargs)
            else:
                with (
                    _unchanged(model.metrics_variables),
                    adaptation.overridden(self._gates_at(adaptation, b)),
                    forward(model, x) as predictions,
                ):
                    loss = compute_loss(x, y, predictions, *args, **kwargs)
            total = total + probabilities[b] * loss
        return total


class Matryoshka(Sampled):
    """A single pass at the sum of the ranks' gates: MatryoshkaLoRA's diagonal.

    Its entry `i` is the sum of the scales of all ranks from `i` on that have a
    positive probability.

    Reference: [Modoranu et al., 2026](https://arxiv.org/abs/2605.07850),
    Algorithm 1
    """

    draws = False

    def _rank(self, adaptation, place, x):
        return list(self.config.rank_probabilities)

    def _gate_at(self, rank, most):
        return ops.sum(super()._gate_at(rank, most), axis=0)


OBJECTIVES = {
    "sampled": Sampled,
    "summed": Summed,
    "matryoshka": Matryoshka,
}


def _size(x):
    return ops.shape(keras.tree.flatten(x)[0])[0]


def _check_examples(x, y_pred):
    """Raises a `ValueError` unless there is an output for each example.

    It checks what is known: in a TensorFlow graph, the batch may have no size.
    """
    size = keras.tree.flatten(x)[0].shape[0]
    shapes = [tuple(y.shape) for y in keras.tree.flatten(y_pred)]
    if any(not s or (s[0] is not None and s[0] != size) for s in shapes):
        raise ValueError(
            "With `draw='example'` every output must have the examples along "
            "its first axis. Use `draw='step'`. "
            f"Received: outputs of shapes {shapes} for a batch of {size}"
        )


@contextlib.contextmanager
def _unchanged(variables):
    """Gives variables their values back at the end of a `with` block."""
    values = [ops.copy(v) for v in variables]
    yield
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

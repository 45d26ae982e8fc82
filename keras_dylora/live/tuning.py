"""Tuning: steps that learn the cuts of some ranks and change nothing else.

A step tunes all cuts: each example of the batch is at one of them. In a layer
with columns `down` and rows `up`, cut `c` computes
`(x @ down) @ left[c] @ right[c] @ up`, and a step changes `left` and `right`.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_dylora import training
from keras_dylora.layers.tuned import TunedCut
from keras_dylora.live.recompile import reset_functions

# The first learning rate of Adam, which falls to zero linearly. With fewer
# targets in a batch it is lower, by the square root of their number, as the
# gradient is noisier (Malladi et al., 2022, https://arxiv.org/abs/2205.10287).
RATE = 0.05
TARGETS = 1024
DECAYS = 0.9, 0.98


class Tuning:
    """The cuts of some ranks, tuned together.

    Args:
        model: an enabled model.
        chosen: list of dicts of path to rank, at least one.
        steps: int. The number of steps to come, for the learning rate.
    """

    def __init__(self, model, chosen, steps):
        self.model, self.chosen = model, chosen
        config, self.paths = model.dylora_config, list(chosen[0])
        ranks = np.array([list(each.values()) for each in chosen])
        eye = np.eye(config.rank)[:, : ranks.max()]
        # Entries beyond the rank of a layer are zero and stay zero: their
        # gradients are products with zeros of the other side.
        used = np.arange(ranks.max()) < ranks[..., None]
        left = (eye * used[..., None, :]).astype("float32")
        self.sides = [keras.Variable(left), keras.Variable(left.swapaxes(2, 3))]
        scale = np.vectorize(config.scale.at)(np.maximum(ranks, 1))
        self.scale = scale.astype("float32")[..., None, None]
        self.steps = steps
        self.optimizer = keras.optimizers.Adam(RATE, *DECAYS, epsilon=1e-9)
        self.optimizer.build(self.sides)
        self.gradient = training.loss_gradient(model, self.cores_at)

    @property
    def done(self):
        """int. The number of steps so far."""
        return int(ops.convert_to_numpy(self.optimizer.iterations))

    def step(self, data):
        """Takes a step on a batch `(x, y, sample_weight)`.

        Returns the loss, a float.
        """
        batch = keras.utils.unpack_x_y_sample_weight(data)
        size = len(keras.tree.flatten(batch)[0])
        turns = (np.arange(size) + self.done) % len(self.chosen)
        loss, gradients = self.gradient(
            self.values(), turns.astype("int32"), batch
        )
        share = min(1.0, _targets(batch) / TARGETS) ** 0.5
        left = max(0.0, 1 - self.done / self.steps)
        self.optimizer.learning_rate = RATE * share * left
        self.optimizer.apply(
            [ops.convert_to_tensor(g.astype("float32")) for g in gradients],
            self.sides,
        )
        return loss

    def cuts(self):
        """The `TunedCut`s as they are now, in the order of the ranks."""
        left, right = self.values()
        return [
            TunedCut(
                {p: left[c, i, :, :b] for i, (p, b) in enumerate(each.items())},
                {p: right[c, i, :b] for i, (p, b) in enumerate(each.items())},
            )
            for c, each in enumerate(self.chosen)
        ]

    def state(self):
        """Returns what another `Tuning` needs to go on, a list of arrays."""
        variables = [*self.sides, *self.optimizer.variables]
        return [ops.convert_to_numpy(v) for v in variables]

    def restore(self, state):
        """Goes on from a `state`, if it belongs to the same ranks."""
        variables = [*self.sides, *self.optimizer.variables]
        if [np.shape(x) for x in state] == [tuple(v.shape) for v in variables]:
            for variable, value in zip(variables, state, strict=True):
                variable.assign(value)

    def values(self):
        """The sides as they are now, a list of arrays."""
        return [ops.convert_to_numpy(v) for v in self.sides]

    def cores_at(self, sides, cuts):
        """The cores of examples at cuts, a dict of path to tensor.

        `cuts` is int32 of `(batch,)`, the cut of each example. A single cut has
        one core for all examples.
        """
        left, right = map(ops.convert_to_tensor, sides)
        cores = ops.convert_to_tensor(self.scale) * (left @ right)
        if len(self.chosen) == 1:
            cuts = [0]
        return {
            path: ops.take(cores[:, i], cuts, axis=0)
            for i, path in enumerate(self.paths)
        }


def _targets(batch):
    """The number of targets in a batch, such as its examples or tokens.

    Float targets may be one-hot, so their last axis doesn't count.
    """
    x, y, _ = batch
    if y is None:
        return len(keras.tree.flatten(x)[0])
    found = 0
    for each in keras.tree.flatten(y):
        shape = tuple(each.shape)
        dtype = keras.backend.standardize_dtype(each.dtype)
        if keras.backend.is_float_dtype(dtype) and len(shape) > 1:
            shape = shape[:-1]
        found += math.prod(shape)
    return found


class TuningInFit:
    """The last steps of a `fit`, which also tune the cuts of `tuned_ranks`.

    Each of them trains the maximum rank and the cuts, and then tunes the cuts
    on the same batch. The live adapter keeps the state of the tuning until the
    run is over, so an interrupted run can go on, also from a file.
    """

    def __init__(self, model):
        self.model = model
        self.tuning = None

    @property
    def _named(self):
        return self.model._dylora.named

    def check_devices(self):
        """Raises a `ValueError` if the model is trained on several."""
        strategy = getattr(self.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)
        if replicas > 1:
            raise ValueError(
                "The steps of `tune` are taken on one device. Call "
                f"`tune_ranks` after `fit` instead. Received: {replicas} "
                f"replicas of {strategy!r}"
            )

    def begin(self, steps, again):
        """Makes the running `fit` train with cuts and tune them.

        Args:
            steps: int. The number of steps that tune, with those of an
                interrupted run.
            again: bool. Whether an interrupted run goes on.
        """
        model = self.model
        training.write_back(model)
        chosen = [
            model._dylora.by_layer(b) for b in model.dylora_config.tuned_ranks
        ]
        self.tuning = Tuning(model, chosen, steps)
        if again:
            self.tuning.restore(self._named.tuning)
        self.publish()
        model.train_function = training.with_tuning(model, self.tuning)

    def forget(self):
        """Forgets the state of an interrupted run."""
        self._named.tuning = ()

    def keep(self):
        """Gives the adapter the cuts as they are now.

        The active rank computes with them only after `publish`.
        """
        if self.tuning is not None:
            self._named.cuts = self.tuning.cuts()
            self._named.tuning = self.tuning.state()

    def publish(self):
        """Makes the model compute with the cuts as they are now."""
        if self.tuning is None:
            return
        training.write_back(self.model)
        function = self.model.train_function
        self.model._dylora.set_tuned_cuts(self.tuning.cuts())
        self.model.train_function = function
        self._named.tuning = self.tuning.state()

    def end(self):
        """Restores the model's own training, however `fit` ended."""
        if self.tuning is None:
            return
        self.publish()
        self.tuning = None
        training.without_tuning(self.model)
        reset_functions(self.model)

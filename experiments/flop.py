"""FLOP: factorized low-rank pruning (Wang et al., 2019), a baseline.

Every matrix W of the encoder becomes P · diag(z) · Q, started at its singular
value decomposition. The gates z are hard-concrete (Louizos et al., 2018), and
an augmented Lagrangian drives their expected size to a target, so what is left
is one low-rank model of one size. All weights are trained.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_dylora.layers.tree import Tree

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
# Of the Lagrangian: the weight of its quadratic part, and the rate at which
# its multiplier follows the excess. Adam moves a gate by its gradient's sign
# above all: a Lagrangian much stronger than the task closes all gates alike.
PENALTY, ASCENT = 4.0, 0.035


class HardConcrete(keras.layers.Layer):
    """Gates in [0, 1] that are exactly 0 with a probability that is learned.

    Args:
        size: int. The number of gates.
        speed: float. How many times faster than the weights they are learned.
    """

    def __init__(self, size, speed, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.speed = speed
        self.seed_generator = keras.random.SeedGenerator(size)
        # Open 95 % of the time, at first.
        start = math.log(0.95 / 0.05) + BETA * math.log(-LOW / HIGH)
        self.logits = self.add_weight(
            shape=(size,),
            initializer=keras.initializers.Constant(start / speed),
            name="gate_logits",
        )

    @property
    def log_alpha(self):
        return self.logits * self.speed

    def expected(self):
        """The expected number of gates that aren't 0, a scalar tensor."""
        shift = BETA * math.log(-LOW / HIGH)
        return ops.sum(ops.sigmoid(self.log_alpha - shift))

    def call(self, training=None):
        log_alpha = self.log_alpha
        if training:
            u = keras.random.uniform(
                ops.shape(log_alpha), 1e-6, 1 - 1e-6, seed=self.seed_generator
            )
            s = (ops.log(u) - ops.log(1 - u) + log_alpha) / BETA
            return ops.clip(ops.sigmoid(s) * (HIGH - LOW) + LOW, 0, 1)
        # As the authors: as many as expected are kept, the likeliest.
        keep = ops.cast(ops.round(self.expected()), "int32")
        place = ops.cast(ops.argsort(ops.argsort(-log_alpha)), "int32")
        gates = ops.sigmoid(log_alpha / BETA * 0.8)
        return ops.where(place < keep, gates, 0.0)


class FactorizedKernel(keras.layers.Layer):
    """P · diag(z) · Q in place of the kernel of one layer."""

    def __init__(self, layer, speed):
        super().__init__(dtype="float32")
        self.kernel_shape = tuple(layer.kernel.shape)
        inputs = 1
        if isinstance(layer, keras.layers.EinsumDense):
            left, right = layer.equation.split("->")[0].split(",")
            inputs = sum(letter in left for letter in right)
        rows = int(np.prod(self.kernel_shape[:inputs]))
        columns = int(np.prod(self.kernel_shape[inputs:]))
        kernel = ops.convert_to_numpy(layer.kernel).reshape(rows, columns)
        u, s, v = np.linalg.svd(kernel, full_matrices=False)
        self.cost = rows + columns
        self.size = rows * columns
        self.gates = HardConcrete(len(s), speed)
        for name, value in (
            ("down", u * np.sqrt(s)),
            ("up", np.sqrt(s)[:, None] * v),
        ):
            variable = self.add_weight(shape=value.shape, name=name)
            variable.assign(value.astype("float32"))
            setattr(self, name, variable)

    def expected_size(self):
        return self.gates.expected() * self.cost

    def call(self, training=None):
        kernel = ops.matmul(self.down * self.gates(training=training), self.up)
        return ops.reshape(kernel, self.kernel_shape)


@keras.saving.register_keras_serializable(package="keras_dylora_experiments")
class Flop(keras.Model):
    """A KerasHub task whose encoder is pruned while it is fine-tuned.

    Args:
        task: a `keras_hub.models.Task`. Its kernels are left behind.
        keep: float in `(0, 1)`. The share of the encoder's matrix parameters
            to keep.
        warmup_steps: int. Steps in which the target falls to `keep`. Factorized
            and not yet pruned, the matrices are larger than they were.
        speed: float. How many times faster than the weights the gates are
            learned.

    Raises:
        ValueError: if `keep` isn't between 0 and 1.

    References:

    - [Wang et al., 2019](https://arxiv.org/abs/1910.04732)
    - [Louizos et al., 2018](https://arxiv.org/abs/1712.01312)
    """

    def __init__(self, task, keep, warmup_steps, speed=1000.0):
        super().__init__()
        if not 0 < keep < 1:
            raise ValueError(
                f"`keep` must be between 0 and 1. Received: keep={keep}"
            )
        self.task, self.keep = task, keep
        self.warmup_steps, self.speed = max(warmup_steps, 1), speed
        layers = [
            layer
            for layer in Tree(task.backbone).layers.values()
            if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
        ]
        self.factorized = [FactorizedKernel(x, speed) for x in layers]
        self.replaced = {
            id(layer.kernel): kernel
            for layer, kernel in zip(layers, self.factorized, strict=True)
        }
        for layer in layers:
            layer.kernel.trainable = False
        self.multiplier, self.steps = (
            self.add_weight(
                shape=(),
                initializer="zeros",
                trainable=False,
                dtype="float32",
                name=name,
            )
            for name in ("multiplier", "steps")
        )
        self.original_size = sum(kernel.size for kernel in self.factorized)
        self.initial_share = float(self.expected_share())

    def call(self, inputs, training=None):
        kernels = {
            key: kernel(training=training)
            for key, kernel in self.replaced.items()
        }
        others = self.task.non_trainable_variables
        outputs, states = self.task.stateless_call(
            [ops.convert_to_tensor(v) for v in self.task.trainable_variables],
            [
                kernels[id(v)] if id(v) in kernels else ops.convert_to_tensor(v)
                for v in others
            ],
            inputs,
            training=training,
        )
        for variable, state in zip(others, states, strict=True):
            if id(variable) not in kernels:
                variable.assign(state)
        if training:
            self.add_loss(self._lagrangian())
        return outputs

    def expected_share(self):
        """The expected share of parameters that is kept, a scalar tensor."""
        sizes = [kernel.expected_size() for kernel in self.factorized]
        return ops.sum(ops.stack(sizes)) / self.original_size

    def kept_share(self):
        """float. The share of parameters that is kept after training."""
        kept = sum(
            int(np.count_nonzero(ops.convert_to_numpy(k.gates(training=False))))
            * k.cost
            for k in self.factorized
        )
        return kept / self.original_size

    def _lagrangian(self):
        self.steps.assign(self.steps + 1)
        progress = ops.minimum(self.steps / self.warmup_steps, 1.0)
        target = self.initial_share + progress * (
            self.keep - self.initial_share
        )
        excess = self.expected_share() - target
        self.multiplier.assign(
            self.multiplier + ASCENT * ops.stop_gradient(excess)
        )
        multiplier = ops.convert_to_tensor(self.multiplier)
        return multiplier * excess + PENALTY / 2 * excess**2

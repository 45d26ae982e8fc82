"""The distributions of the training rank, and the seeded draw from them."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_dylora.ranks import as_rank

_BITS = 30  # a draw is an integer in [0, 2**30), exact in int32 everywhere


class RankDistribution:
    """Base class of the distributions of the training rank.

    A subclass gives `weights(ranks)`, one non-negative weight for each rank.
    """

    def weights(self, ranks: Sequence[int]) -> Sequence[float]:
        raise NotImplementedError

    def probabilities(self, min_rank: int, rank: int) -> np.ndarray:
        """Probabilities of the ranks `min_rank..rank`, a float64 array."""
        weights = np.asarray(
            self.weights(range(min_rank, rank + 1)), dtype="float64"
        )
        return weights / weights.sum()

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return (
            type(self) is type(other)
            and self.get_config() == other.get_config()
        )

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable(package="keras_dylora")
class Uniform(RankDistribution):
    """Every rank in `min_rank..rank` is equally likely.

    Args:
        full: float in `[0, 1]`. The share of all draws that goes to the maximum
            rank. The other draws are uniform over all ranks. Defaults to `0`.

    Raises:
        ValueError: if `full` isn't in `[0, 1]`.

    Example:

    ```python
    keras_dylora.Uniform().probabilities(1, 4)  # [0.25, 0.25, 0.25, 0.25]
    keras_dylora.Uniform(full=0.5).probabilities(1, 2)  # [0.25, 0.75]
    ```

    Reference:

    - [DyLoRA, Algorithm 1 and Table 4](https://arxiv.org/abs/2210.07558)
    """

    full: float

    def __init__(self, full: float = 0.0) -> None:
        if not isinstance(full, numbers.Real) or not 0 <= full <= 1:
            raise ValueError(
                f"`full` must be between 0 and 1. Received: full={full!r}"
            )
        self.full = float(full)

    def weights(self, ranks: Sequence[int]) -> list[float]:
        share = 1.0 - self.full
        return [share] * (len(ranks) - 1) + [share + self.full * len(ranks)]

    def get_config(self) -> dict[str, Any]:
        return {"full": self.full}


@keras.saving.register_keras_serializable(package="keras_dylora")
class Geometric(RankDistribution):
    """Low ranks are likelier: `P(b)` is proportional to `(1 - p) ** b`.

    The distribution is truncated to `min_rank..rank` and renormalised.

    Args:
        p: float. The success probability, in `(0, 1)`. Defaults to `0.15`,
            the paper's.

    Raises:
        ValueError: if `p` isn't in `(0, 1)`.

    Example:

    ```python
    keras_dylora.Geometric(0.5).probabilities(1, 2)  # [2 / 3, 1 / 3]
    ```

    Reference: [DyLoRA, Table 4](https://arxiv.org/abs/2210.07558)
    """

    p: float

    def __init__(self, p: float = 0.15) -> None:
        if not isinstance(p, numbers.Real) or not 0.0 < p < 1.0:
            raise ValueError(f"`p` must be between 0 and 1. Received: p={p!r}")
        self.p = float(p)

    def weights(self, ranks: Sequence[int]) -> list[float]:
        return [(1.0 - self.p) ** (b - ranks[0]) for b in ranks]

    def get_config(self) -> dict[str, Any]:
        return {"p": self.p}


@keras.saving.register_keras_serializable(package="keras_dylora")
class Categorical(RankDistribution):
    """Ranks are drawn in proportion to given weights.

    A rank without a weight is never drawn.

    Args:
        weights: dict of int to float. Non-negative weights by rank. They
            needn't sum to one.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a weight is negative or not finite, if all are zero,
            or (when a model is enabled) if a rank is outside
            `min_rank..rank`.

    Example:

    ```python
    keras_dylora.Categorical({1: 1, 2: 0, 4: 3}).probabilities(1, 4)
    # [0.25, 0, 0, 0.75]
    ```
    """

    def __init__(self, weights: dict[int, float] | dict[int, int]) -> None:
        if not isinstance(weights, dict) or not weights:
            raise TypeError(
                "`weights` must be a dict of rank to weight. "
                f"Received: weights={weights!r}"
            )
        self.by_rank: dict[int, float] = {}
        for b, weight in weights.items():
            # JSON turns integer keys into strings.
            b = int(b) if isinstance(b, str) and b.isdecimal() else b
            b = as_rank(b, 1, name="a rank in `weights`")
            if (
                not isinstance(weight, numbers.Real)
                or not math.isfinite(weight)
                or weight < 0
            ):
                raise ValueError(
                    "Weights must be finite and not negative. "
                    f"Received: weight {weight!r} for rank {b}"
                )
            self.by_rank[b] = float(weight)
        if not any(self.by_rank.values()):
            raise ValueError(
                "At least one weight must be positive. "
                f"Received: weights={weights!r}"
            )

    def weights(self, ranks: Sequence[int]) -> list[float]:
        outside = sorted(set(self.by_rank) - set(ranks))
        if outside:
            raise ValueError(
                f"Ranks of a `Categorical` must be between {ranks[0]} and "
                f"{ranks[-1]}. Received: weights for {outside}"
            )
        return [self.by_rank.get(b, 0.0) for b in ranks]

    def get_config(self) -> dict[str, Any]:
        return {"weights": {str(b): w for b, w in self.by_rank.items()}}


def get_distribution(identifier: Any) -> RankDistribution:
    """Returns a `RankDistribution` from its name, its config or itself."""
    names = {"uniform": Uniform, "geometric": Geometric}
    if isinstance(identifier, RankDistribution):
        return identifier
    if isinstance(identifier, str) and identifier in names:
        return names[identifier]()
    if isinstance(identifier, dict) and "class_name" in identifier:
        return keras.saving.deserialize_keras_object(identifier)
    raise ValueError(
        "`rank_distribution` must be one of "
        f"{sorted(names)} or a `Uniform`, `Geometric` or `Categorical`. "
        f"Received: rank_distribution={identifier!r}"
    )


class RankDraw:
    """The sequence of training ranks, a function of a seed and a position.

    The random number is a hash of the position (two rounds of the `lowbias32`
    integer mixer). So TensorFlow, JAX and torch give the same ranks, inside and
    outside of compiled steps, and only the position has to be saved.

    `__call__` draws one rank for a step. `for_examples` draws one rank for each
    example of a batch, by systematic sampling. Equally spaced points, the first
    of them random, fall into intervals whose lengths are the probabilities of
    the ranks. A hash of the position and the index shuffles the examples. So
    each rank occurs in a batch as often as its probability says, rounded up or
    down.

    Ranks come from a `RankDistribution` over `min_rank..rank`.
    """

    def __init__(self, distribution, min_rank, rank, seed):
        self.min_rank = min_rank
        probabilities = distribution.probabilities(min_rank, rank)
        # Rank min_rank + k is drawn when k of these are <= the random number.
        thresholds = np.round(np.cumsum(probabilities)[:-1] * 2**_BITS)
        # Python integers: a NumPy constant breaks the graph of torch.compile.
        self._thresholds = thresholds.astype("int32").tolist()
        self._keys = (
            np.random.SeedSequence(seed)
            .generate_state(2, dtype="uint32")
            .view("int32")
            .tolist()
        )

    def __call__(self, position):
        """Draws an int32 rank; `position` is the number of earlier draws."""
        return self._rank_at(_shift(self._hash(position), 32 - _BITS))

    def for_examples(self, position, size):
        """Draws `(size,)` int32 ranks; `position` counts the earlier steps."""
        x = self._hash(position)
        indices = ops.arange(size, dtype="int32")
        order = ops.argsort(_mix(ops.bitwise_xor(_mix(x), indices)))
        spacing = ops.floor_divide(2**_BITS, size)
        start = ops.mod(_shift(x, 32 - _BITS), spacing)
        return self._rank_at(start + ops.cast(order, "int32") * spacing)

    def _hash(self, position):
        x = ops.cast(position, "int32")
        for key in self._keys:
            x = _mix(ops.bitwise_xor(x, key))
        return x

    def _rank_at(self, x):
        """The ranks whose intervals of `[0, 2**30)` hold the integers `x`."""
        thresholds = ops.convert_to_tensor(self._thresholds, dtype="int32")
        above = ops.greater_equal(ops.expand_dims(x, -1), thresholds)
        return self.min_rank + ops.sum(ops.cast(above, "int32"), axis=-1)


def _shift(x, bits):
    """Right shift with zero fill: int32 shifts copy the sign bit."""
    return ops.bitwise_and(ops.right_shift(x, bits), (1 << (32 - bits)) - 1)


def _mix(x):
    """`lowbias32`, an invertible 32-bit mixer; products wrap around."""
    x = ops.bitwise_xor(x, _shift(x, 16))
    x = ops.multiply(x, 0x7FEB352D)
    x = ops.bitwise_xor(x, _shift(x, 15))
    x = ops.multiply(x, 0x846CA68B - 2**32)
    return ops.bitwise_xor(x, _shift(x, 16))

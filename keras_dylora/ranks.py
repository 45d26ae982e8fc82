"""Ranks: how they are checked, scaled and turned into gates.

Everything here is backend-free and 1-based: rank `b` means the first `b`
columns of the down projection and the first `b` rows of the up projection.
"""

import collections.abc
import dataclasses
import numbers
from typing import Any

from keras import ops

INT32_MAX = 2**31 - 1  # the bound of numbers that have no other


def as_rank(
    value: Any, low: int, high: int = INT32_MAX, name: str = "rank"
) -> int:
    """Returns `value` as an `int`, or raises if it isn't a rank."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} "
            f"(of type {type(value).__name__})"
        )
    if value < low and high >= INT32_MAX:
        raise ValueError(
            f"`{name}` must be at least {low}. Received: {name}={value}"
        )
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(
            f"`{name}` must be between {low} and {high}. "
            f"Received: {name}={value}"
        )
    return int(value)


def as_ranks(values: Any, low: int, high: int) -> list[int]:
    """Returns `values` as a list of `int`, or raises if one isn't a rank."""
    return [as_rank(b, low, high) for b in as_list(values)]


def as_list(values: Any) -> list[Any]:
    """Returns `values` as a list, or raises if it isn't a list of ranks."""
    no_list = (str, bytes, collections.abc.Mapping)
    if isinstance(values, no_list) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"`ranks` must be a list of integers. Received: ranks={values!r}"
        )
    return list(values)


def by_layer(
    ranks: int | collections.abc.Mapping[str, int],
    high: collections.abc.Mapping[str, int],
    low: int = 0,
) -> dict[str, int]:
    """Returns a dict of path to rank, from one rank or from such a dict.

    `high` is a dict of path to the maximum rank of each layer. If `ranks` is
    one number, a layer with a lower maximum gets its maximum. If `ranks` is a
    dict and `low` is 1, some layers may have rank 0, but not all.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a rank isn't in `low..high`, or the paths of `ranks` and
            `high` differ.
    """
    if not isinstance(ranks, collections.abc.Mapping):
        rank = as_rank(ranks, low, max(high.values(), default=INT32_MAX))
        return {path: min(rank, most) for path, most in high.items()}
    if set(ranks) != set(high):
        raise ValueError(
            "`rank` must be one number, or one for each adapted layer. "
            f"Received: ranks without {sorted(set(high) - set(ranks))} and "
            f"with {sorted(set(ranks) - set(high))}"
        )
    checked = {
        p: as_rank(ranks[p], 0, most, f"rank of {p}")
        for p, most in high.items()
    }
    if not any(b >= low for b in checked.values()):
        raise ValueError(
            "At least one layer must have a rank above 0. "
            f"Received: rank 0 for all {len(checked)} layers"
        )
    return checked


def as_pattern(value: Any, high: int) -> dict[str, int] | None:
    """Returns a `rank_pattern` as a dict of `str` to `int`, or `None`.

    Raises a `TypeError` or `ValueError` if it isn't one; see `DyLoRAConfig`.
    """
    if not isinstance(value, (collections.abc.Mapping, type(None))) or any(
        not isinstance(pattern, str) for pattern in value or ()
    ):
        raise TypeError(
            "`rank_pattern` must be a dict of names or regular expressions to "
            f"ranks. Received: rank_pattern={value!r}"
        )
    ranks = {
        pattern: as_rank(b, -INT32_MAX, name=f"rank of {pattern!r}")
        for pattern, b in (value or {}).items()
    }
    if any(not 1 <= b <= high for b in ranks.values()):
        raise ValueError(
            "`rank_pattern` must give ranks in `1..rank`, as `rank` is the "
            "maximum of all layers. To leave a layer without an adapter, "
            "leave it out of `target_layers`. "
            f"Received: rank_pattern={ranks} with rank={high}"
        )
    return ranks or None


# Functions of the maximum rank, alpha and a rank `b`, an int or float32 tensor.
SCALINGS = {
    "rank": lambda rank, alpha, b: alpha / b,  # Eq. 7
    "sqrt": lambda rank, alpha, b: alpha / b**0.5,  # rsLoRA
    "constant": lambda rank, alpha, b: alpha / rank,  # b is a prefix of rank
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The factor that multiplies an adapter's product, at each rank above 0.

    Gates, files and PEFT's `lora_alpha` all take the scale from here. `rank` is
    the maximum; `alpha` and `scaling` are as in `DyLoRAConfig`.
    """

    rank: int
    alpha: float
    scaling: str = "rank"

    def at(self, b: Any) -> Any:
        """The scale of rank `b`."""
        return SCALINGS[self.scaling](self.rank, self.alpha, b)

    def gate(self, active_rank: Any) -> Any:
        """The gate of rank `b`: the scale in the first `b` entries, then zeros.

        `active_rank` is `b`, an int or an integer tensor. Returns a float32
        tensor of shape `shape(active_rank) + (rank,)`.
        """
        b = ops.expand_dims(ops.cast(active_rank, "int32"), -1)
        value = self.at(ops.cast(ops.maximum(b, 1), "float32"))
        value = ops.cast(value, "float32")
        return ops.where(ops.arange(self.rank, dtype="int32") < b, value, 0.0)


def column(active_rank: Any, rank: int) -> Any:
    """A boolean mask of shape `(rank,)`: true at entry `active_rank` only.

    Several ranks give one row each.
    """
    entry = ops.expand_dims(ops.cast(active_rank, "int32") - 1, -1)
    return ops.equal(ops.arange(rank, dtype="int32"), entry)


def newest(gate: Any) -> Any:
    """The `column` mask of the rank of a gate, which is `(..., rank)`."""
    active_rank = ops.sum(ops.cast(gate > 0, "int32"), axis=-1)
    return column(active_rank, gate.shape[-1])

"""Checks of the values that a config or a schedule may have."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

from keras_dylora.ranks import INT32_MAX, as_rank


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` unless a value is a positive, finite number."""
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"`{name}` must be a positive number. Received: {name}={value!r}"
        )


def check_fraction(name: str, value: Any) -> None:
    """Raises a `ValueError` unless a value is a number in `[0, 1)`."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be in [0, 1). Received: {name}={value!r}"
        )


def is_number(x: Any) -> bool:
    """Whether a value is a real number and not a bool."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_share(x: Any) -> bool:
    """Whether a value is a share in `(0, 1)`, not a count."""
    return isinstance(x, float) and 0 < x < 1


def check_one_of(name: str, value: Any, allowed: Iterable) -> None:
    """Raises a `ValueError` for a value that isn't allowed."""
    if value not in tuple(allowed):
        raise ValueError(
            f"`{name}` must be one of {tuple(allowed)}. "
            f"Received: {name}={value!r}"
        )


def as_tokens(tokens: Any) -> Any:
    """Returns a tuple of distinct ids, `"new"` or `None`, or raises."""
    if tokens is None or tokens == "new":
        return tokens
    if isinstance(tokens, (str, int)) or not tokens:
        raise TypeError(
            "`trainable_tokens` must be a list of ids, at least one, or "
            f"'new'. Received: trainable_tokens={tokens!r}"
        )
    ids = [as_rank(i, 0, INT32_MAX, "trainable_tokens") for i in tokens]
    return tuple(sorted(set(ids)))

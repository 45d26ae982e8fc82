"""Cuts: whether they are good, and the warning if they aren't."""

import sys
import warnings


def are_ordered(adapters):
    """Whether cuts of these `Factors` are good: their columns are in order.

    At least one adapter must be trained. Untrained ones don't count, as they
    are zero at every rank.
    """
    used = [x for x in adapters if x.up.any()]
    return bool(used) and all(x.is_ordered for x in used)


def warn_of_cut(ranks, lowest, adapters):
    """Warns if a rank is below the lowest trained one and its cut isn't good.

    `adapters` is a function that returns the `Factors`. It is called only if
    needed.
    """
    low = min(filter(None, ranks), default=lowest)
    if low < lowest and not are_ordered(adapters()):
        warnings.warn(
            "Adapters are of use only at ranks that they were trained at, or "
            f"after `order_ranks`. Received: rank={low} of adapters that were "
            f"trained from rank {lowest} on",
            stacklevel=users_line(),
        )


def users_line():
    """The `stacklevel` of the first line outside of keras_dylora and Keras."""
    frame, level = sys._getframe(1), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "keras_dylora", "keras", "keras_hub", "contextlib",
    ):  # fmt: skip
        frame, level = frame.f_back, level + 1
    return level

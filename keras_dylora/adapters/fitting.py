"""Checks that the tensors of an adapter fit a model."""

import keras


def check_float(weights):
    """Raises a `ValueError` if a weight that is trained in full isn't float."""
    for path, weight in weights.items():
        if not keras.backend.is_float_dtype(weight.dtype):
            raise ValueError(
                "The task head must be float: quantize only the backbone, or "
                "quantize the model after it is enabled. "
                f"Received: {path!r} of dtype {weight.dtype}"
            )


def tensor_names(path, down, up):
    """The two factors of a layer, by their names in a file."""
    return {f"adapter/{path}/down": down, f"adapter/{path}/up": up}


def check_shapes(shapes, tensors, summary=""):
    """Raises a `ValueError` that lists missing, extra and mis-shaped tensors.

    Args:
        shapes: dict of name to the shape that is needed. A size of `None` can
            be any size, and a shape of `None` any shape.
        tensors: dict of name to array.
        summary: str. Words about the adapter, before the list in the message.
    """
    wrong = [f"missing: {name}" for name in shapes if name not in tensors]
    wrong += [f"extra: {name}" for name in tensors if name not in shapes]
    wrong += [
        f"mis-shaped: {name} is {tensors[name].shape}, must be {shape}"
        for name, shape in shapes.items()
        if name in tensors and not _fits(tensors[name].shape, shape)
    ]
    if wrong:
        if all(" head/" in each for each in wrong):
            summary += " (`head=False` leaves its head out)"
        shown = "\n  ".join(wrong[:20])
        more = f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(
            "The adapter must fit the model, tensor by tensor. "
            f"Received: an adapter{summary} with\n  {shown}{more}"
        )


def _fits(found, wanted):
    return wanted is None or (
        len(found) == len(wanted)
        and all(b in (None, a) for a, b in zip(found, wanted, strict=True))
    )

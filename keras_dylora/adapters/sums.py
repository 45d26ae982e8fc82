"""Weighted sums of the adapters of one layer: exact, cut, TIES, DARE.

A part of a sum is a pair of a weight and `Factors`.
"""

import numpy as np

from keras_dylora.layers.factors import Factors


def concatenated(parts, scale):
    """The sum itself, as `Factors` of a scale: all columns side by side."""
    return Factors(
        np.hstack([x.down for _, x in parts]),
        np.vstack([x.up * np.float32(w * x.scale / scale) for w, x in parts]),
        scale,
    )


def closest(parts, rank, scale):
    """The best approximation of the sum, in order (Eckart and Young).

    The rank is at most that of all parts together. No matrix is as large as a
    kernel.
    """
    whole = concatenated(parts, scale)
    if not whole.rank:
        return whole
    ordered, _, _ = whole.ordered()
    return Factors(ordered.down[:, :rank], ordered.up[:rank], scale)


def closest_to(matrix, rank, scale):
    """The best approximation of an update `(inputs, outputs)`, in order."""
    x = matrix.astype("float64")
    tall = x.shape[0] >= x.shape[1]
    # Eigenvectors of the smaller side, as an embedding has a very long one.
    _, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)
    top = vectors[:, ::-1][:, :rank]
    down, up = (x @ top, top.T) if tall else (top, top.T @ x)
    found = Factors(
        down.astype("float32"), (up / scale).astype("float32"), scale
    )
    return found.padded(rank).ordered()[0]


def ties(parts, density, majority_sign_method):
    """The sum by TIES, `(inputs, outputs)`.

    The largest values of each product are kept. The majority of the products
    decides the sign of each value, which is the mean of those with this sign.
    """
    products = [_largest(x.product(), density) for _, x in parts]
    votes = products
    if majority_sign_method == "frequency":
        votes = [np.sign(x) for x in products]
    sign = np.where(sum(votes) >= 0, 1, -1)
    agree = [np.sign(x) == sign for x in products]
    total = sum(
        np.float32(w) * x * mine
        for (w, _), x, mine in zip(parts, products, agree, strict=True)
    )
    return total / np.maximum(sum(mine.astype("int32") for mine in agree), 1)


def dare(parts, density, rng):
    """The sum by DARE, `(inputs, outputs)`: random values, made larger."""
    total = 0.0
    for weight, x in parts:
        product = x.product()
        kept = rng.random(product.shape, "float32") < density
        total += np.float32(weight / density) * product * kept
    return total


def _largest(x, density):
    """`x` with a share of its values, the largest, and zeros elsewhere."""
    size = np.abs(x).ravel()
    kept = int(density * size.size)
    mask = np.zeros(size.shape, bool)
    mask[np.argpartition(-size, kept - 1)[:kept]] = True
    return x * mask.reshape(x.shape)

"""Factors: the adapter of one layer in NumPy, to be cut and ordered."""

import dataclasses

import numpy as np
from keras import ops

_EPSILON = np.finfo("float32").eps


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of one layer at one rank, in NumPy: `scale * down @ up`.

    `down` is `(inputs, rank)` and `up` `(rank, outputs)`, both float32.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self):
        return self.down.shape[1]

    def cut(self, rank, scale, sides=None):
        """The adapter at a lower rank, with the scale that a `Scale` gives it.

        Without `sides`, the cut is the first `rank` columns and rows, or all if
        there are fewer. With the `sides` of a `TunedCut`, it is the mixtures of
        all columns and rows that they define.
        """
        rank = min(rank, self.rank)
        at = scale.at(max(rank, 1))
        if sides is None:
            return Factors(self.down[:, :rank], self.up[:rank], at)
        left, right = sides
        down, up = (
            self.down @ left[: self.rank],
            right[:, : self.rank] @ self.up,
        )
        return Factors(down, up, at)

    def padded(self, rank):
        """Factors of the same product, padded with zeros up to a rank."""
        rest = rank - self.rank
        down = np.pad(self.down, ((0, 0), (0, rest)))
        up = np.pad(self.up, ((0, rest), (0, 0)))
        return Factors(down, up, self.scale)

    def transposed(self):
        """Factors of the transposed product."""
        return Factors(self.up.T, self.down.T, self.scale)

    def ordered(self):
        """Factors of the same product, with columns by falling singular values.

        Each side is scaled by the root of the singular value. No matrix is
        larger than a factor: there is a QR of each side, then an SVD of the
        product between them. A column that adds nothing to the product gets the
        length of the longest column, so that it can be trained.

        Returns:
            `Factors`, and the matrices `turn` and `back` in float64. The new
            `down` is `down @ turn`, and the new `up` is `back @ up`. One matrix
            is the inverse of the other, unless columns are linearly dependent.
        """
        q_down, r_down = np.linalg.qr(self.down.astype("float64"))
        q_up, r_up = np.linalg.qr(self.up.T.astype("float64"))
        left, singular, right = np.linalg.svd(r_down @ r_up.T)
        if singular[0] == 0:
            return self, np.eye(self.rank), np.eye(self.rank)
        # A rank above the sizes of the kernel has more columns than the SVD.
        columns = np.arange(self.rank)
        left = left[:, columns % left.shape[1]]
        right = right[columns % right.shape[0]]
        root = np.sqrt(np.resize(singular, self.rank))
        used = columns < np.sum(singular > singular[0] * _EPSILON)
        lengths = np.where(used, root, root[0])
        left, right = left * lengths, np.where(used, root, 0.0)[:, None] * right
        down = (q_down @ left).astype("float32")
        up = (right @ q_up.T).astype("float32")
        turn = np.linalg.pinv(r_down, _EPSILON) @ left
        back = right @ np.linalg.pinv(r_up.T, _EPSILON)
        return Factors(down, up, self.scale), turn, back

    @property
    def is_ordered(self):
        """Whether the columns are nearly as `ordered` returns them."""
        sides = self.down, self.up.T
        shares = np.prod([np.linalg.norm(x, axis=0) for x in sides], axis=0)
        if np.any(np.diff(shares) > 1e-3 * shares.max()):
            return False
        for side in sides:
            used = side[:, shares > 0]
            unit = used / np.linalg.norm(used, axis=0)
            cosines = unit.T @ unit - np.eye(unit.shape[1])
            if np.any(np.abs(cosines) > 1e-3):
                return False
        return True

    def product(self):
        """The update of the kernel as a matrix, `(inputs, outputs)`."""
        return (self.down * np.float32(self.scale)) @ self.up


def float32_array(variable):
    return np.asarray(ops.convert_to_numpy(variable), dtype="float32")

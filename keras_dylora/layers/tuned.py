"""TunedCut: the best cut of trained columns at one rank.

An untuned cut of rank `b` is the first `b` columns of an adapter. A tuned cut
has `b` mixtures of all columns: `(x @ down) @ left @ right @ up`, where `left`
is `(rank, b)` and `right` is `(b, rank)`. It is a LoRA-XS core of rank `b` in a
trained LoRA. The untuned cut is the case `left = right.T = eye(rank)[:, :b]`.

Reference: [LoRA-XS, 2024](https://arxiv.org/abs/2405.17604)
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class TunedCut:
    """The tuned cut of one rank, or of one rank for each layer.

    `maximum` is the maximum rank of the model. A layer with a lower maximum
    reads only the columns that it has.

    Args:
        left: dict of layer path to a float32 array `(maximum, rank)`.
        right: dict of layer path to a float32 array `(rank, maximum)`.
    """

    left: dict[str, np.ndarray]
    right: dict[str, np.ndarray]

    @functools.cached_property
    def ranks(self):
        """Dict of layer path to int."""
        return {path: x.shape[1] for path, x in self.left.items()}

    def sides(self, path):
        """`left` and `right` of a layer."""
        return self.left[path], self.right[path]

    def core(self, path, scale):
        """The core that replaces the gate of a layer, with its `Scale`.

        The core is `(maximum, maximum)`, in float32.
        """
        left, right = self.sides(path)
        return np.float32(scale.at(max(self.ranks[path], 1))) * (left @ right)

    def mapped(self, left, right):
        """A copy, with a function of path and matrix applied to each side."""
        return TunedCut(
            {path: left(path, x) for path, x in self.left.items()},
            {path: right(path, x) for path, x in self.right.items()},
        )

    def of_columns(self, columns):
        """A copy for adapters with another number of columns.

        Added columns have no share. Columns that are left out must have none.
        """
        return self.mapped(
            lambda _, x: _resized(x, columns),
            lambda _, x: _resized(x.T, columns).T,
        )

    def renamed(self, paths):
        """A copy with other paths, by a dict of old path to new path."""
        return TunedCut(
            *(
                {paths.get(path, path): x for path, x in side.items()}
                for side in (self.left, self.right)
            )
        )

    def flat(self):
        """All values as one array `(2, …)`; see `of_flat`."""
        right = [x.T for x in self.right.values()]
        sides = self.left.values(), right
        return np.stack([np.concatenate([*map(np.ravel, x)]) for x in sides])

    @classmethod
    def of_flat(cls, values, ranks, columns):
        """Undoes `flat`, with a dict of path to rank and the maximum rank."""
        ends = np.cumsum([columns * b for b in ranks.values()])[:-1]
        left, right = (
            {
                path: x.reshape(columns, b)
                for (path, b), x in zip(
                    ranks.items(), np.split(side, ends), strict=True
                )
            }
            for side in np.asarray(values, "float32")
        )
        return cls(left, {path: x.T for path, x in right.items()})


def find(cuts, ranks):
    """The `TunedCut` with these ranks, a dict of path to int, or `None`."""
    return next((cut for cut in cuts if cut.ranks == ranks), None)


def _resized(left, columns):
    kept = left[:columns]
    return np.pad(kept, ((0, columns - len(kept)), (0, 0)))

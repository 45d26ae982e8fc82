"""TunedCut: the best cut of trained columns at one rank.

An untuned cut of rank `b` is the first `b` columns of an adapter. A tuned one
has `b` mixtures of all columns, `(x @ down) @ left @ right @ up`, where `left`
is `(rank, b)` and `right` `(b, rank)`. That is a LoRA-XS core of rank `b` in a
trained LoRA; the untuned cut is the case `left = right.T = eye(rank)[:, :b]`.

Reference: [LoRA-XS, 2024](https://arxiv.org/abs/2405.17604)
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class TunedCut:
    """The tuned cut of a rank, or of one rank for each layer.

    The maximum is that of the model. A layer of a lower one reads no more
    columns than it has.

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
        """What stands in the place of the gate of a layer, by its `Scale`.

        Of shape `(maximum, maximum)`, float32.
        """
        left, right = self.sides(path)
        return np.float32(scale.at(max(self.ranks[path], 1))) * (left @ right)

    def mapped(self, left, right):
        """A copy, with functions of path and matrix applied to the sides."""
        return TunedCut(
            {path: left(path, x) for path, x in self.left.items()},
            {path: right(path, x) for path, x in self.right.items()},
        )

    def of_columns(self, columns):
        """A copy for adapters of another number of columns.

        Columns that are added have no share; those that are left out must
        have none.
        """
        return self.mapped(
            lambda _, x: _resized(x, columns),
            lambda _, x: _resized(x.T, columns).T,
        )

    def renamed(self, paths):
        """A copy for a model with other paths, by a dict of old to new."""
        return TunedCut(
            *(
                {paths.get(path, path): x for path, x in side.items()}
                for side in (self.left, self.right)
            )
        )

    def flat(self):
        """All values as one array `(2, …)`, see `of_flat`."""
        right = [x.T for x in self.right.values()]
        sides = self.left.values(), right
        return np.stack([np.concatenate([*map(np.ravel, x)]) for x in sides])

    @classmethod
    def of_flat(cls, values, ranks, columns):
        """Undoes `flat`, by a dict of path to rank and the maximum rank."""
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
    """The `TunedCut` of these ranks, a dict of path to int, or `None`."""
    return next((cut for cut in cuts if cut.ranks == ranks), None)


def _resized(left, columns):
    kept = left[:columns]
    return np.pad(kept, ((0, columns - len(kept)), (0, 0)))

"""RankAllocation: a rank for each adapted layer, in place of one for all."""

import collections
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

import keras

from keras_dylora import files, tables
from keras_dylora.layers.kinds import matrix_shape
from keras_dylora.ranks import INT32_MAX, as_rank, by_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RankAllocation(Mapping[str, int]):
    """A rank for each adapted layer of a model, instead of one rank for all.

    Every function that takes a rank accepts an allocation: `set_rank`,
    `rank_scope`, `evaluate_ranks`, `merge`, `truncate`, `save_adapter`,
    `to_peft` and `export_ranks`. `allocate_ranks` finds one. You can also write
    one by hand. An allocation is a mapping of layer path to rank, and can't be
    changed.

    Args:
        ranks: dict of layer path to int in `0..max_rank`. At `0`, a layer
            computes what it does in the base model.
        matrices: dict of layer path to `(inputs, outputs)`, the shape of the
            layer's kernel as a matrix.
        max_rank: int. The maximum rank of the model; or dict of layer path to
            int, if `rank_pattern` gives layers a lower one.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a rank is out of range, or if the paths of `ranks` and
            `matrices` differ.

    Example:

    ```python
    small = keras_dylora.allocate_ranks(clf, texts, labels, budget=0.25)
    print(small)
    clf.set_rank(small)
    keras_dylora.save_adapter(clf, "small/", rank=small)
    small.to_json("small.json")
    ```
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        matrices: Mapping[str, tuple[int, int]],
        max_rank: int | Mapping[str, int],
    ) -> None:
        if not isinstance(max_rank, Mapping):
            most = as_rank(max_rank, 1, name="max_rank")
            max_rank = dict.fromkeys(matrices, most)
        self.max_ranks = by_layer(
            max_rank, dict.fromkeys(matrices, INT32_MAX), 1
        )
        self.max_rank = max(self.max_ranks.values())
        self.ranks = by_layer(dict(ranks), self.max_ranks)
        self.matrices = {p: tuple(matrices[p]) for p in self.ranks}

    @classmethod
    def of(cls, model: keras.Model, ranks: Mapping[str, int]) -> Self:
        """Makes an allocation for a model.

        Args:
            model: an enabled model or a `DyLoRAModel`.
            ranks: dict of layer path to int.

        Raises:
            TypeError: if a rank isn't an integer.
            ValueError: if a rank is out of range, or the paths aren't those of
                the model's adapted layers.
        """
        layers = model._dylora.layers
        matrices = {path: matrix_shape(x) for path, x in layers.items()}
        max_ranks = {path: x.rank for path, x in layers.items()}
        return cls(ranks, matrices, max_ranks)

    @property
    def parameters(self) -> int:
        """int. The parameters of the adapters at these ranks."""
        return sum(b * sum(self.matrices[p]) for p, b in self.ranks.items())

    @property
    def share(self) -> float:
        """float. `parameters` as a share of those at the maximum rank."""
        whole = (b * sum(self.matrices[p]) for p, b in self.max_ranks.items())
        return self.parameters / sum(whole)

    @property
    def label(self) -> str:
        """str. A short name: the lowest and highest rank, and the share."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = str(low) if low == high else f"{low} to {high}"
        return f"{ranks}, {self.share:.1%}"

    def __getitem__(self, path: str) -> int:
        return self.ranks[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __hash__(self) -> int:
        return hash(frozenset(self.ranks.items()))

    def __repr__(self) -> str:
        return f"RankAllocation({len(self)} layers, ranks {self.label})"

    def _grid(self):
        """Dict of kind of layer to a dict of number to rank.

        Layers are of one kind if their paths differ only in their first number.
        A path without a number has number 0, as Keras counts.
        """
        kinds = collections.defaultdict(dict)
        for path, b in self.ranks.items():
            found = re.search(r"_?(\d+)", path)
            number = int(found[1]) if found else 0
            kind = path.replace(found[0], "", 1) if found else path
            if number in kinds[kind]:  # such as `dense` beside `dense_0`
                kind, number = path, 0
            kinds[kind][number] = b
        return kinds

    def _rows(self):
        """The names of the columns, and the cells of each kind of layer."""
        grid = self._grid()
        numbers = sorted(set().union(*grid.values()))
        rows = [
            [kind, *(str(row.get(number, "")) for number in numbers)]
            for kind, row in grid.items()
        ]
        return ["ranks of layers", *map(str, numbers)], rows

    def _size(self):
        return (
            f"{self.parameters:,} parameters, {self.share:.1%} of those at "
            f"rank {self.max_rank}"
        )

    def __str__(self) -> str:
        names, rows = self._rows()
        table = tables.table(names, rows, fold=True)
        return f"{tables.text(table)}\n {self._size()}"

    def _repr_html_(self) -> str:
        return f"{tables.html(*self._rows())}<p>{self._size()}</p>"

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the allocation as JSON, and writes it if there is a `path`.

        Args:
            path: str or path of the file. Defaults to `None`: nothing is
                written.

        Returns:
            str: `{"max_rank": 8, "ranks": {…}, "matrices": {…}}`. If layers
                have different maximum ranks, `max_rank` is a dict like `ranks`.
        """
        one = len(set(self.max_ranks.values())) == 1
        content = {
            "max_rank": self.max_rank if one else self.max_ranks,
            "ranks": self.ranks,
            "matrices": self.matrices,
        }
        text = json.dumps(content, indent=2)
        if path is not None:
            with files.new_file(path) as beside:
                beside.write_text(text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the file that `to_json` wrote.

        Raises:
            ValueError: if `path` isn't such a file.
        """
        content = files.read_json(pathlib.Path(path))
        try:
            ranks, matrices = content["ranks"], content["matrices"]
            return cls(ranks, matrices, content["max_rank"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                "The file must be one that `RankAllocation.to_json` wrote. "
                f"Received: {str(path)!r} ({error!r})"
            ) from error

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draws the ranks as a heat map, by depth and kind of layer.

        Args:
            path: str or path of the picture. Its ending gives the format.
                Defaults to `None`: nothing is written.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: if matplotlib isn't installed.
        """
        from keras_dylora import figures

        title = f"{self.parameters:,} parameters, {self.share:.1%}"
        figure = figures.heat_map(self._grid(), self.max_rank, title)
        figure.save(path)
        return figure


Rank = int | RankAllocation

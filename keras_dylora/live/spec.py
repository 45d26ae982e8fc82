"""Spec: what is trained in a model, by path; the one place that decides it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import keras

from keras_dylora import _keras
from keras_dylora.config import AdapterArguments
from keras_dylora.layers.tree import Tree


@dataclasses.dataclass(frozen=True)
class Spec:
    """The parts of a model that are trained, by path. All others are frozen.

    A layer that is trained in full includes its statistics, such as moving
    averages: training changes them, so they belong to the adapter. A layer that
    is adapted doesn't include them.

    The user's flags don't change a spec: a layer that is frozen for a while
    still belongs to the adapter. `joined` adds what the user made trainable.

    Args:
        adapted: dict of layer path to `AdapterArguments`, in forward order.
        trained: dict of layer path to the names of the layer's own weights that
            are trained in full. There are no names if only the statistics of
            the layer belong to the adapter.
    """

    adapted: dict[str, AdapterArguments]
    trained: dict[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, tree: Tree, adapted: dict, weights: Iterable, whole: Iterable = ()
    ) -> Self:
        """The spec of chosen layers and weights.

        Args:
            tree: `Tree` of the model.
            adapted: dict of layer path to `AdapterArguments`.
            weights: the variables that are trained in full.
            whole: paths of layers. Their statistics, and those of the layers in
                them, are included whatever else is trained there.
        """
        ids = {id(v) for v in weights}
        inside = {id(x) for p in whole for x in tree.below(tree.every[p])}
        trained = {}
        for path, layer in tree.every.items():
            names = [v.name for v in _keras.own_weights(layer) if id(v) in ids]
            has_statistics = path not in adapted and _keras.statistics(layer)
            if names or (id(layer) in inside and has_statistics):
                trained[path] = tuple(names)
        return cls(adapted, trained)

    @classmethod
    def of_flags(cls, tree: Tree) -> Self:
        """The spec that the flags of a hand-built model describe.

        A layer is also trainable if only layers in it are. So statistics alone
        count only in a layer without others in it.
        """
        adapted = tree.adapted
        arguments = {p: AdapterArguments.of(x) for p, x in adapted.items()}
        trained = {}
        for path, layer in tree.every.items():
            if not layer.trainable or path in adapted:
                continue
            weights = _keras.own_weights(layer)
            names = tuple(v.name for v in weights if v.trainable)
            leaf = len(tree.below(layer)) == 1
            alone = leaf and _keras.statistics(layer)
            if names or alone:
                trained[path] = names
        return cls(arguments, trained)

    def joined(self, tree: Tree) -> Self:
        """The spec, with everything else that the model's flags let train."""
        trained = dict(self.trained)
        for path, names in self.of_flags(tree).trained.items():
            known = trained.get(path, ())
            trained[path] = (*known, *(x for x in names if x not in known))
        return dataclasses.replace(self, trained=trained)

    def with_weight(self, path: str, name: str) -> Self:
        """The spec, with one more weight of a layer trained in full."""
        names = (*self.trained.get(path, ()), name)
        trained = {**self.trained, path: tuple(dict.fromkeys(names))}
        return dataclasses.replace(self, trained=trained)

    def with_config(self, config: Any) -> Self:
        """The spec after a model got another `DyLoRAConfig`.

        Each layer keeps its own dropout, and its maximum rank if it is lower.
        """
        arguments = AdapterArguments.of(config)
        adapted = {
            path: dataclasses.replace(
                arguments.at_most(mine.rank), dropout=mine.dropout
            )
            for path, mine in self.adapted.items()
        }
        return dataclasses.replace(self, adapted=adapted)

    def full(self, tree: Tree) -> dict[str, keras.Variable]:
        """The weights that are trained in full, by path."""
        return self._trained_and_statistics(tree)[0]

    def statistics(self, tree: Tree) -> dict[str, keras.Variable]:
        """The variables that training changes without a gradient, by path."""
        return self._trained_and_statistics(tree)[1]

    def head(self, tree: Tree) -> dict[str, keras.Variable]:
        """Everything that an adapter has besides its factors, by path."""
        full, statistics = self._trained_and_statistics(tree)
        return full | statistics

    def _trained_and_statistics(self, tree):
        full, statistics = set(), set()
        for path, names in self.trained.items():
            layer = tree.every[path]
            weights = _keras.own_weights(layer)
            full |= {id(v) for v in weights if v.name in names}
            if path not in self.adapted:
                statistics |= {id(v) for v in _keras.statistics(layer)}
        weights = tree.weights.items() if full or statistics else ()
        return tuple(
            {path: v for path, v in weights if id(v) in ids}
            for ids in (full, statistics - full)
        )

    def own(self, tree: Tree) -> dict[str, keras.Variable]:
        """Everything that belongs to an adapter, by path, in a file's order."""
        factors = {
            f"{path}/{side}": getattr(tree.layers[path], side)
            for path in self.adapted
            for side in ("down", "up")
        }
        return factors | self.head(tree)

    def apply(self, tree: Tree) -> None:
        """Makes trainable what the spec names, and nothing else."""
        layers = [tree.layers[path] for path in self.adapted]
        keep = {id(v) for x in layers for v in (x.down, x.up)}
        keep |= {id(v) for v in self.full(tree).values()}
        named = {id(tree.every[p]) for p in [*self.adapted, *self.trained]}
        # Not by the setter of a `DyLoRAModel`, which calls this.
        keras.Layer.trainable.fset(tree.model, True)
        for layer in tree.layers.values():  # parents first: they set the rest
            layer.trainable = any(id(x) in named for x in tree.below(layer))
        for weight in tree.model.weights:
            weight.trainable = id(weight) in keep

    def get_config(self, tree: Tree) -> dict[str, Any]:
        """The spec for a file, with the places of the layers.

        Places are needed, as Keras numbers unnamed layers anew in each process.
        """
        place = {path: i for i, path in enumerate(tree.every)}
        return {
            "adapted": {
                path: {"place": place[path], **dataclasses.asdict(arguments)}
                for path, arguments in self.adapted.items()
            },
            "trained": {
                path: {"place": place[path], "weights": list(names)}
                for path, names in self.trained.items()
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], tree: Tree) -> Self:
        """Undoes `get_config`, with the current paths of the layers."""
        paths = list(tree.every)
        adapted = {}
        for entry in config["adapted"].values():
            arguments = dict(entry)
            path = paths[arguments.pop("place")]
            adapted[path] = AdapterArguments(**arguments)
        trained = {
            paths[entry["place"]]: tuple(entry["weights"])
            for entry in config["trained"].values()
        }
        return cls(adapted, trained)

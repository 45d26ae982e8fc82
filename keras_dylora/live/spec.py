"""Spec: what of a model is trained, by path; the one place that says so."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import keras

from keras_dylora import _keras
from keras_dylora.config import AdapterArguments
from keras_dylora.layers.tree import Tree


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a model is trained, by path. What it doesn't name is frozen.

    A layer that is trained in full brings its statistics, such as moving
    averages: training changes them, so they belong to the adapter. A layer
    that is adapted too doesn't.

    A flag of the user's doesn't change a spec: a layer that is frozen for a
    while still belongs to the adapter. `joined` takes in what the user made
    trainable besides.

    Args:
        adapted: dict of layer path to `AdapterArguments`, in forward order.
        trained: dict of layer path to the names of the layer's own weights
            that are trained in full. It has none of a layer that has
            statistics alone.
    """

    adapted: dict[str, AdapterArguments]
    trained: dict[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, tree: Tree, adapted: dict, weights: Iterable, whole: Iterable = ()
    ) -> Self:
        """The spec of what is chosen.

        Args:
            tree: `Tree` of the model.
            adapted: dict of layer path to `AdapterArguments`.
            weights: the variables that are trained in full.
            whole: paths of layers whose statistics are chosen, and those of
                the layers in them, whatever else is trained there.
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
        """The spec of a hand-built model, which its flags say.

        A layer is trainable also for the sake of what is in it, so statistics
        alone count where a layer has none in it.
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
        """The spec with what the flags of the model say besides."""
        trained = dict(self.trained)
        for path, names in self.of_flags(tree).trained.items():
            known = trained.get(path, ())
            trained[path] = (*known, *(x for x in names if x not in known))
        return dataclasses.replace(self, trained=trained)

    def with_weight(self, path: str, name: str) -> Self:
        """The spec with a weight of a layer that is trained in full too."""
        names = (*self.trained.get(path, ()), name)
        trained = {**self.trained, path: tuple(dict.fromkeys(names))}
        return dataclasses.replace(self, trained=trained)

    def with_config(self, config: Any) -> Self:
        """The spec after a model got another `DyLoRAConfig`.

        Each layer keeps its own dropout, and a lower maximum rank.
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
        """What training changes beside them without a gradient, by path."""
        return self._trained_and_statistics(tree)[1]

    def head(self, tree: Tree) -> dict[str, keras.Variable]:
        """All that an adapter has besides its factors, by path."""
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
        """All that belongs to an adapter, by path, in the order of a file."""
        factors = {
            f"{path}/{side}": getattr(tree.layers[path], side)
            for path in self.adapted
            for side in ("down", "up")
        }
        return factors | self.head(tree)

    def apply(self, tree: Tree) -> None:
        """Leaves trainable what the spec names, and nothing else."""
        layers = [tree.layers[path] for path in self.adapted]
        keep = {id(v) for x in layers for v in (x.down, x.up)}
        keep |= {id(v) for v in self.full(tree).values()}
        named = {id(tree.every[p]) for p in [*self.adapted, *self.trained]}
        # Past the setter of a `DyLoRAModel`, which calls this.
        keras.Layer.trainable.fset(tree.model, True)
        for layer in tree.layers.values():  # parents first: they set theirs
            layer.trainable = any(id(x) in named for x in tree.below(layer))
        for weight in tree.model.weights:
            weight.trainable = id(weight) in keep

    def get_config(self, tree: Tree) -> dict[str, Any]:
        """The spec for a file, with the places of the layers.

        Keras numbers layers without a name anew in each process.
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
        """Undoes `get_config`, by the paths that the layers have now."""
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

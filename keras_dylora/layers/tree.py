"""Tree: the layers and weights of a model by path, found by one walk."""

import functools

import keras

from keras_dylora import _keras
from keras_dylora.layers.low_rank import LowRankAdapter


class Tree:
    """The layers of a model by path, and its weights, as they are now.

    An operation walks the model once and passes the tree on in place of the
    model. A layer keeps its place when it gains, cuts or loses its adapter, so
    the tree stays right. Weights are looked up at each use.

    A path is Keras's own `layer.path` without the model's name. Where Keras
    gives several layers the same path, `_1`, `_2`, … is added. The preprocessor
    of a task is left out: it isn't trained, it gains layers when it runs, and
    Keras doesn't track it on every backend.

    Args:
        model: the `keras.Model`.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.layers: dict[str, keras.Layer] = {}  # parents first
        self._children: dict[int, list[keras.Layer]] = {}
        self._skipped = id(getattr(model, "preprocessor", None))
        self._visit(model, "")
        # And the model itself, whose path is empty.
        self.every: dict[str, keras.Layer] = {"": model, **self.layers}

    def _visit(self, parent, prefix):
        # In other layers, `layers` may be something else.
        ordered = parent.layers if isinstance(parent, keras.Model) else ()
        children = [*ordered, *_keras.sublayers(parent)]
        children = {id(x): x for x in children if id(x) != self._skipped}
        self._children[id(parent)] = list(children.values())
        for layer in children.values():
            if id(layer) in self._children:
                continue
            path = layer.path or f"{prefix}{layer.name}"
            path = path.removeprefix(f"{self.model.name}/")
            self.layers[_unique(path, self.layers)] = layer
            self._visit(layer, f"{path}/")

    @property
    def adapted(self) -> dict[str, LowRankAdapter]:
        """The adapted layers, in forward order."""
        return {
            path: layer
            for path, layer in self.layers.items()
            if isinstance(layer, LowRankAdapter)
        }

    @functools.cached_property
    def paths(self) -> dict[int, str]:
        """The path of each layer, by its `id`."""
        return {id(layer): path for path, layer in self.layers.items()}

    def below(self, layer: keras.Layer) -> list[keras.Layer]:
        """Returns a layer of the tree, or the model, and all layers in it."""
        found = {id(layer): layer}
        waiting = [layer]
        while waiting:
            for child in self._children[id(waiting.pop())]:
                if id(child) not in found:
                    found[id(child)] = child
                    waiting.append(child)
        return list(found.values())

    @property
    def weights(self) -> dict[str, keras.Variable]:
        """Every weight of the model by its path.

        A path begins with the innermost layer that holds the weight, as in
        `pooled_dense/kernel`, so it is the same in every process.
        """
        names: dict[int, str] = {}
        found: dict[str, keras.Variable] = {}
        for path, layer in reversed(self.layers.items()):
            for weight in _keras.own_weights(layer):
                names.setdefault(id(weight), f"{path}/{weight.name}")
        for weight in self.model.weights:
            path = names.get(id(weight), weight.name)
            found[_unique(path, found)] = weight
        return found

    @property
    def base_weights(self) -> dict[str, keras.Variable]:
        """The weights that aren't `down` or `up` of an adapted layer."""
        layers = self.adapted.values()
        adapters = {id(v) for x in layers for v in (x.down, x.up)}
        return {p: v for p, v in self.weights.items() if id(v) not in adapters}


def _unique(path, taken):
    unique, count = path, 0
    while unique in taken:
        count += 1
        unique = f"{path}_{count}"
    return unique

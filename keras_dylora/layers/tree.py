"""Tree: the layers and weights of a model by path, walked once an operation."""

import functools

import keras

from keras_dylora import _keras
from keras_dylora.layers.low_rank import LowRankAdapter


class Tree:
    """The layers of a model by path, and its weights, as they are now.

    An operation walks the model once and hands the tree on in its place. A
    layer that gains, cuts or loses its adapter keeps its place, so the tree
    stays right; weights are looked up at each use.

    A path is Keras's own `layer.path` less the model's name, with `_1`, `_2`,
    … where Keras gives two layers the same one. The preprocessor of a task is
    left out: it isn't trained, has more layers once it has run, and isn't
    tracked by Keras on every backend.

    Args:
        model: the `keras.Model`.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.layers: dict[str, keras.Layer] = {}  # parents first
        self._children: dict[int, list[keras.Layer]] = {}
        self._skipped = id(getattr(model, "preprocessor", None))
        self._visit(model, "")
        # With the model itself, whose path is empty.
        self.every: dict[str, keras.Layer] = {"": model, **self.layers}

    def _visit(self, parent, prefix):
        # Other layers may have a `layers` that is something else.
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
        """A layer of the tree, or the model, and all layers in it."""
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

        It is named after the innermost layer that holds it, such as
        `pooled_dense/kernel`, so that its path is the same in every process.
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

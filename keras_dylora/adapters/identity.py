"""Identity: which model an adapter is of, by its layers and its base.

Keras numbers unnamed layers anew in each process, so a path may name another
layer. A shape may also fit another base.
"""

import dataclasses
import math
import re

import keras
import numpy as np
from keras import ops

from keras_dylora import _keras
from keras_dylora.layers.factors import float32_array

# The part of the base that is kept: the first entries of a few weights.
WEIGHTS, ENTRIES = 8, 4
# One of the two bases may be in bfloat16.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Identity:
    """The layers that have weights, in order, and entries of some weights.

    `layers` is a list of the path and the class of each. `base` is a dict of
    the path of a frozen weight to its first entries.
    """

    layers: list[list[str]]
    base: dict[str, list[float]]

    @classmethod
    def of(cls, tree, trained):
        """The identity of an enabled model; `trained` are weights to skip."""
        frozen = {
            p: v for p, v in tree.base_weights.items() if p not in trained
        }
        base = {}
        for dimensions in (1, 2):
            paths = [p for p, v in frozen.items() if _has(dimensions, v)]
            step = max(len(paths) / WEIGHTS, 1)
            for i in range(min(len(paths), WEIGHTS)):
                path = paths[int(i * step)]
                base[path] = _first(frozen[path])
        return cls(_layers(tree), base)

    def get_config(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """Undoes `get_config`; raises a `TypeError` for anything else."""
        layers, base = config["layers"], config["base"]
        if not all(
            isinstance(x, list) and [str, str] == [type(y) for y in x]
            for x in layers
        ) or not all(isinstance(x, list) for x in base.values()):
            raise TypeError(f"not an identity: {config!r:.200}")
        return cls(layers, base)

    def paths_in(self, tree):
        """Dict of the path of each layer to the path of this layer in a model.

        Raises a `ValueError` if the model has other layers.
        """
        return self._paths(_layers(tree))

    def _paths(self, here):
        if len(here) != len(self.layers):
            raise ValueError(
                "An adapter must be loaded into a model with as many layers. "
                f"Received: one of {len(self.layers)} layers with weights, "
                f"for a model of {len(here)}"
            )
        paths = {}
        for (path, cls), (mine, my_class) in zip(
            self.layers, here, strict=True
        ):
            paths[path] = mine
            # In a model from a file, Keras leaves out the parents of a layer.
            if (_name(path), cls) != (_name(mine), my_class):
                raise ValueError(
                    "An adapter must be loaded into a model of the same "
                    f"layers, in the same order. Received: {path!r}, a {cls}, "
                    f"in the place of {mine!r}, a {my_class}"
                )
        return paths

    def check_base(self, tree, paths):
        """Raises a `ValueError` if a model has another base.

        `paths` is what `paths_in` returned. Quantized weights aren't compared.
        """
        here = tree.base_weights
        names = {renamed(path, paths) for path in self.base} & here.keys()
        self._check_base(
            {
                name: _first(here[name])
                for name in names
                if keras.backend.is_float_dtype(here[name].dtype)
            },
            paths,
        )

    def paths_to(self, other):
        """Dict of the path of each layer to its path in another `Identity`.

        Raises a `ValueError` if the layers or the bases differ.
        """
        paths = self._paths(other.layers)
        self._check_base(other.base, paths)
        return paths

    def _check_base(self, here, paths):
        for path, wanted in self.base.items():
            found = here.get(renamed(path, paths))
            if found is None:
                continue
            if len(found) != len(wanted) or not np.allclose(
                found, wanted, rtol=TOLERANCE, atol=TOLERANCE * 1e-2
            ):
                raise ValueError(
                    "An adapter must be loaded onto the base model that it "
                    "was trained on; `strict=False` loads it onto any. "
                    f"Received: an adapter of a base whose {path!r} begins "
                    f"with {wanted}, for one where it begins with {found}"
                )


def renamed(path, layers):
    """The path of a weight, once its layer has another path."""
    layer, _, name = path.rpartition("/")
    return f"{layers[layer]}/{name}" if layer in layers else path


def _layers(tree):
    found = []
    for path, layer in tree.layers.items():
        if _keras.own_weights(layer):
            cls = getattr(layer, "original_class", type(layer))
            found.append([path, cls.__name__])
    return found


def _has(dimensions, weight):
    return (
        keras.backend.is_float_dtype(weight.dtype)
        and min(len(weight.shape), 2) == dimensions
    )


def _first(weight):
    # A slice first, as JAX would copy the whole weight to flatten it.
    rows = -(-ENTRIES // max(math.prod(weight.shape[1:]), 1))
    first = ops.convert_to_tensor(weight)[:rows]
    return float32_array(first).reshape(-1)[:ENTRIES].tolist()


def _name(path):
    """The name of a layer, without the number that Keras may give it."""
    return re.sub(r"_\d+$", "", path.rpartition("/")[2])

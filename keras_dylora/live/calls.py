"""Finds layers that a model never calls, and values of weights in its graph."""

import contextlib
import re

import keras

from keras_dylora import _keras

# Sizes to try for the open axes of an input; with `None`, Keras chooses. Small
# sizes are first, as torch computes what it can't trace.
SIZES = (16, 64, 8, 256, None)


def never_called(tree, layers):
    """The paths of the given layers that a functional model never calls.

    Each layer of the model is traced on its own. A layer that can't be traced,
    or is in a subclassed model, counts as called.
    """
    called, alike = set(), {}
    with _recorded(layers, called):
        traced = _trace(tree, tree.model, set(layers), called, alike)
    idle = traced - called
    if any(_keras.graph_calls(tree.model)):  # what it calls is built then
        idle |= {path for path, layer in layers.items() if not layer.built}
    return [path for path in layers if path in idle]


def check_constants(model):
    """Raises a `ValueError` if a graph holds the values of weights.

    A copy of such a model, from a file or from `merge`, would compute with
    other values (KerasHub 0.32: the logits of Gemma 3n on JAX and TensorFlow).
    A model whose config contains the graph passes, as the values are in it.
    """
    for each in _keras.submodels(model):
        cls = getattr(type(each), "original_class", type(each))
        shapes = {tuple(w.shape) for w in each.weights if len(w.shape) > 1}
        shapes |= {shape[::-1] for shape in shapes}
        held = [
            f"{operation.name!r}, an array of shape {tuple(array.shape)}"
            for operation, array in _keras.graph_arrays(each)
            if tuple(array.shape) in shapes
        ]
        if held and "layers" not in cls.get_config(each):
            raise ValueError(
                "A model can be copied only if it computes with its weights, "
                f"but {cls.__name__} keeps values in their place, which its "
                f"config doesn't hold. Received: {each.name}, with "
                f"{', '.join(held)}"
            )


def _trace(tree, model, paths, called, alike):
    """Traces the calls of a model; returns the `paths` within traced layers.

    If layers are alike, such as the blocks of a transformer, only the first is
    traced. The others are taken to call the layers in the same places.
    """
    traced, failed = set(), set()
    for layer, args, kwargs in _keras.graph_calls(model):
        below = [tree.paths.get(id(x)) for x in tree.below(layer)]
        inside = paths.intersection(below)
        if any(_keras.graph_calls(layer)):
            traced |= _trace(tree, layer, inside, called, alike)
        elif inside:
            # Only calls of the layers that matter are recorded.
            watched = [i for i, x in enumerate(below) if x in inside]
            kind = _kind(layer, args, kwargs), tuple(watched)
            if kind not in alike:
                fits = any(_traces(layer, args, kwargs, size) for size in SIZES)
                places = [i for i, x in enumerate(below) if x in called]
                alike[kind] = fits, places
            fits, places = alike[kind]
            called |= {below[i] for i in places}
            (traced if fits else failed).update(inside)
    return traced - failed


def _kind(layer, args, kwargs):
    """A key that layers share if they call the same layers within them."""
    try:
        config = layer.get_config()
    except Exception:  # a user's layer, and KerasHub's Llama, have none
        config = id(layer)
    # Names contain numbers, which differ.
    return re.sub(r"_\d+\b", "", repr((type(layer), config, args, kwargs)))


def _traces(layer, args, kwargs, size):
    """Whether a call of a layer can be traced if its open axes have a size."""
    arguments = keras.tree.flatten([args, kwargs])
    tensors = {
        i: _of_size(x, size)
        for i, x in enumerate(arguments)
        if isinstance(x, keras.KerasTensor)
    }

    def call(values):
        filled = [
            values[i] if i in values else x for i, x in enumerate(arguments)
        ]
        a, k = keras.tree.pack_sequence_as([args, kwargs], filled)
        return layer(*a, **k)

    try:
        _Function(call)(tensors)
    except Exception:  # the layer doesn't take this size
        return False
    return True


def _of_size(x, size):
    if size is None:
        return x
    shape = [size if n is None else n for n in x.shape]
    shape[:1] = [2] * len(shape[:1])  # the batch
    return keras.KerasTensor(shape, x.dtype)


class _Function(keras.Layer):
    """A function as a layer: Keras traces it whole, without shortcuts."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


@contextlib.contextmanager
def _recorded(layers, called):
    """Adds the paths of layers that a `with` block calls to a set."""

    def recorder(path, method):
        def call(*args, **kwargs):
            called.add(path)
            return method(*args, **kwargs)

        return call

    methods = ("call", "quantized_call")
    try:
        for path, layer in layers.items():
            for name in methods:
                method = getattr(layer, name)
                layer.__dict__[name] = recorder(path, method)
        yield
    finally:
        for layer in layers.values():
            for name in methods:
                layer.__dict__.pop(name, None)

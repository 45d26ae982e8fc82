"""The parts of an enabled model's file that Keras doesn't write."""

import contextlib
import functools
import inspect

import keras

from keras_dylora import _keras
from keras_dylora.live.calls import check_constants

SEED_STATE = "random_state_"
NO_HDF5 = (
    "HDF5 can't hold the adapters of a model. Use a `.keras` file or "
    "`save_adapter`"
)


def check_savable(tree):
    """Raises a `ValueError` if a file of an enabled model couldn't be loaded.

    Such a model has Keras's own LoRA in it, or a graph that holds the values of
    weights.
    """
    check_constants(tree.model)
    lora = [
        p for p, x in tree.layers.items() if getattr(x, "lora_enabled", False)
    ]
    if lora:
        raise ValueError(
            "A model that is enabled can't be saved with Keras's own LoRA in "
            f"it. Received: LoRA at {lora}"
        )


def check_quantized(tree):
    """Raises a `ValueError` if no config tells that a layer is quantized.

    A model of a custom class makes its layers anew, as float layers, which
    can't take the integers of the file (Keras 3.15). Call this while the
    configs are those of the plain model.
    """
    configs = {}

    def kept(path):
        parts = path.split("/")
        for i in range(len(parts) + 1):
            layer = tree.every.get("/".join(parts[:i]))
            if layer is None:
                continue
            if id(layer) not in configs:
                configs[id(layer)] = layer.get_config()
            config = configs[id(layer)]
            # Keras's own containers have the configs of their layers.
            if "layers" not in config:
                return "source_name" in str(config)
        return True

    lost = [
        path
        for path, layer in tree.layers.items()
        if getattr(layer, "quantization_mode", None) and not kept(path)
    ]
    if lost:
        raise ValueError(
            "A model of a class that makes its own layers can't be loaded once "
            "they are quantized. Save it before `quantize`, or save its "
            f"weights. Received: quantized layers {lost}"
        )


@contextlib.contextmanager
def with_whole_configs(model):
    """Makes the configs of KerasHub models complete, within a `with` block.

    Some classes forget an argument (0.32: Llama's `tie_word_embeddings`, the
    `head_dtype` of image classifiers), so a copy would have other weights.
    """
    named = [x for x in _keras.submodels(model) if hasattr(x, "save_to_preset")]
    for each in named:
        config = functools.partial(_whole_config, each, each.get_config)
        each.__dict__["get_config"] = config
    try:
        yield
    finally:
        for each in named:
            del each.__dict__["get_config"]


def _whole_config(model, get_config):
    config = get_config()
    held = vars(model)
    if hasattr(model, "output_dense"):
        held = {"head_dtype": model.output_dense.dtype_policy, **held}
    kinds = bool, int, float, str, list, tuple, keras.DTypePolicy
    for name in inspect.signature(type(model).__init__).parameters:
        if name not in config and isinstance(held.get(name), kinds):
            config[name] = keras.saving.serialize_keras_object(held[name])
    return config


# In a file, a model's own weights have numbers. The next number is the place in
# the rank sequence. One more follows in frozen mode, for the open columns, and
# with `full_rank_steps`, for whether steps are at the maximum rank.


def save_state(tree, store):
    """Stores what Keras doesn't save with a model's own weights."""
    model = tree.model
    own = len(_keras.own_weights(model))
    for i, variable in enumerate(model._dylora.state.values()):
        store[f"{own + i}"] = variable
    for name, variable in _seed_states(model).items():
        store[name] = variable
    model._dylora.settle(tree)
    model._dylora.named.save(store, tree)


def load_state(tree, store):
    """Takes out what `save_state` stored; returns the rest, for Keras.

    Raises a `ValueError` if the store is that of a model that wasn't enabled.
    """
    model, stored = tree.model, {k: store[k] for k in store.keys()}
    own, states = len(_keras.own_weights(model)), _seed_states(model)
    adaptation = model._dylora
    if f"{own}" not in stored:
        raise ValueError(
            "The file holds no DyLoRA state. Load the weights of a base "
            f"model before you enable DyLoRA. Received: {model.name}"
        )
    adaptation.named.load(stored, tree)
    ranks_drawn = stored.pop(f"{own}")
    seeds = {k: stored.pop(k) for k in list(stored) if k.startswith(SEED_STATE)}
    second = stored.pop(f"{own + 1}", None)
    adaptation.ranks_drawn.assign(ranks_drawn)
    for variable in list(adaptation.state.values())[1:]:
        if second is not None and second.shape == variable.shape:
            variable.assign(second)
    if seeds.keys() == states.keys():
        for name, variable in states.items():
            variable.assign(seeds[name])
    # Otherwise the dropout differs, and its random numbers start anew, as in
    # Keras.
    return stored


def _seed_states(model):
    """The states of the layers' seed generators, which Keras doesn't save.

    Without them, a run with dropout couldn't resume where it stopped.
    """
    adaptation = model._dylora
    skip = [*model.weights, *adaptation.state.values()]
    skip += [v for x in adaptation.gates for v in x.variables.values()]
    skip = {id(v) for v in skip}
    states = [v for v in model.variables if id(v) not in skip]
    return {f"{SEED_STATE}{i}": v for i, v in enumerate(states)}

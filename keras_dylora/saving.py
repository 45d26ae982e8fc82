"""What a file of an enabled model has beside Keras's own."""

import keras

from keras_dylora import _keras
from keras_dylora.calls import check_constants

SEED_STATE = "random_state_"
NO_HDF5 = (
    "HDF5 can't hold the adapters of a model. Use a `.keras` file or "
    "`save_adapter`"
)


def check_savable(tree):
    """Raises a `ValueError` if a file of an enabled model couldn't be loaded.

    With Keras's own LoRA beside, with values in the place of weights, or where
    a class of KerasHub's doesn't say in its config how it was made (Llama 3's
    `tie_word_embeddings`, 0.32).
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
    for each in tree.every.values():
        if not isinstance(each, keras.Model):
            continue
        cls = getattr(type(each), "original_class", type(each))
        tied = "tie_word_embeddings"
        if getattr(each, tied, False) and tied not in cls.get_config(each):
            raise ValueError(
                f"{cls.__name__} forgets `{tied}` in its config, so that its "
                "file couldn't be loaded. Use `save_adapter`, or untied "
                f"embeddings. Received: {each.name} with {tied}=True"
            )


# In a file, a model's own weights have numbers. The next are of the place in
# the rank sequence and of the open columns, in frozen mode, or of whether steps
# are at the maximum rank, with `full_rank_steps`.


def save_state(tree, store):
    """Puts what Keras doesn't save into the store of a model's own weights."""
    model = tree.model
    own = len(_keras.own_weights(model))
    for i, variable in enumerate(model._dylora.state.values()):
        store[f"{own + i}"] = variable
    for name, variable in _seed_states(model).items():
        store[name] = variable
    model._dylora.settle(tree)
    model._dylora.named.save(store, tree)


def load_state(tree, store):
    """Takes what `save_state` put there; returns the rest, for Keras.

    Raises a `ValueError` if the store is of a model that wasn't enabled.
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
    # Else with another dropout: its random numbers start anew, as Keras's.
    return stored


def _seed_states(model):
    """States of the layers' seed generators, which Keras doesn't save.

    Without them, a run with dropout can't resume where it stopped.
    """
    adaptation = model._dylora
    skip = [*model.weights, *adaptation.state.values()]
    skip = {id(v) for v in skip + [g.variable for g in adaptation.gates]}
    states = [v for v in model.variables if id(v) not in skip]
    return {f"{SEED_STATE}{i}": v for i, v in enumerate(states)}

"""Our own adapter files: safetensors and JSON, cut to the saved rank."""

import dataclasses
import os
import pathlib
import warnings

import keras
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from keras_dylora import files
from keras_dylora.adapters import metadata
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.allocation import Rank
from keras_dylora.cuts import users_line, warn_of_cut
from keras_dylora.layers.tree import Tree
from keras_dylora.live.model import DyLoRAModel, Model, adaptation_of
from keras_dylora.live.named import DEFAULT

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "adapter_config.json"


def save_adapter(
    model: keras.Model | AdapterWeights,
    directory: str | os.PathLike[str],
    rank: Rank | None = None,
    overwrite: bool = True,
) -> None:
    """Saves the adapters, cut to a rank, and the trained head.

    The directory holds two files. `adapter.safetensors` has the tensors in
    float32: `adapter/<layer path>/down`, `adapter/<layer path>/up` and
    `head/<variable path>`. `adapter_config.json` has the configuration. At rank
    `b`, the adapter tensors have `b` columns and rows, so the file is as small
    as that of an adapter that was trained at rank `b`. With a `RankAllocation`,
    each layer has as many as its own rank, and a model that loads the file
    computes at these ranks.

    A file at the maximum rank also has the tuned cuts (see `tune_ranks`), as
    `tuned/<number>/<layer path>/left` and `right`. At a tuned rank, the file
    has the columns of the tuned cut, like any other adapter.

    Args:
        model: an enabled model, or the result of `combine_adapters`.
        directory: str or path. It is written under another name, then renamed.
        rank: int in `1..config.rank`, or `RankAllocation`. Defaults to `None`:
            the maximum rank.
        overwrite: bool. Whether an adapter in the directory may be replaced.
            Defaults to `True`.

    Raises:
        TypeError: if `rank` isn't an integer.
        ValueError: if `rank` is out of range, if the model isn't enabled, or
            if the directory holds something else.

    Example:

    ```python
    keras_dylora.save_adapter(clf, "adapter/", rank=4)
    keras_dylora.load_adapter(other_clf, "adapter/")
    ```
    """
    if isinstance(model, AdapterWeights):
        weights = model.cut(rank)
        if rank is not None:
            ranks, lowest = weights.ranks.values(), model.config.min_rank
            warn_of_cut(ranks, lowest, model.layers.values)
    else:
        weights = AdapterWeights.of(Tree(model)).cut(rank)
        adaptation_of(model).warn_of_cut(rank)
    tensors = weights.tensors() | weights.cut_tensors()
    tensors = {name: x.copy("C") for name, x in tensors.items()}
    written = files.together(WEIGHTS_NAME, CONFIG_NAME)
    with files.new_directory(directory, overwrite, written) as folder:
        safetensors.save_file(tensors, folder / WEIGHTS_NAME)
        metadata.write(folder / CONFIG_NAME, folder / WEIGHTS_NAME, weights)


def load_adapter(
    model: Model,
    directory: str | os.PathLike[str] | AdapterWeights,
    name: str = DEFAULT,
    strict: bool = True,
    head: bool = True,
) -> Model:
    """Loads an adapter that `save_adapter` wrote, in place.

    A model that isn't enabled is enabled with the configuration of the file. In
    an enabled model, the adapter replaces the one called `"default"`, and must
    have the same rank, alpha and layers.

    Under a new name, the adapter is added to those of the model. It may then
    have a lower rank than the model, which computes at no higher rank with it
    until it is trained. It may also have another alpha, which is multiplied
    into its rows. An adapter of one rank, such as a combined one, can always
    have another alpha and scaling.

    Layers are found by their place in the model, as Keras numbers unnamed
    layers anew in each process. Older files have only their names.

    Args:
        model: a built Keras or KerasHub model.
        directory: str or path, or the result of `combine_adapters`.
        name: str. The name of the adapter, which becomes the active one. Any
            name but `"default"` must be new. Defaults to `"default"`.
        strict: bool. Whether the model must have the layers and the base
            weights that the adapter was trained with. If not, it only needs
            all layers that the adapter adapts. Defaults to `True`.
        head: bool. Whether to load everything else that was trained, such as
            the task head. If not, the model keeps its own. Defaults to `True`.

    Returns:
        `model` itself.

    Raises:
        TypeError: if the name isn't a string.
        ValueError: if a file is missing, damaged or from a newer format; if the
            rank, alpha, a layer, a shape or the base differs; if the name is
            taken; or if the head of the model is quantized. The message lists
            missing, extra and mis-shaped tensors. The model is unchanged then.

    Warns:
        UserWarning: if an adapter of one rank has another scaling than the
            model. Its lower ranks then differ from those of the file.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.load_adapter(clf, "adapter/")
    keras_dylora.load_adapter(clf, "french/", name="french")
    clf.set_adapter("default")
    ```
    """
    if isinstance(directory, AdapterWeights):
        weights = directory
    else:
        weights = read(directory)
    config = weights.config
    of_one_rank = config.min_rank == config.rank
    fields: tuple[str, ...] = ()
    if isinstance(model, DyLoRAModel) and not of_one_rank:
        replaces = name in model.adapter_names
        fields = ("alpha", "scaling") if replaces else ("scaling",)
    for field in fields:
        mine = getattr(config, field)
        wanted = getattr(model.dylora_config, field)
        if mine != wanted:
            raise ValueError(
                f"An adapter must have the {field} of the model it is loaded "
                f"into. Received: {field}={mine!r} for a model of "
                f"{field}={wanted!r}"
            )
    if not head:
        weights = dataclasses.replace(weights, trained={})
    weights.put_on(Tree(model), whole=head, strict=strict, name=name)
    if config.rank > 1 and config.scaling != model.dylora_config.scaling:
        warnings.warn(
            "A model scales all of its adapters alike, so an adapter of "
            "another `scaling` computes the same only at its maximum rank. "
            f"Received: scaling={config.scaling!r} for a model of "
            f"scaling={model.dylora_config.scaling!r}",
            stacklevel=users_line(),
        )
    return model


def read(directory):
    """Reads the `AdapterWeights` in a directory."""
    folder = pathlib.Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            found = f"without {name}" if folder.is_dir() else "that isn't there"
            raise ValueError(
                f"An adapter directory must hold {CONFIG_NAME} and "
                f"{WEIGHTS_NAME}. Received: {str(folder)!r} {found}"
            )
    config, identity, ranks = metadata.read(
        folder / CONFIG_NAME, folder / WEIGHTS_NAME, "save_adapter"
    )
    try:
        tensors = safetensors.load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(
            f"{WEIGHTS_NAME} must be a safetensors file. "
            f"Received: {str(folder / WEIGHTS_NAME)!r} ({error})"
        ) from error
    return AdapterWeights.of_tensors(tensors, config, identity, ranks)

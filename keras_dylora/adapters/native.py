"""Our own adapter files: safetensors and JSON, cut to the rank that is kept."""

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

    The directory holds `adapter.safetensors`, with
    `adapter/<layer path>/down`, `adapter/<layer path>/up` and
    `head/<variable path>` in float32, and `adapter_config.json`. At rank `b`
    the adapter tensors have `b` columns and rows, so the file is as small as
    that of an adapter trained at rank `b`. With a `RankAllocation`, each has
    as many as its layer has ranks, and a model that loads it computes at it.

    Tuned cuts, see `tune_ranks`, are in the file at the maximum rank, as
    `tuned/<number>/<layer path>/left` and `right`. At a tuned rank its columns
    are those of its cut, as in any other adapter.

    Args:
        model: an enabled model, or what `combine_adapters` returned.
        directory: str or path. Written beside, then renamed.
        rank: int in `1..config.rank`, or `RankAllocation`. Defaults to
            `None`, the maximum.
        overwrite: bool. Whether an adapter that is there may be replaced.
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
    """Loads what `save_adapter` wrote, in place.

    A model that isn't enabled yet is enabled with the configuration of the
    file. An enabled one must have the same rank, alpha and layers; by a new
    name, the adapter comes beside those that are there, and may have a lower
    rank, which is the highest that it computes at until it is trained, and
    another alpha, which goes into its rows. So does the scale of an adapter of
    one rank, such as a combined one, whose alpha and scaling are free. Layers
    are found by their place in the model, as Keras numbers those without a name
    anew in each process; older files have their names alone.

    Args:
        model: a built Keras or KerasHub model.
        directory: str or path, or what `combine_adapters` returned.
        name: str. What the adapter is called; it is the active one then.
            Defaults to `"default"`, which replaces the one of that name.
        strict: bool. Whether the model must have the layers and the base
            weights that the adapter was trained with. If not, all adapted
            layers must be there still. Defaults to `True`.
        head: bool. Whether to load what was trained besides, such as the head
            of a task. If not, the model keeps its own. Defaults to `True`.

    Returns:
        `model` itself.

    Raises:
        TypeError: if the name isn't a string.
        ValueError: if the files are missing, damaged or from a newer format,
            or if the rank, alpha, a layer, a shape or the base differs, if
            the name is taken, or if the head of the model is quantized. The
            message lists what is missing, extra or mis-shaped; the model is
            unchanged then.

    Warns:
        UserWarning: if an adapter of one rank has another scaling than the
            model, so that its lower ranks aren't those of the file.

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
            "A model scales all of its adapters alike, so one of another "
            "`scaling` computes the same at its maximum rank alone. "
            f"Received: scaling={config.scaling!r} for a model of "
            f"scaling={model.dylora_config.scaling!r}",
            stacklevel=users_line(),
        )
    return model


def read(directory):
    """The `AdapterWeights` in a directory."""
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

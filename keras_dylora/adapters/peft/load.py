"""from_peft: loads an adapter in the Hugging Face PEFT format."""

import dataclasses
import os

import numpy as np

from keras_dylora.adapters.fitting import check_shapes
from keras_dylora.adapters.peft import embeddings, fields, tensors, tokens
from keras_dylora.adapters.peft import files as peft_files
from keras_dylora.adapters.peft.families import layout_of
from keras_dylora.adapters.peft.layout import OUTPUT
from keras_dylora.adapters.weights import AdapterWeights, with_max_ranks
from keras_dylora.config import DyLoRAConfig
from keras_dylora.cuts import warn_of_cut
from keras_dylora.layers.factors import Factors
from keras_dylora.layers.kinds import matrix_shape
from keras_dylora.layers.tree import Tree
from keras_dylora.live.model import Model
from keras_dylora.live.named import DEFAULT


def from_peft(
    model: Model,
    directory: str | os.PathLike[str],
    name: str = DEFAULT,
    strict: bool = True,
    head: bool = True,
    rank: int | None = None,
) -> Model:
    """Loads a Hugging Face PEFT adapter of plain LoRA kind, in place.

    A model that isn't enabled is enabled for the layers of the adapter. An
    adapter that `to_peft` saved comes back as the DyLoRA adapter that it was.
    Any other adapter was trained at one rank, so `min_rank` becomes `rank`. Its
    columns are put in order, as `order_ranks` does, and `scaling` becomes
    `"constant"`, so that it can be cut.

    The adapter keeps its scale at every `alpha` of the model. If several
    KerasHub layers are one in transformers, such as GPT-2's `c_attn`, its
    adapter becomes one for each of them. PEFT's `rank_pattern` becomes that of
    the config. Embeddings that PEFT saved because tokens were added need a
    model with the same vocabulary, and are trained in full from then on.

    Args:
        model: a KerasHub model that `to_peft` takes, enabled or not, with the
            base weights that the adapter is for.
        directory: str or path, with `adapter_config.json` and
            `adapter_model.safetensors`.
        name: str. The name of the adapter, as in `load_adapter`. Defaults to
            `"default"`.
        strict: bool. Whether the model must have the layers and the base
            weights of the one that `to_peft` saved. It means nothing for other
            adapters, which don't describe their model. Defaults to `True`.
        head: bool. Whether to load the head of the adapter, if it has one. If
            not, the model keeps its own, which may have other classes. Defaults
            to `True`.
        rank: int. The rank to cut the adapter to, such as for a model of a
            lower rank. Defaults to `None`: the adapter isn't cut.

    Returns:
        `model` itself.

    Raises:
        TypeError: if a number in the configuration has the wrong type.
        ValueError: if a file is missing or damaged; if the adapter isn't a
            plain LoRA, or is for other layers, shapes or another rank; or if
            the model is of another class, or its head is quantized. The model
            is unchanged then.

    Example:

    ```python
    clf = keras_hub.models.RobertaTextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_dylora.from_peft(clf, "peft/")
    ```

    Reference:

    - [PEFT checkpoint format](
        https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    tree = Tree(model)
    weights = read(tree, directory, strict, head)
    if rank is not None:
        whole, weights = weights, weights.cut(rank)
        warn_of_cut([rank], whole.config.min_rank, whole.layers.values)
    weights.put_on(tree, whole=False, strict=strict, name=name)
    return model


def read(tree, directory, strict, head):
    """Reads the `AdapterWeights` for a model, with a head if `head` is set."""
    layout = layout_of(tree.model)
    adapter = peft_files.read(directory)
    if not head:
        adapter = adapter.without_head()
    adapter = _placed(tree, layout, adapter, strict)
    adapter = embeddings.without_output(tree, layout, adapter)
    adapter = embeddings.without_tables(tree, layout, adapter)
    adapter, ids, update = tokens.taken_out(tree, layout, adapter)
    modules = layout.modules(tree)
    columns = layout.columns_by_module(tree, modules)
    modules = _adapted(modules, adapter, layout)
    ranks = adapter.layer_ranks
    head = _head(layout, adapter)
    every, layers = tree.weights, tree.layers
    shapes = {n: tuple(every[p].shape)[::-1] for n, p in head.items()}
    tables = embeddings.trained(tree.model, adapter, every)
    shapes |= {n: adapter.tensor(n).shape for n in tables}
    absent = {}  # layers at rank 0, which aren't in the file
    for module, paths in modules.items():
        layer = layers[next(filter(None, paths))]
        outputs = sum(map(len, columns[module]))
        if ranks and not _own_rank(paths, ranks):
            nothing = np.zeros((matrix_shape(layer)[0], 0))
            absent[module] = Factors(nothing, np.zeros((0, outputs)), 1.0)
            continue
        sides = tensors.shapes(layer, adapter.rank(module), outputs)
        names = layout.tensor_names(module)
        shapes |= dict(zip(names, sides, strict=True))
    _check_places(layout, adapter, shapes)
    check_shapes(
        {f"{peft_files.PREFIX}{name}": x for name, x in shapes.items()},
        adapter.tensors,
    )
    config = dataclasses.replace(
        _config(modules, adapter), trainable_tokens=ids
    )
    parts = {}
    for module, paths in modules.items():
        factors = absent.get(module)
        if factors is None:
            factors = adapter.factors(module, layout.tensor_names(module))
        if ranks:  # PEFT's own file may have been changed; ours wasn't
            first = next(filter(None, (ranks.get(p) for p in paths)), 1)
            scale = config.scale.at(first)
            factors = dataclasses.replace(factors, scale=scale)
        parts |= _split(factors, paths, columns[module], ranks)
    if not ranks:
        parts = {path: factors.ordered()[0] for path, factors in parts.items()}
        each = {path: factors.rank for path, factors in parts.items()}
        config = with_max_ranks(config, each)
    trained = {path: adapter.tensor(name).T for name, path in head.items()}
    trained |= {path: value for value, path in tables.values()}
    return AdapterWeights(parts, trained | update, config, adapter.identity)


def _head(layout, adapter):
    """The weights of the head that a file must have, by name.

    They are those of the layers that `modules_to_save` names. If it names no
    part of the head, the file may leave the head out as a whole.
    """
    if adapter.config.get("modules_to_save"):
        return {
            name: path
            for name, path in layout.head.items()
            if fields.saves(adapter.config, name.rpartition(".")[0])
        }
    names = {x.removeprefix(peft_files.PREFIX) for x in adapter.tensors}
    return layout.head if names & layout.head.keys() else {}


def _check_places(layout, adapter, shapes):
    """Raises a `ValueError` if a field asks for tensors that have no place.

    The message names the field. `check_shapes` reports all other misfits.
    """
    heads = {name.rpartition(".")[0] for name in layout.head}
    outside = heads | {OUTPUT}
    names = {x.removeprefix(peft_files.PREFIX) for x in adapter.tensors}
    rest = sorted(names - shapes.keys())
    adapted = {x.partition(".lora_")[0] for x in rest if ".lora_" in x}
    if adapted & outside:
        raise ValueError(
            "An adapter must leave the head and the output to "
            "`modules_to_save`, as PEFT does for a `task_type`. Otherwise, "
            "PEFT's `merge_and_unload` puts it into the base. Received: "
            f"target_modules={adapter.config.get('target_modules')!r} "
            f"with adapters of {sorted(adapted & outside)}"
        )
    full = [
        name
        for name in rest
        if ".lora_" not in name
        and fields.saves(
            adapter.config, adapter.in_config(name.rpartition(".")[0])
        )
    ]
    if full:
        raise ValueError(
            "`modules_to_save` must name only the task head of the model and "
            "its embeddings of tokens. `head=False` loads the adapters "
            "without it, and PEFT's `merge_and_unload` puts it into the base. "
            f"Received: modules_to_save={adapter.config['modules_to_save']!r} "
            f"with tensors {full}"
        )


def _placed(tree, layout, adapter, strict):
    """The adapter, with the names that the layers of a model have.

    In transformers, the layers of a task have a prefix that a bare model
    doesn't have, and some versions have other prefixes.
    """
    names = [x.removeprefix(peft_files.PREFIX) for x in adapter.tensors]
    found = {layout.prefix_of(x) for x in names if ".lora_" in x} - {None}
    if len(found) != 1 or found == {layout.prefix}:
        return adapter
    if strict and adapter.identity is not None:
        adapter.identity.check_base(tree, {})
    moved = adapter.moved(*found, layout.prefix)
    return dataclasses.replace(moved, identity=None)


def _adapted(modules, adapter, layout):
    """Dict of the name of each adapted module to the paths of Keras layers.

    A path is `None` for a Keras layer without an adapter.
    """
    if adapter.dylora is None:
        return {
            module: paths
            for module, paths in modules.items()
            if adapter.adapts(module, layout.tensor_names(module))
        }
    targets = adapter.dylora.target_layers
    found = {
        module: tuple(path if path in targets else None for path in paths)
        for module, paths in modules.items()
    }
    return {module: paths for module, paths in found.items() if any(paths)}


def _config(modules, adapter):
    """The `DyLoRAConfig` of an adapter."""
    if not modules:
        raise ValueError(
            "The adapter must adapt layers of the model. "
            f"Received: an adapter with tensors {sorted(adapter.tensors)}"
        )
    if adapter.dylora is not None:
        for module, paths in modules.items():
            rank = _own_rank(paths, adapter.layer_ranks)
            if rank and adapter.rank(module) != rank:
                raise ValueError(
                    f"{peft_files.CONFIG_NAME} must give the rank that "
                    f"{peft_files.DYLORA_NAME} does. Received: "
                    f"{adapter.rank(module)} instead of {rank} for {module}"
                )
        return adapter.dylora
    rank, alpha = max((adapter.rank(m), adapter.alpha(m)) for m in modules)
    return DyLoRAConfig(
        rank=rank,
        min_rank=rank,
        alpha=alpha,
        scaling="constant",
        dropout=adapter.config.get("lora_dropout", 0.0),
    )


def _own_rank(paths, ranks):
    """The rank of a layer that `_fuse` made of several Keras layers."""
    return sum(ranks[path] for path in filter(None, paths))


def _split(fused, paths, columns, ranks):
    """Undoes `_fuse`; a dict of path to `Factors`.

    Without `ranks`, the adapter isn't one of `_fuse`, so every part needs all
    columns of `down`.
    """
    parts, start = {}, 0
    for path, places in zip(paths, columns, strict=True):
        if path is None:
            continue
        rows = slice(None)
        if ranks:
            rows = slice(start, start + ranks[path])
            start += ranks[path]
        up = fused.up[rows][:, places]
        parts[path] = Factors(fused.down[:, rows], up, fused.scale)
    return parts

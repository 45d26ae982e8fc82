"""to_peft: saves adapters in the Hugging Face PEFT format."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np

from keras_dylora import files
from keras_dylora.adapters.fitting import check_float
from keras_dylora.adapters.peft import embeddings, tokens
from keras_dylora.adapters.peft import files as peft_files
from keras_dylora.adapters.peft.card import is_ours, model_card
from keras_dylora.adapters.peft.families import layout_of
from keras_dylora.adapters.peft.layout import OUTPUT
from keras_dylora.adapters.peft.tensors import kernel_size, of_factors
from keras_dylora.adapters.weights import AdapterWeights
from keras_dylora.allocation import Rank
from keras_dylora.layers.factors import Factors, float32_array
from keras_dylora.layers.tree import Tree
from keras_dylora.live.model import adaptation_of
from keras_dylora.ranks import as_rank, as_ranks
from keras_dylora.reports.report import RankReport

LAYOUTS = ("peft", "server")
DTYPES = ("float32", "float16", "bfloat16")


def to_peft(
    model: keras.Model,
    directory: str | os.PathLike[str],
    rank: Rank | None = None,
    overwrite: bool = True,
    layout: Literal["peft", "server"] = "peft",
    ranks: Sequence[int] | None = None,
    base_model_name_or_path: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    server_rank: int | None = None,
    report: RankReport | None = None,
    architecture: str | None = None,
) -> None:
    """Saves the adapters, cut to a rank, as a Hugging Face PEFT adapter.

    PEFT loads the directory onto the transformers model with the same base
    weights. It then computes what `model` computes at that rank, as
    `lora_alpha / r` is the scale `alpha / rank`. `modules_to_save` has the head
    of a classifier, and an embedding of tokens that was trained in full. Our
    own file, `keras_dylora.json`, tells `from_peft` that the ranks have an
    order. At a `RankAllocation`, `rank_pattern` and `alpha_pattern` have the
    ranks of the layers, and layers at rank 0 are left out.

    Programs that serve adapters, such as vLLM, read one rank and one scale for
    all layers. `layout="server"` writes that: lower ranks are padded with
    zeros, and `lora_B` includes the scale, so `lora_alpha` is `r`.

    Several KerasHub layers may be one in transformers: query, key and value are
    GPT-2's `c_attn`. The adapter of such a layer has the sum of their ranks,
    with zeros outside of their blocks. KerasHub's BERT, ALBERT, ELECTRA and
    GPT-NeoX use the tanh form of GELU, so the transformers model needs
    `hidden_act="gelu_pytorch_tanh"` to agree to the last digits.

    Args:
        model: an enabled KerasHub text classifier of RoBERTa, XLM-R, BERT,
            DistilBERT, ALBERT or DeBERTa-v3, a causal LM of GPT-2, OPT, Bloom,
            Falcon, GPT-NeoX, Llama, Mistral, Mixtral, Qwen 2, 3 and 3.5, Gemma
            1 to 4, Phi-3 or SmolLM 3, a sequence-to-sequence LM of BART or T5,
            an image classifier of ViT or ResNet, or the backbone of one, or
            of ELECTRA.
        directory: str or path. It is written under another name, then renamed.
        rank: int in `1..config.rank`, or `RankAllocation`. Defaults to `None`:
            the maximum rank.
        overwrite: bool. Whether an adapter in the directory may be replaced.
            Defaults to `True`.
        layout: str. `"peft"` or `"server"`. Defaults to `"peft"`.
        ranks: list of int in `1..config.rank`, instead of `rank`. Each rank
            gets its own directory within `directory`, `rank_1` and so on.
            Defaults to `None`.
        base_model_name_or_path: str. Where transformers finds the base model.
            With it, PEFT's `AutoPeftModelFor…` needs only the directory.
            Defaults to `None`.
        dtype: str. The dtype of the stored tensors: `"float32"`, `"float16"` or
            `"bfloat16"`. Defaults to `None`: float32.
        server_rank: int. The rank to pad to with `layout="server"`, for servers
            that take only some ranks, such as 8, 16, 32, 64, 128 or 256.
            Defaults to `None`: the highest rank of a layer.
        report: `RankReport`. Its metrics go into the model card, `README.md`.
            Defaults to `None`.
        architecture: str. The class of transformers that holds the base, as
            `config.json` of the base names it. Gemma 3 from 4B on, Gemma 4 and
            Qwen 3.5 are published as `"Gemma3ForConditionalGeneration"` and so
            on, in which the layers have other names than in
            `"Gemma3ForCausalLM"`. Defaults to `None`: the class that takes
            images if `model` does, else the class for text alone, with a
            warning if the published models of this size have another class.

    Raises:
        TypeError: if a rank isn't an integer.
        ValueError: if a rank, `layout`, `dtype` or `architecture` isn't one
            that is allowed; if both `rank` and `ranks` are given; if
            `server_rank` is below the rank of a layer; if the model isn't
            enabled or is of another class; if adapters or trained weights have
            no place in a PEFT adapter, or are too large for `dtype`; or if the
            directory holds something else.

    Example:

    ```python
    keras_dylora.to_peft(clf, "peft/", rank=4)
    keras_dylora.to_peft(clf, "all/", ranks=[1, 4, 8])  # all/rank_1, …

    base = transformers.RobertaForSequenceClassification.from_pretrained(...)
    peft.PeftModel.from_pretrained(base, "peft/")
    ```

    Reference:

    - [PEFT checkpoint format](
        https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"`layout` must be one of {LAYOUTS}. Received: layout={layout!r}"
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"`dtype` must be one of {DTYPES}. Received: dtype={dtype!r}"
        )
    if rank is not None and ranks is not None:
        raise ValueError(
            "Give `rank` or `ranks`, not both. "
            f"Received: rank={rank!r}, ranks={ranks!r}"
        )
    if server_rank is not None and layout != "server":
        raise ValueError(
            "`server_rank` needs `layout='server'`. "
            f"Received: server_rank={server_rank!r} with layout={layout!r}"
        )
    adaptation = adaptation_of(model)
    chosen = {".": rank}
    if ranks is not None:
        high = adaptation.max_rank
        chosen = {f"rank_{b}": b for b in as_ranks(ranks, 1, high)}
        if not chosen or len(chosen) < len(ranks):
            raise ValueError(
                "`ranks` must name at least one rank, and each once. "
                f"Received: ranks={ranks!r}"
            )
    tree = Tree(model)
    whole = AdapterWeights.of(tree)
    cut = {name: whole.cut(b) for name, b in chosen.items()}
    adaptation.warn_of_cut(*chosen.values())
    family = layout_of(model).of_architecture(model, architecture)
    modules = family.modules(tree)
    every = tree.weights
    full = tree.model._dylora.spec.full(tree)
    tables = embeddings.in_full(tree, family) if layout == "peft" else {}
    tables = {name: path for name, path in tables.items() if path in full}
    named = family.head | tables
    head = {path: every[path] for path in named.values()}
    _check_exportable(tree, head, tables.values(), modules, whole)
    token_config, token_rows = tokens.of_model(tree, family)
    if token_rows and layout == "server":
        raise ValueError(
            "Servers read only the factors of an adapter, and no trained "
            "tokens. Use `layout='peft'`, or `merge`. Received: "
            f"layout={layout!r} of a model with {token_config}"
        )
    columns = family.columns_by_module(tree, modules)
    sizes = {x: kernel_size(tree.layers[p]) for x, (p, *_) in modules.items()}
    tied = family.tied(tree)
    if layout == "server" and set(modules.get(tied, ())) & set(whole.layers):
        raise ValueError(
            "An adapter of an embedding that the output is tied to can't be "
            "written for servers. Use `layout='peft'` or `merge`, or adapt "
            "other layers. "
            f"Received: layout={layout!r} with an adapter of {tied}"
        )
    trained = {
        name: float32_array(head[path])
        if path.endswith("/embeddings")
        else float32_array(head[path]).T
        for name, path in named.items()
    }
    with files.new_directory(directory, overwrite, _written) as folder:
        for name, weights in cut.items():
            fused, described = _described(weights, modules, columns)
            if fused.get(tied) is not None:
                fused[OUTPUT] = fused[tied].transposed()
            dylora = described.config
            if layout == "server":
                fused = _of_one_rank(fused, server_rank)
                dylora = dataclasses.replace(dylora, scaling="constant")
            config = peft_files.peft_config(
                family, fused, tables, dylora, base_model_name_or_path
            )
            config |= token_config
            (folder / name).mkdir(exist_ok=True)
            peft_files.write(
                folder / name,
                _tensors(fused, family, sizes) | trained | token_rows,
                config,
                # A server's adapter is padded, so it isn't loaded as ours.
                described if layout == "peft" else None,
                dtype or "float32",
                model_card(config, weights, whole.config, report),
            )


def _written(directory):
    """The files that `to_peft` wrote, for `files.new_directory`."""
    found = []
    for folder in (directory, *directory.glob("rank_*")):
        names = files.together(*peft_files.NAMES)(folder)
        card = folder / peft_files.CARD_NAME
        if names and card.is_file() and is_ours(card.read_bytes()):
            names.append(card.name)
        found += [(folder / name).relative_to(directory) for name in names]
    return found


def _described(weights, modules, columns):
    """The `Factors` by module, and the weights with a config that fits."""
    fused = {
        module: _fuse(
            [weights.layers.get(path) for path in paths], columns[module]
        )
        for module, paths in modules.items()
    }
    config = dataclasses.replace(
        weights.config, target_layers=list(weights.layers)
    )
    return fused, dataclasses.replace(weights, config=config)


def _tensors(fused, layout, sizes):
    """The tensors of all `Factors`, by name; `sizes` has the kernel sizes."""
    tensors = {}
    for module, factors in fused.items():
        if factors is not None:
            sides = of_factors(factors, sizes.get(module, ()))
            names = layout.tensor_names(module)
            tensors |= dict(zip(names, sides, strict=True))
    return tensors


def _check_exportable(tree, head, tables, modules, weights):
    known = {path for paths in modules.values() for path in paths}
    other = sorted(set(weights.layers) - known)
    if other:
        raise ValueError(
            "A PEFT adapter can adapt the linear layers, convolutions and "
            "embedding of tokens that transformers has in its backbone. Name "
            "only these in `target_layers`, or use `merge`. "
            f"Received: adapters at {other}"
        )
    spec = tree.model._dylora.spec
    rows = tree.model._dylora.tokens
    exported = {*head, rows.weight} if rows else set(head)
    other = sorted(set(spec.full(tree)) - exported)
    if other:
        raise ValueError(
            "A PEFT adapter can hold adapters, the task head and, except for "
            "servers, the embedding of tokens, but nothing else that is "
            f"trained. Use `merge`. Received: trained weights {other}"
        )
    check_float(head)
    for path, weight in head.items():
        if path in tables:
            continue
        width = getattr(tree.model.backbone, "hidden_dim", weight.shape[0])
        if weight.shape[0] != width and len(weight.shape) == 2:
            raise ValueError(
                "In transformers, the task head is as wide as the backbone, "
                f"{width}. Received: {path!r} of shape {weight.shape}"
            )


def _fuse(layers, columns):
    """The `Factors` of Keras layers that are one layer in transformers.

    The columns of all are side by side. In the rows, each layer has a block at
    the `columns` of its outputs, with zeros elsewhere. A layer without an
    adapter is `None`. So is the result if no layer has a rank above 0.
    """
    blocks = [(i, x) for i, x in enumerate(layers) if x is not None and x.rank]
    if not blocks:
        return None
    _, first = blocks[0]
    rank = sum(x.rank for _, x in blocks)
    up = np.zeros((rank, sum(map(len, columns))), dtype="float32")
    start = 0
    for i, x in blocks:
        rows = slice(start, start + x.rank)
        up[rows, columns[i]] = x.up * np.float32(x.scale / first.scale)
        start += x.rank
    down = np.concatenate([x.down for _, x in blocks], axis=1)
    return Factors(down, up, first.scale)


def _of_one_rank(fused, server_rank):
    """Pads `Factors` to one rank, and multiplies their scale into `up`."""
    rank = max(x.rank for x in fused.values() if x is not None)
    if server_rank is not None:
        rank = as_rank(server_rank, rank, name="server_rank")
    return {
        module: x
        and Factors(x.down, x.up * np.float32(x.scale), 1.0).padded(rank)
        for module, x in fused.items()
    }

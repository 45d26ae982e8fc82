"""export_ranks: checks the arguments, then writes and verifies an artifact."""

import collections.abc
import importlib.util
import os
from typing import Any, Literal

import keras

from keras_dylora import files
from keras_dylora import ranks as ranks_module
from keras_dylora.allocation import Rank, RankAllocation
from keras_dylora.export import by_tensorflow, manifest, readme
from keras_dylora.export.plan import Inputs, Plan, Served, ServedAdapter
from keras_dylora.export.verify import verify as verify_artifact
from keras_dylora.live import sizes
from keras_dylora.live.model import adaptation_of
from keras_dylora.reports.report import RankReport

LAYOUTS = ("shared", "merged")
FORMATS = ("saved_model", "onnx", "litert")
DTYPES = (None, "float32", "float16", "bfloat16")


def export_ranks(
    model: keras.Model,
    directory: str | os.PathLike[str],
    ranks: collections.abc.Sequence[int]
    | collections.abc.Mapping[str, Rank]
    | None = None,
    layout: Literal["shared", "merged"] = "shared",
    input_signature: Any = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    verbose: bool = True,
    preprocessing: bool = False,
    generate_signature: bool = False,
    format: Literal["saved_model", "onnx", "litert"] = "saved_model",
    report: RankReport | None = None,
    adapters: list[str] | tuple[str, ...] | Literal["all"] | None = None,
) -> None:
    """Exports one model for all ranks, or one model per rank, for serving.

    The export works on any backend. Batch size and sequence length stay free.
    To load the result, TensorFlow is enough, without Keras or keras_dylora.
    Each parameter is stored once.

    - `layout="shared"`: one SavedModel that holds the base once and the
      adapters once. The signatures `rank_1`, `rank_2`, … take the model's
      inputs. The signature `serve` also takes the int32 input `rank`, a scalar
      or one rank per example, from 1 to the highest that is exported.
      `serving_default` is the highest rank.
    - `layout="merged"`: one SavedModel per rank in `rank_1/`, `rank_2/`, …,
      with the adapter in the kernels and the signature `serve`.

    With `adapters`, the shared SavedModel holds several adapters of one base,
    each with its head. Every signature then also takes the string input
    `adapter`, one name or one for each example, so a batch may mix adapters and
    ranks. `serving_default` is the highest rank of each adapter.

    If `ranks` is a dict, its keys replace the names `rank_1`, …. The input
    `rank` of a `RankAllocation` is a number above `config.rank`, which the
    manifest gives.

    `README.md` lists the ranks and shows how to call them. `manifest.json` has
    the signatures, the sizes and the SHA-256 of each file. On JAX and torch, a
    child process rebuilds the model under TensorFlow and writes the artifact.

    Args:
        model: an enabled model.
        directory: str or path. It is written under another name, then renamed.
        ranks: list of int in `1..config.rank`, or dict of name to such an int
            or to a `RankAllocation`. Defaults to `None`: every rank that is
            trained, `config.min_rank..config.rank`.
        layout: str. `"shared"` or `"merged"`. Defaults to `"shared"`.
        input_signature: specs (`keras.InputSpec`, `tf.TensorSpec` or
            `keras.KerasTensor`) in the structure of the model's input, to fix
            or free dimensions. Defaults to `None`: the model's own.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`. The dtype in which
            wider float parameters are stored. Computation keeps its dtype.
            Defaults to `None`: no parameter changes.
        verify: bool. Whether to load the artifact in a fresh process and
            compare it with the live model at every rank. The tolerance is 1e-5,
            or more if a number format is shorter than float32. Generated tokens
            are compared if the sampler draws no random numbers and nothing is
            shorter than float32. Defaults to `True`.
        overwrite: bool. Whether an earlier export may be replaced. Defaults to
            `False`.
        verbose: bool. Whether to show progress. Defaults to `True`.
        preprocessing: bool. Whether to add the signature `serve_text`, which
            takes the strings `text` and uses the task's own tokenizer. Loading
            it needs `import tensorflow_text`. It tokenizes as a `tf.data`
            pipeline does; KerasHub's tokenizers for eager strings treat some
            strings differently, such as double spaces. Defaults to `False`.
        generate_signature: bool. Whether to add the decoding loop of a KerasHub
            `CausalLM` with the sampler that it is compiled with. The signatures
            are `generate_rank_1`, … and `generate`; with the merged layout,
            `generate`. The inputs are `token_ids` and `padding_mask`, padded to
            the length to generate to, and the scalar `end_token_id`, which is
            -1 for none. Defaults to `False`.
        format: str. `"saved_model"`, or with the merged layout `"onnx"` or
            `"litert"`. Defaults to `"saved_model"`.
        report: `RankReport`. Its metrics go into the manifest. Defaults to
            `None`.
        adapters: list of names in `model.adapter_names`, or `"all"`. Defaults
            to `None`: only the active adapter, without an input for it.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, if the model isn't enabled,
            if the directory exists, or if TensorFlow can't rebuild the model.
            Nothing is written then.
        RuntimeError: if the artifact differs from the live model.
        OSError: if the directory can't be written.

    Example:

    ```python
    keras_dylora.export_ranks(clf, "serving/", ranks=[1, 4, 8])

    # elsewhere, with TensorFlow alone
    serve = tf.saved_model.load("serving/").signatures["serve"]
    serve(token_ids=ids, padding_mask=mask, rank=tf.constant([1, 8]))
    ```

    Reference: [Valipour et al., 2022](https://arxiv.org/abs/2210.07558)
    """
    adaptation = adaptation_of(model)
    config = adaptation.config
    served = _adapters(adapters, model)
    high = max([x.rank for x in served], default=adaptation.max_rank)
    named = _named(ranks, config.min_rank, high)
    plan = Plan(
        ranks=_served(named, model, high),
        layout=_check_choice("layout", layout, LAYOUTS),
        format=_check_choice("format", format, FORMATS),
        dtype=_check_choice("dtype", dtype, DTYPES),
        inputs=Inputs.of(model, input_signature),
        text=bool(preprocessing),
        generate=bool(generate_signature),
        adapters=served,
    )
    _check_model(model, plan)
    metrics = _check_report(report, named, plan)
    _check_packages(plan, verify)
    _warn_of_cuts(model, plan)
    progress = keras.utils.Progbar(
        plan.steps + bool(verify), verbose=int(bool(verbose)), unit_name="step"
    )
    with files.new_directory(directory, overwrite, manifest.written) as folder:
        _write(model, folder, plan, lambda: progress.add(1))
        verified = None
        if verify:
            verified = verify_artifact(model, folder, plan)
            progress.add(1)
        tuned = [x for x in plan.ranks if _is_tuned(adaptation, x)]
        readme.write(folder, plan, tuned)
        manifest.write(
            folder, config, plan, verified, metrics, adaptation.layers
        )


def _is_tuned(adaptation, served):
    """Whether a rank of the active adapter is a tuned cut."""
    if served.highest > adaptation.max_rank:
        return False
    ranks = served.ranks(adaptation.layers)
    return adaptation.tuned_cut(ranks) is not None


def _warn_of_cuts(model, plan):
    adaptation, active = model._dylora, model.active_adapter
    try:
        for adapter in plan.adapters or (ServedAdapter(active, None),):
            model.set_adapter(adapter.name)
            ranks = [
                x for name, x in plan.choices if name in (adapter.name, None)
            ]
            adaptation.warn_of_cut(*(x.ranks(adaptation.layers) for x in ranks))
    finally:
        model.set_adapter(active)


def _write(model, folder, plan, on_step):
    # To serve several adapters, they are stacked in place, which mustn't happen
    # to the caller's model.
    if keras.backend.backend() == "tensorflow" and not plan.adapters:
        from keras_dylora.export.tensorflow import writers

        for _ in writers.write(model, folder, plan):
            on_step()
    else:
        by_tensorflow.write(model, folder, plan, on_step)


def _named(ranks, low, high):
    """Dict of name to rank."""
    if ranks is None:
        ranks = range(min(low, high), high + 1)
    given = ranks
    if not isinstance(ranks, dict):
        given = ranks_module.as_list(ranks)
        if any(isinstance(b, RankAllocation) for b in given):
            raise TypeError(
                "A `RankAllocation` is exported under a name of yours, such as "
                f'`ranks={{"small": allocation}}`. Received: ranks={ranks!r}'
            )
        given = ranks_module.as_ranks(given, 1, high)
        ranks = {f"rank_{b}": b for b in given}
    for rank in ranks.values():
        if not isinstance(rank, collections.abc.Hashable):
            raise TypeError(
                "A rank is an integer or a `RankAllocation`. Make one of a "
                "dict by `RankAllocation.of(model, ranks)`. "
                f"Received: {rank!r}"
            )
    if not ranks or len(set(ranks.values())) < len(given):
        raise ValueError(
            "`ranks` must name at least one rank, and each once. "
            f"Received: ranks={given!r}"
        )
    for name in ranks:
        if (
            not isinstance(name, str)
            or not name.isidentifier()
            or name.startswith(("serv", "generate"))
        ):
            raise ValueError(
                "The name of a rank becomes that of a signature: it must be an "
                'identifier that doesn\'t begin with "serv" or "generate". '
                f"Received: {name!r}"
            )
    return ranks


def _adapters(adapters, model):
    """The `ServedAdapter`s with the given names."""
    named = adaptation_of(model).named
    if adapters is None:
        return ()
    if adapters == "all":
        adapters = named.names
    if isinstance(adapters, str) or not isinstance(adapters, (list, tuple)):
        raise TypeError(
            '`adapters` must be a list of names, or "all". '
            f"Received: adapters={adapters!r}"
        )
    unknown = [x for x in adapters if x not in named.names]
    if not adapters or unknown or len(set(adapters)) < len(adapters):
        raise ValueError(
            "`adapters` must name at least one adapter of the model, and each "
            f"once. Received: adapters={adapters!r} of {named.names}"
        )
    return tuple(ServedAdapter(x, named.max_rank_of(x)) for x in adapters)


def _served(named, model, high):
    """The ranks of a plan, from a dict of name to rank."""
    layers = adaptation_of(model).layers
    found, free = [], model.dylora_config.rank + 1
    most = {path: min(x.rank, high) for path, x in layers.items()}
    for name, rank in named.items():
        by_layer = ranks_module.by_layer(rank, most, 1)
        if isinstance(rank, RankAllocation):
            found.append(Served(name, free, tuple(by_layer.values())))
            free += 1
        else:
            found.append(Served(name, int(rank), int(rank)))

    def size(served):
        return sizes.parameters(model, served.ranks(layers))

    return tuple(sorted(found, key=size))


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )
    return value


def _check_model(model, plan):
    quantized = [x.path for x in model.dylora_layers if x.quantization_mode]
    if plan.layout == "merged" and quantized:
        raise ValueError(
            "A quantized kernel can't take a float update; export it with "
            "`layout='shared'`, or export what `merge` returns, in float. "
            f"Received: quantized layers {quantized}"
        )
    if plan.format != "saved_model" and plan.layout != "merged":
        raise ValueError(
            f"`format={plan.format!r}` needs `layout='merged'`. "
            f"Received: layout={plan.layout!r}"
        )
    if plan.format != "saved_model" and (
        plan.text or plan.generate or plan.dtype
    ):
        raise ValueError(
            "`preprocessing`, `generate_signature` and `dtype` need "
            f"`format='saved_model'`. Received: format={plan.format!r}"
        )
    if plan.adapters and plan.layout != "shared":
        raise ValueError(
            "`adapters` needs `layout='shared'`. With the merged layout, call "
            "`set_adapter` and export each adapter alone. "
            f"Received: layout={plan.layout!r}"
        )
    if {x.name for x in plan.adapters} - {name for name, _ in plan.choices}:
        raise ValueError(
            "`ranks` must have at least one for every adapter. Received: "
            f"{[x.name for x in plan.ranks]} for adapters "
            f"{ {x.name: x.rank for x in plan.adapters} }"
        )
    added = {"rank"} if plan.layout == "shared" else set()
    added |= {"adapter"} if plan.adapters else set()
    taken = sorted(added & {spec.name for spec in plan.inputs.specs})
    if taken:
        raise ValueError(
            "The shared layout adds an input `rank`, and for several adapters "
            f"an input `adapter`. Received: a model that has inputs {taken}"
        )
    preprocessor = getattr(model, "preprocessor", None)
    if plan.text and getattr(preprocessor, "tokenizer", None) is None:
        raise ValueError(
            "`preprocessing=True` needs a model whose `preprocessor` has a "
            f"`tokenizer`. Received: {model.name} with "
            f"preprocessor={preprocessor!r}"
        )
    names = {spec.name for spec in plan.inputs.specs}
    if plan.generate and (
        getattr(model, "sampler", None) is None
        or names != {"token_ids", "padding_mask"}
    ):
        raise ValueError(
            "`generate_signature=True` needs a KerasHub `CausalLM` that is "
            "compiled with a `sampler` and takes `token_ids` and "
            f"`padding_mask`. Received: {model.name}, a "
            f"{type(model).__name__} of inputs {sorted(names)}"
        )


def _check_packages(plan, verify):
    needed = ["tensorflow"]
    if plan.text:
        needed.append("tensorflow_text")
    if plan.format == "onnx":
        needed += ["onnx", "tf2onnx", *(["onnxruntime"] if verify else [])]
    missing = [x for x in needed if importlib.util.find_spec(x) is None]
    if missing:
        extra = "onnx" if plan.format == "onnx" else "hub,tensorflow"
        raise ImportError(
            f"`export_ranks` needs {needed} here, on every backend. "
            f"Run `pip install 'keras-dylora[{extra}]'`. "
            f"Received: no {missing}"
        )


def _check_report(report, named, plan):
    """The metrics of the exported ranks, in a form for JSON."""
    if report is None:
        return None
    if not isinstance(getattr(report, "metrics", None), dict):
        raise TypeError(
            "`report` must be a `RankReport`. "
            f"Received: report={report!r} (of type {type(report).__name__})"
        )
    return {
        str(x.value): {
            k: float(v) for k, v in report.metrics[named[x.name]].items()
        }
        for x in plan.ranks
        if named[x.name] in report.metrics
    }

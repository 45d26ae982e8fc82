"""The README.md of a PEFT adapter: its base, ranks, metrics, how to load it."""

import json

from keras_dylora.version import __version__

# PEFT's class for a task; it loads both the base and the adapter.
_AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_MAKER = "written by keras_dylora"


def is_ours(content):
    """Whether the content of a file is a `model_card`."""
    return _MAKER.encode() in content


def model_card(config, weights, trained, report):
    """The text of a model card.

    Args:
        config: dict. PEFT's configuration.
        weights: the `AdapterWeights` that are written.
        trained: the `DyLoRAConfig` of the model.
        report: `RankReport`, or `None`.
    """
    base = config["base_model_name_or_path"]
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "tags": ["lora", "dylora", "keras"],
    }
    ranks = set(weights.ranks.values())
    rank = str(max(ranks))
    if len(ranks) > 1:
        rank = f"{min(ranks)} to {rank}, by layer"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# LoRA of rank {rank}",
        "",
        f"An adapter for {f'`{base}`' if base else 'its base model'}, "
        f"{_origin(trained)}, {_MAKER} {__version__}.",
        "",
        *(_table(report, weights) if report is not None else ()),
        "```python",
        *_loading(config, base),
        "```",
        "",
    ]
    return "\n".join(lines)


def _origin(config):
    if config.min_rank == config.rank:
        return f"from a LoRA of rank {config.rank}"
    return (
        "from one training run for every rank "
        f"from {config.min_rank} to {config.rank} "
        "([DyLoRA](https://arxiv.org/abs/2210.07558))"
    )


def _table(report, weights):
    """The metrics at each rank; the rank of this adapter is in bold."""
    names = list(next(iter(report.metrics.values())))
    yield "| rank | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for rank, values in report.metrics.items():
        if hasattr(rank, "label"):
            label, mine = rank.label, dict(rank) == weights.ranks
        else:
            label, mine = str(rank), set(weights.ranks.values()) == {rank}
        label = f"**{label}**" if mine else label
        cells = " | ".join(f"{float(values[name]):.4f}" for name in names)
        yield f"| {label} | {cells} |"
    yield ""


def _loading(config, base):
    if base:
        cls = _AUTO.get(config["task_type"], "AutoPeftModel")
        return ["import peft", "", f'model = peft.{cls}.from_pretrained(".")']
    return [
        "import peft",
        "",
        "# base: the transformers model with the same weights",
        'model = peft.PeftModel.from_pretrained(base, ".")',
    ]

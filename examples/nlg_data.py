"""Text for GPT-2: the three table-to-text tasks of the paper.

As in the GPT-2 recipe of LoRA (Hu et al., 2021), a table is one line of text:

    name : The Vaults | Type : pub | area : riverside        (E2E)
    Mars Hill College : joined : 1973 | …                   (DART, WebNLG)

An example is its tokens, the end token, those of a reference, the end token.
"""

import dataclasses

import numpy as np

from examples.data import tfds_examples

E2E_NAMES = {
    "eatType": "Type",
    "priceRange": "price",
    "familyFriendly": "family friendly",
}


def attributes(table):
    """The line of an E2E table: an attribute and its value in each cell."""
    return " | ".join(
        f"{E2E_NAMES.get(header, header)} : {content}"
        for header, _, content in table
        if content
    )


def triples(table):
    """The line of a table of subjects, predicates and objects."""
    rows = {}
    for _, row, content in table:
        rows.setdefault(row, []).append(content)
    return " | ".join(" : ".join(row) for row in rows.values())


def lower_triples(table):
    """The same, with the predicates in lower case, as the recipe has DART."""
    return triples(
        (header, row, content.lower() if header == "predicate" else content)
        for header, row, content in table
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """A table-to-text task.

    Args:
        dataset: name of its TFDS dataset. `gem/dart` has lost the borders
            inside a triple and `gem/web_nlg_en` is a later WebNLG, so they
            can't stand in for `dart` and `web_nlg`. TFDS has E2E cleaned only
            (Dušek et al., 2019); the paper's is the original.
        line: function of a table to its line of text.
        splits: splits of the dataset by what they are called here.
    """

    dataset: str
    line: object
    splits: dict


SPLITS = {"train": "train", "validation": "validation", "test": "test"}
TASKS = {
    "e2e": Task("e2e_cleaned", attributes, SPLITS),
    "dart": Task("dart", lower_triples, SPLITS),
    "webnlg": Task("web_nlg", triples, {**SPLITS, "test": "test_all"}),
}


def load(task, split):
    """One split of a task.

    Args:
        task: `"e2e"`, `"dart"` or `"webnlg"`.
        split: `"train"`, `"validation"` or `"test"`.

    Returns:
        A list of `(meaning, references)`; every meaning is there once, with
        all its references.
    """
    if task not in TASKS:
        raise ValueError(
            f"`task` must be one of {list(TASKS)}. Received: task={task!r}"
        )
    if split not in SPLITS:
        raise ValueError(
            f"`split` must be one of {list(SPLITS)}. Received: split={split!r}"
        )
    dataset, line = TASKS[task].dataset, TASKS[task].line
    grouped = {}
    for example in tfds_examples(dataset, TASKS[task].splits[split]):
        table = example["input_text"]["table"]
        cells = zip(
            map(_text, table["column_header"]),
            map(int, table["row_number"]),
            map(_text, table["content"]),
            strict=False,
        )
        references = grouped.setdefault(line(list(cells)), [])
        references.append(_text(example["target_text"]))
    return list(grouped.items())


def pairs(task):
    """The training part of a task: one `(meaning, reference)` a reference."""
    return [(m, r) for m, references in load(task, "train") for r in references]


def _text(value):
    return value.decode("utf-8", "replace").strip()


def token_lists(tokenizer, texts):
    """The tokens of every text, as lists of int."""
    tokens = tokenizer(list(texts))
    if hasattr(tokens, "to_list"):  # a ragged tensor
        tokens = tokens.to_list()
    return [list(map(int, row)) for row in tokens]


def encode(tokenizer, pairs, max_length=512):
    """Training arrays of `(prompt, target)` pairs, as long as the longest.

    Returns:
        `(x, y, sample_weight)`; the weight is 1 where `y` is a token of the
        target or its end, 0 in the prompt and the padding.
    """
    end = tokenizer.end_token_id
    prompts = token_lists(tokenizer, (prompt for prompt, _ in pairs))
    targets = token_lists(tokenizer, (f" {target}" for _, target in pairs))
    rows = [
        ([*prompt, end, *target, end][: max_length + 1], len(prompt))
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    length = max(len(tokens) for tokens, _ in rows) - 1
    ids = np.full((len(rows), length + 1), end, dtype="int32")
    weight = np.zeros((len(rows), length), dtype="float32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, (tokens, given) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens) - 1] = 1
        weight[i, given : len(tokens) - 1] = 1.0
    x = {"token_ids": ids[:, :-1], "padding_mask": mask}
    return x, ids[:, 1:], weight


def encode_prompts(tokenizer, prompts, max_new_tokens=64, max_length=512):
    """Arrays of prompts with room for what is generated.

    They are padded with a token that isn't the end token, which would stop
    the generation.
    """
    end = tokenizer.end_token_id
    limit = max_length - max_new_tokens - 1
    rows = [[*t[:limit], end] for t in token_lists(tokenizer, prompts)]
    length = max(map(len, rows)) + max_new_tokens
    padding = 0 if end else 1
    ids = np.full((len(rows), length), padding, dtype="int32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"token_ids": ids, "padding_mask": mask}

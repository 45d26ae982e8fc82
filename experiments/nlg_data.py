"""Text for GPT-2: the three table-to-text tasks of the paper.

As in the GPT-2 recipe of LoRA (Hu et al., 2021), a table is one line of text:

    name : The Vaults | Type : pub | area : riverside        (E2E)
    Mars Hill College : joined : 1973 | …                   (DART, WebNLG)
"""

import dataclasses

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
    """The line of `triples` by the recipe of DART: predicates in lower case."""
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
    """The meanings of a split of a task, with their references.

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

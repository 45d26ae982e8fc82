"""The tasks of the paper's Table 2, and two offline ones of their kind."""

import dataclasses

import numpy as np
import scipy.stats
import sklearn.metrics

from examples import data

TEST_SIZE = 1_000


def accuracy(labels, outputs):
    return sklearn.metrics.accuracy_score(labels, outputs.argmax(-1))


def f1(labels, outputs):
    return sklearn.metrics.f1_score(labels, outputs.argmax(-1))


def matthews(labels, outputs):
    return sklearn.metrics.matthews_corrcoef(labels, outputs.argmax(-1))


def pearson(labels, outputs):
    outputs = outputs[:, 0]
    # A constant has no correlation; SciPy warns and returns NaN.
    return scipy.stats.pearsonr(labels, outputs)[0] if np.ptp(outputs) else 0.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its sentences, metrics, head and splits.

    Args:
        columns: names of its one or two sentences.
        metrics: functions `(labels, outputs) -> float`, the paper's first.
        num_classes: int. Outputs of the head; 1 is a regression.
        evaluation: splits with public labels, by what they are called here.
    """

    columns: tuple
    metrics: tuple = (accuracy,)
    num_classes: int = 2
    evaluation: tuple = ("validation",)

    @property
    def is_regression(self):
        return self.num_classes == 1


TASKS = {
    "mnli": Task(
        ("premise", "hypothesis"),
        num_classes=3,
        evaluation=("validation_matched", "validation_mismatched"),
    ),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), (f1, accuracy)),
    "cola": Task(("sentence",), (matthews, accuracy)),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), (accuracy, f1)),
    "rte": Task(("sentence1", "sentence2")),
    "stsb": Task(("sentence1", "sentence2"), (pearson,), num_classes=1),
    # Offline: SST-2's source, and its mean ratings as STS-B's scores.
    "movies": Task(("sentence",)),
    "ratings": Task(("sentence",), (pearson,), num_classes=1),
}


def get_task(name):
    """The `Task` of a name, or a `ValueError`."""
    if name not in TASKS:
        raise ValueError(
            f"`task` must be one of {list(TASKS)}. Received: task={name!r}"
        )
    return TASKS[name]


def load(name, test_size=TEST_SIZE):
    """Sentences and labels of a task.

    Args:
        name: str. A name of `TASKS`.
        test_size: int. Test sentences of the offline tasks.

    Returns:
        Dict of `"train"` and the task's evaluation splits to
        `(columns, labels)`; `columns` is a tuple of lists of str.
    """
    task = get_task(name)
    if name == "movies":
        train, test = data.movie_reviews(test_size=test_size)
        return {
            "train": ((train[0],), train[1]),
            "validation": ((test[0],), test[1]),
        }
    if name == "ratings":
        return _ratings(test_size)
    return {
        split: data.glue(name, split, task.columns)
        for split in ("train", *task.evaluation)
    }


def _ratings(test_size):
    texts, ratings = data.vader_corpus("movieReviewSnippets")
    order = np.random.default_rng(0).permutation(len(texts))
    texts = np.array(texts, dtype=object)[order]
    ratings = ratings[order].astype("float32")
    return {
        "train": ((list(texts[:-test_size]),), ratings[:-test_size]),
        "validation": ((list(texts[-test_size:]),), ratings[-test_size:]),
    }

"""The paper's GLUE experiments: data, metrics, methods, kept runs, tables."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from examples import data
from examples.training import WarmupLinear
from experiments import glue_roberta as glue
from experiments import methods, tables, tasks
from experiments.flop import Flop
from experiments.runs import Results
from tests import backend
from tests.text import text_classifier

pytestmark = pytest.mark.long

GLUE = [name for name in tasks.TASKS if name not in ("movies", "ratings")]


@pytest.mark.parametrize("name", GLUE)
def test_glue_loads_as_tfds_gives_it(name):
    task = tasks.TASKS[name]
    with tfds.testing.mock_data(num_examples=6):
        splits = tasks.load(name)
    assert list(splits) == ["train", *task.evaluation]
    for columns, labels in splits.values():
        assert len(columns) == len(task.columns)
        assert all(len(column) == len(labels) == 6 for column in columns)
        assert all(isinstance(text, str) for text in columns[0])
        if task.is_regression:
            assert labels.dtype == "float32"
        else:
            assert labels.max() < task.num_classes


def test_missing_data_says_what_to_fetch(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds, "load", offline)
    with pytest.raises(RuntimeError, match="tfds build glue.*no network"):
        tasks.load("sst2")
    with pytest.raises(ValueError, match="`task` must be one of.*'sst3'"):
        tasks.load("sst3")


def test_missing_sentences_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(data.NotFetchedError, match="vaderSentiment.*Received"):
        data.movie_reviews()
    assert not any(tmp_path.iterdir())


def test_quickstart_takes_a_glue_task():
    with tfds.testing.mock_data(num_examples=3):
        (texts, labels), test = data.load("glue/sst2")
    assert len(texts) == len(labels) == len(test[0]) == 3


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # Confusion: 3 true positives, 1 false one, 1 false negative, 1 true.
        (tasks.accuracy, 4 / 6),
        (tasks.f1, 6 / 8),
        (tasks.matthews, (3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2)),
    ],
    ids=["accuracy", "f1", "matthews"],
)
def test_classification_metrics(metric, expected):
    labels = np.array([1, 1, 1, 1, 0, 0])
    predicted = np.array([1, 1, 1, 0, 1, 0])
    outputs = np.eye(2)[predicted] - 0.3
    np.testing.assert_allclose(metric(labels, outputs), expected)


def test_pearson():
    outputs = np.array([[1.0], [2.0], [4.0]])
    found = tasks.pearson(np.array([2.0, 4.0, 3.0]), outputs)
    np.testing.assert_allclose(found, 1 / np.sqrt(28 / 3), rtol=1e-6)
    assert tasks.pearson(np.array([1.0, 2.0]), np.ones((2, 1))) == 0


def test_warmup_then_linear_decay():
    schedule = WarmupLinear(1.0, steps=100, warmup=0.1)
    rates = [float(schedule(step)) for step in (0, 9, 54, 99)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 0.5, 0.0], atol=1e-6)


def test_a_decay_that_begins_anew():
    schedule = WarmupLinear(1.0, 100, warmup=0.1, restart=55, height=1.5)
    schedule = WarmupLinear.from_config(schedule.get_config())
    rates = [float(schedule(step)) for step in (9, 54, 55, 99)]
    expected = [1.0, 0.5, 1.5 * 44 / 45, 0.0]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


class TestResults:
    def test_runs_are_found_by_their_whole_key(self, tmp_path):
        results = Results(tmp_path / "deep" / "runs.jsonl")
        results.add({"task": "movies", "seed": 1}, {"seconds": 2.0})
        again = Results(tmp_path / "deep" / "runs.jsonl")
        assert again.get({"seed": 1, "task": "movies"}) == {"seconds": 2.0}
        assert again.get({"task": "movies"}) is None

    @pytest.mark.parametrize("broken", ['{"key": {"a"', "[1]", "null", "{}"])
    def test_a_broken_line_costs_that_run_alone(self, tmp_path, broken):
        path = tmp_path / "runs.jsonl"
        Results(path).add({"seed": 1}, {"seconds": 1.0})
        with open(path, "a") as file:
            file.write(broken)
        with pytest.warns(UserWarning, match="Line 2 of .*runs.jsonl must be"):
            results = Results(path)
        results.add({"seed": 2}, {"seconds": 2.0})
        with pytest.warns(UserWarning, match="Line 2"):
            again = Results(path)
        assert again.get({"seed": 1}) == {"seconds": 1.0}
        assert again.get({"seed": 2}) == {"seconds": 2.0}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A tiny BERT, where a user names `roberta_base_en`."""
    path = str(tmp_path_factory.mktemp("presets") / "tiny")
    model = text_classifier()
    model.backbone.save_to_preset(path)
    model.preprocessor.save_to_preset(path)
    return path


@pytest.fixture
def tiny(preset, monkeypatch):
    settings = glue.Settings(
        preset=preset,
        sequence_length=8,
        batch_size=4,
        epochs=2,
        learning_rate=1e-2,
        rank=2,
        seeds=(1, 2),
    )
    monkeypatch.setitem(glue.SCALES, "small", settings)
    glue.tokenized.cache_clear()
    with tfds.testing.mock_data(num_examples=12):
        yield settings
    glue.tokenized.cache_clear()


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("mnli", "dylora-frozen"),
        ("stsb", "lora"),
        ("cola", "fine-tune"),
        ("mrpc", "flop"),
        ("rte", "matryoshka"),
        ("cola", "progressive"),
        ("rte", "lora-tuned"),
    ],
)
def test_a_run_is_made_once(task, method, tiny, tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    result = glue.run(results, task, method, 1, tiny, verbose=0)
    ranks = ["full"] if method in ("fine-tune", "flop") else ["1", "2"]
    assert list(result["metrics"]) == list(tasks.TASKS[task].evaluation)
    for by_rank in result["metrics"].values():
        assert list(by_rank) == ranks
        assert np.isfinite([list(m.values()) for m in by_rank.values()]).all()
    assert result["steps"] == 6
    again = Results(tmp_path / "runs.jsonl")
    assert glue.run(again, task, method, 1, tiny, verbose=0) == result
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_what_makes_another_run_is_in_its_key(tiny, tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    for distribution in ("geometric", "uniform"):
        glue.run(
            results, "cola", "matryoshka", 1, tiny,
            distribution=distribution, verbose=0,
        )  # fmt: skip
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    keys = [json.loads(run)["key"] for run in runs]
    assert [key["distribution"] for key in keys] == ["geometric", "uniform"]
    assert {key["backend"] for key in keys} == {backend.NAME}
    # A run of a search is that of a table, which wants it at every rank.
    found = glue.run(results, "cola", "lora", 1, tiny, rank=4, verbose=0)
    assert list(found["metrics"]["validation"]) == ["1", "2", "3", "4"]


def test_lora_at_each_rank_is_a_run_for_each(tiny, tmp_path, monkeypatch):
    results = Results(tmp_path / "runs.jsonl")
    found = glue.run(results, "cola", "lora-each", 1, tiny, verbose=0)
    lora = {
        b: glue.run(results, "cola", "lora", 1, tiny, rank=b, verbose=0)
        for b in (1, 2)
    }
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    for b, run in lora.items():
        assert glue.score(found, b) == glue.score(run, b)
    assert found["seconds"] == sum(run["seconds"] for run in lora.values())
    # Every method at every rank, in a table.
    settings = dataclasses.replace(tiny, seeds=(2,), rank=1)
    monkeypatch.setitem(glue.SCALES, "small", settings)
    monkeypatch.setitem(tables.SMALL, "methods", {"cola": None})
    tables.main(
        ["--table", "methods", "--scale", "small", "--output", str(tmp_path)]
        + ["--rows", "lora-each", "lora-svd", "--rank", "2", "--verbose", "0"]
    )
    text = (tmp_path / "table_methods_small_2.md").read_text()
    assert text.startswith("| cola at rank | 1 | 2 | area | time |")
    assert "| LoRA at each rank | " in text and "| LoRA, ordered | " in text


def test_micro_batches_make_one_update(tiny, tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    settings = dataclasses.replace(tiny, micro_batches=2)
    model = glue.build("cola", "dylora", 2, "uniform", 1, settings, steps=12)
    assert model.optimizer.gradient_accumulation_steps == 2
    result = glue.run(results, "cola", "dylora", 1, settings, verbose=0)
    assert result["steps"] == 12


def test_table_beside_the_papers_figures(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(tables.SMALL, "7", {"cola": "cola"})
    tables.main(
        ["--table", "7", "--scale", "small", "--output", str(tmp_path)]
        + ["--verbose", "0"]
    )
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    methods = [json.loads(line)["key"]["method"] for line in lines]
    assert methods == ["dylora", "dylora", "summed", "summed"]
    text = (tmp_path / "table_7_small.md").read_text()
    assert "646 s" in text and "52.64" in text and " ± " in text
    assert (tmp_path / "table_7_small.png").stat().st_size > 5_000


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("table", ["1", "2", "3", "4", "5", "7", "methods"])
def test_runs_of_a_table_are_those_it_makes(table, scale, monkeypatch):
    made = set()

    def run(
        results, task, method, seed, settings, rank, distribution="uniform",
        verbose=1,
    ):  # fmt: skip
        made.add((task, method, rank or settings.rank, distribution))
        ranks = {str(b): {"accuracy": 0.5} for b in (*range(65), "full")}
        result = {"seconds": 1.0, "trainable": 1, "kept": 0.5}
        return {**result, "metrics": {"validation": ranks}}

    monkeypatch.setattr(glue, "run", run)
    tables.make(table, scale, results=None)
    rank = glue.SCALES[scale].rank
    each = {("lora", b) for b in methods.own_ranks(rank)}
    made |= {
        (task, *run, "uniform")
        for task, method, *_ in made
        for run in each
        if method == "lora-each"
    }
    made = {run for run in made if run[1] != "lora-each"}
    assert made == {
        (task, method, b or rank, distribution)
        for task, method, b, distribution in tables.runs_of(table, scale)
    }


def test_generation_has_no_small_scale(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(
            ["--table", "6", "--scale", "small", "--output", str(tmp_path)]
        )
    assert "nlg_gpt2 --task reviews" in capsys.readouterr().err


def test_a_maximum_rank_is_for_the_methods(capsys):
    with pytest.raises(SystemExit):
        tables.main(["--table", "2", "--rank", "16"])
    assert "Received: --table 2 --rank 16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tables.main(["--table", "2", "--rows", "lora"])
    assert "Received: --table 2 --rows ['lora']" in capsys.readouterr().err


def test_wrong_processes(capsys):
    for table, processes in (("2", "0"), ("6", "2")):
        with pytest.raises(SystemExit):
            tables.main(["--table", table, "--processes", processes])
        error = capsys.readouterr().err
        assert f"Received: --processes {processes}" in error


def test_wrong_arguments(capsys):
    for arguments, error in (
        (["--task", "sst3"], "`task` must be one of"),
        (["--task", "sst2", "--method", "x"], "invalid choice: 'x'"),
        (["--task", "sst2", "--micro-batches", "3"], "Received: 3"),
        (["--task", "sst2", "--micro-batches", "0"], "Received: 0"),
    ):
        with pytest.raises(SystemExit):
            glue.main(arguments)
        assert error in capsys.readouterr().err


class TestFlop:
    def model(self, keep, steps):
        task = text_classifier()
        task.preprocessor = None
        return task, Flop(task, keep, warmup_steps=steps, speed=20.0)

    def inputs(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(5, 15, (16, 12)).astype("int32")
        return {
            "token_ids": ids,
            "segment_ids": np.zeros_like(ids),
            "padding_mask": np.ones_like(ids),
        }

    def test_starts_at_the_model(self):
        task, model = self.model(0.5, 10)
        for kernel in model.factorized:
            # All gates open.
            kernel.gates.logits.assign(
                keras.ops.ones(kernel.gates.logits.shape)
            )
        x = self.inputs()
        np.testing.assert_allclose(
            backend.to_numpy(model(x)), backend.to_numpy(task(x)), atol=1e-5
        )

    def test_reaches_its_target(self):
        _, model = self.model(0.5, 60)
        model.compile(
            keras.optimizers.Adam(5e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        x, y = self.inputs(), np.arange(16) % 2
        before = model.kept_share()
        model.fit(x, y, batch_size=16, epochs=200, verbose=0)
        assert before > 1
        assert abs(float(model.expected_share()) - 0.5) <= 0.05 * 0.5
        # What is kept is a whole number of gates in each matrix.
        for kernel in model.factorized:
            kept = np.count_nonzero(
                backend.to_numpy(kernel.gates(training=False))
            )
            assert abs(kept - float(kernel.gates.expected())) <= 0.5

    def test_target_is_a_share(self):
        with pytest.raises(ValueError, match="`keep`.*Received: keep=1.5"):
            self.model(1.5, 10)


def test_sentence_pairs_are_tokenized_as_pairs(tiny):
    splits = glue.tokenized("rte", tiny.preset, tiny.sequence_length)
    x, labels = splits["train"]
    assert x["token_ids"].shape == (12, 8)
    assert x["segment_ids"].max() == 1
    assert labels.shape == (12,)

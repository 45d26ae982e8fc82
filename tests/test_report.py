"""RankReport: choice, area, table, JSON, plot."""

import json

import numpy as np
import pytest

import keras_dylora as kd

ACCURACY = {1: 0.80, 2: 0.84, 3: 0.85, 4: 0.855}


SIZES = {0: 40, 1: 100, 2: 160, 3: 220, 4: 280}


def report(values=ACCURACY, min_rank=1, name="accuracy", parameters=None):
    metrics = {b: {"loss": 1 - v, name: v} for b, v in values.items()}
    return kd.RankReport(metrics, min_rank, parameters)


@pytest.mark.parametrize(
    ("metric", "tolerance", "mode", "rank"),
    [
        ("accuracy", 0, "auto", 4),
        ("accuracy", 0.005, "auto", 3),
        ("accuracy", 0.015, "max", 2),
        ("accuracy", 1, "auto", 1),
        ("loss", 0.005, "auto", 3),
        ("accuracy", 0, "min", 1),
    ],
)
def test_best(metric, tolerance, mode, rank):
    assert report().best(metric, tolerance, mode) == rank


def test_best_leaves_out_untrained_and_infinite_ranks():
    values = {0: 0.99, 1: 0.98, 2: float("nan"), 3: 0.7, 4: 0.7}
    assert report(values, min_rank=2).best("accuracy") == 3


def test_area_is_the_mean_height():
    assert report({1: 0.0, 3: 1.0}).area("accuracy") == pytest.approx(0.5)
    assert report({0: 9.0, 2: 0.7}).area("accuracy") == pytest.approx(0.7)


def test_table():
    lines = str(report(min_rank=3)).splitlines()
    assert lines[0].split() == ["rank", "accuracy", "loss"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert [("untrained" in line) for line in lines[2:]] == [
        True, True, False, False,
    ]  # fmt: skip


def test_json(tmp_path):
    text = report().to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    saved = json.loads(text)
    assert saved["metrics"]["2"]["accuracy"] == 0.84
    assert saved["min_rank"] == 1


CUT = {"min_rank": 3, "ordered": True}


def test_cuts():
    metrics = {b: {"accuracy": v} for b, v in ACCURACY.items()}
    cut = kd.RankReport(metrics, **CUT)
    assert cut.best("accuracy", tolerance=1) == 1 and not cut.is_trained(2)
    assert [("cut" in line) for line in str(cut).splitlines()[2:]] == [
        True, True, False, False,
    ]  # fmt: skip
    assert cut._repr_html_().count("<td>cut</td>") == 2
    states = ["cut", "cut", "trained", "trained"]
    assert cut.to_dataframe()["state"].tolist() == states
    again = kd.RankReport(**json.loads(cut.to_json()))
    assert [again.state(b) for b in again.ranks] == states
    (axes,) = cut.plot(others={"LoRA": report(min_rank=3)}).axes
    assert axes.get_xlabel() == "rank (hollow: untrained, half: cut)"


def test_only_untrained_ranks():
    untrained = kd.RankReport({2: {"loss": 0.5}}, min_rank=4)
    with pytest.raises(ValueError, match=r"finite 'loss'.*2: \('untrained'"):
        untrained.best()
    untrained.plot()


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("sparse_categorical_crossentropy", 1),
        ("mape", 1),
        ("accuracy", 2),
        ("out_accuracy", 2),
        ("val_loss", 1),
        ("f1_score_0", 2),
        ("false_positives", 1),
    ],
)
def test_the_best_by_the_name_of_the_metric(metric, best):
    assert kd.RankReport({1: {metric: 0.5}, 2: {metric: 0.7}}).best(metric) == (
        best
    )


@pytest.mark.parametrize("metric", ["ppl", "brier_score", "accuracy_loss"])
def test_a_name_that_says_nothing_needs_a_mode(metric):
    unknown = report(name=metric)
    with pytest.raises(ValueError, match=f'`mode="max"`.*metric={metric!r}'):
        unknown.best(metric)
    assert unknown.best(metric, mode="min") == 1
    labels = [x.get_text() for x in unknown.plot().axes[0].get_legend().texts]
    assert labels == ["DyLoRA"]
    told = kd.RankReport(unknown.metrics, directions={metric: "min"})
    assert kd.RankReport(**json.loads(told.to_json())).best(metric) == 1


def test_plot_beside_a_report_of_untrained_ranks():
    figure = report().plot(rank=3, others={"LoRA 8": report(min_rank=8)})
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low > 0 and high < 1


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plot(ending, tmp_path):
    path = tmp_path / f"ranks.{ending}"
    figure = report().plot(path, rank=3, others={"LoRA 4": report(min_rank=4)})
    assert path.stat().st_size > 1000
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["DyLoRA", "LoRA 4", "chosen: rank 3"]
    assert axes.get_ylabel() == "accuracy"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, p: r.best("f1"), "metric='f1'"),
        (lambda r, p: r.best("acuracy"), "did you mean 'accuracy'"),
        (lambda r, p: r.best("accuracy", mode="high"), "mode='high'"),
        (lambda r, p: r.best("accuracy", -1), "tolerance=-1"),
        (lambda r, p: r.best("accuracy", 5), "in the units.*tolerance=5"),
        (lambda r, p: r.best("accuracy", max_parameters=9), "=9.*1: 100"),
        (lambda r, p: r.plot(p / "a.png", rank=7), "rank=7"),
        (lambda r, p: r.plot(p / "a.png", metric="f1"), "metric='f1'"),
        (lambda r, p: r.plot(p / "a.nonsense"), "nonsense"),
    ],
    ids=[
        "metric",
        "misspelt",
        "mode",
        "tolerance",
        "percent",
        "parameters",
        "rank",
        "plot-metric",
        "format",
    ],
)
def test_bad_arguments(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(report(parameters=SIZES), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_json_are_in_order():
    text = report({b: b / 20 for b in range(1, 17)}).to_json()
    again = kd.RankReport(**json.loads(text))
    assert again.ranks == list(range(1, 17))


def test_json_has_no_nan():
    text = report({1: float("nan"), 2: 0.5}).to_json()
    values = json.loads(text, parse_constant=pytest.fail)["metrics"]
    assert values["1"]["accuracy"] is None and values["2"]["accuracy"] == 0.5


def test_plot_keeps_its_own_curve():
    figure = report().plot(others={"DyLoRA": report({1: 0.1, 4: 0.2})})
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels.count("DyLoRA") == 2


def test_the_best_of_few_parameters():
    sized = report(parameters=SIZES)
    assert sized.parameters == {1: 100, 2: 160, 3: 220, 4: 280}
    assert sized.best("accuracy", max_parameters=230) == 3
    assert sized.best("accuracy", 0.02, max_parameters=230) == 2
    assert sized.best("accuracy", 0.02, max_parameters=100) == 1
    again = kd.RankReport(**json.loads(sized.to_json()))
    assert again.parameters == sized.parameters


def test_best_of_unknown_sizes():
    with pytest.raises(ValueError, match="unknown numbers"):
        report().best("accuracy", max_parameters=100)


def test_parameters_in_the_table():
    lines = str(report(parameters=SIZES | {4: 28_000})).splitlines()
    assert lines[0].split()[-1] == "parameters"
    assert lines[-1].split()[-1] == "28,000"


def test_notebook():
    shown = report(name="<b>", min_rank=3, parameters=SIZES)._repr_html_()
    assert shown.startswith("<table><tr><th>rank</th><th>&lt;b&gt;</th>")
    assert "<td>1</td><td>0.8000</td><td>0.2000</td><td>100</td>" in shown
    assert shown.count("<td>untrained</td>") == 2
    assert report().plot()._repr_png_().startswith(b"\x89PNG")


def test_data_frame():
    frame = report(min_rank=2, parameters=SIZES).to_dataframe()
    assert list(frame) == [
        "accuracy", "loss", "parameters", "trained", "state",
    ]  # fmt: skip
    assert frame.index.name == "rank"
    assert (
        frame.loc[3, "accuracy"] == 0.85 and frame.loc[3, "parameters"] == 220
    )
    np.testing.assert_array_equal(frame["trained"], [False, True, True, True])


def test_files_in_a_folder_that_is_not_there(tmp_path):
    report().plot(tmp_path / "plots" / "ranks.png")
    report().to_json(tmp_path / "reports" / "ranks.json")
    assert {x.name for x in tmp_path.rglob("ranks.*")} == {
        "ranks.png", "ranks.json",
    }  # fmt: skip


def test_text_in_a_notebook(monkeypatch):
    report = kd.RankReport({1: {"loss": 0.5}, 2: {"loss": 0.25}})
    text = str(report)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert text and str(report) == text

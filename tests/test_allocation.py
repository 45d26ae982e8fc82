"""RankAllocation: a rank for each layer, wherever a rank is taken."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_dylora as kd
from tests import backend
from tests.models import (
    allocation,
    classification_loss,
    gpt2,
    labels,
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)
from tests.test_export import batch, live, serve

ALLOCATIONS = {
    "mixed": [2, 1, 3, 4],
    "with-zeros": [0, 2, 0, 1],
    "low": [1, 1, 2, 1],
}


def enabled(scaling="constant", **arguments):
    model = randomize(roberta_classifier())
    kd.enable_dylora(model, rank=4, scaling=scaling, verbose=0, **arguments)
    model.compile(loss=classification_loss(), metrics=["accuracy"])
    return randomize_adapters(model)


def predict(model):
    return model.predict(tokens(), verbose=0)


@pytest.fixture(
    params=[
        ("rank", "mixed"),
        pytest.param(("constant", "with-zeros"), marks=pytest.mark.long),
        pytest.param(("sqrt", "low"), marks=pytest.mark.long),
    ],
    ids="-".join,
)
def case(request):
    scaling, name = request.param
    return scaling, ALLOCATIONS[name]


def test_kernels_of_a_merged_model(case):
    scaling, ranks = case
    scales = {"rank": 1.0, "sqrt": 0.5, "constant": 0.0}
    model = enabled(scaling)
    layers = model._dylora.layers
    expected = [
        # NumPy's own product, at the scale of the rank of each.
        backend.to_numpy(x.kernel).reshape(16, 16)
        + 16
        / (max(b, 1) ** scales[scaling] if scales[scaling] else 4)
        * (backend.to_numpy(x.down)[:, :b] @ backend.to_numpy(x.up)[:b])
        for x, b in zip(layers.values(), ranks, strict=True)
    ]
    plain = kd.merge(model, allocation(model, ranks))
    merged = dict(
        zip(
            [w.path for w in plain.weights],
            backend.snapshot(plain.weights),
            strict=True,
        )
    )
    for path, kernel in zip(layers, expected, strict=True):
        (found,) = (v for k, v in merged.items() if f"{path}/kernel" in k)
        np.testing.assert_allclose(
            found.reshape(16, 16), kernel, rtol=1e-5, atol=1e-6
        )


@pytest.mark.once
def test_live_merged_reloaded_and_truncated_agree(case, tmp_path):
    scaling, ranks = case
    model = enabled(scaling)
    chosen = allocation(model, ranks)
    full = predict(model)
    expected = predict(kd.merge(model, chosen))
    assert np.abs(full - expected).max() > 1e-3
    with model.rank_scope(chosen):
        assert model.rank == chosen
        found = {"scope": predict(model)}
    assert model.rank == 4
    kd.save_adapter(model, tmp_path / "adapter", rank=chosen)
    model.set_rank(chosen)
    found["live"] = predict(model)
    model.save(tmp_path / "model.keras")
    found["keras"] = predict(keras.saving.load_model(tmp_path / "model.keras"))
    fresh = kd.load_adapter(
        randomize(roberta_classifier()), tmp_path / "adapter"
    )
    assert fresh.dylora_config.rank == max(ranks)
    assert list(fresh.rank.values()) == ranks
    found["loaded"] = predict(fresh)
    kd.save_adapter(fresh, tmp_path / "again", rank=fresh.rank)
    again = kd.load_adapter(randomize(roberta_classifier()), tmp_path / "again")
    found["loaded again"] = predict(again)
    # What is within the file computes what it did.
    with model.rank_scope(1), fresh.rank_scope(1):
        if min(ranks) > 0:
            np.testing.assert_allclose(
                predict(fresh), predict(model), atol=1e-5
            )
    kd.truncate(model, chosen)
    assert model.dylora_config.rank == max(ranks)
    found["truncated"] = predict(model)
    for way, outputs in found.items():
        np.testing.assert_allclose(
            outputs, expected, atol=1e-5, rtol=0, err_msg=way
        )


@pytest.mark.once
def test_what_is_cut_off_stays_so_in_training():
    model = enabled()
    model.compile(keras.optimizers.AdamW(1e-2), loss=classification_loss())
    kd.truncate(model, allocation(model, [2, 0, 3, 1]))
    before = backend.snapshot([x.down for x in model.dylora_layers])
    model.fit(tokens(), labels(), epochs=2, verbose=0)
    ranks = [2, 0, 3, 1]
    for layer, b, was in zip(model.dylora_layers, ranks, before, strict=True):
        down = backend.to_numpy(layer.down)
        assert layer.rank == 3
        assert not down[:, b:].any()
        assert not backend.to_numpy(layer.up)[b:].any()
        assert not b or np.abs(down - was).max() > 1e-4
    assert list(model.rank.values()) == ranks


def test_a_change_traces_nothing():
    model = enabled()
    chosen = [allocation(model, ranks) for ranks in ALLOCATIONS.values()]
    outputs = [predict(model)]
    with backend.count_compilations(model) as counts:
        for each in chosen:
            model.set_rank(each)
            outputs.append(predict(model))
    if backend.NAME != "torch":  # which compiles nothing
        assert not any(counts.values())
    assert len({x.tobytes() for x in outputs}) == 4


@pytest.mark.once
def test_training_keeps_it_and_draws_ranks():
    model = enabled()
    chosen = allocation(model, [2, 1, 3, 4])
    model.set_rank(chosen)
    logs = model.fit(tokens(), labels(), batch_size=8, verbose=0).history
    assert 1 <= logs["rank"][0] <= 4
    assert model.rank == chosen


@pytest.mark.once
def test_within_a_gradient():
    model = enabled()
    chosen = allocation(model, [2, 0, 3, 1])
    data = {k: ops.convert_to_tensor(v) for k, v in tokens(4).items()}

    def loss():
        with model.rank_scope(chosen):
            return ops.sum(model(data, training=False) ** 2)

    layers = model.dylora_layers
    model._dylora.training = True  # as within a step
    try:
        found = backend.gradients(loss, [layer.up for layer in layers])
    finally:
        model._dylora.training = False
    for gradient, b in zip(found, [2, 0, 3, 1], strict=True):
        assert not gradient[b:].any()
        assert b == 0 or np.abs(gradient[:b]).min() > 0
    assert model.rank == 4


def test_of_a_hand_built_model():
    """The layers of a hand-built model have a gate each."""
    model = randomize_adapters(randomize(mlp()))
    x, y = mlp_data()
    chosen = kd.RankAllocation.of(model, {"first": 3, "second": 1})
    model.set_rank(chosen)
    assert [layer.active_rank for layer in model.dylora_layers] == [3, 1]
    np.testing.assert_allclose(
        model.predict(x, verbose=0),
        kd.merge(model).predict(x, verbose=0),
        atol=1e-5,
    )
    model.compile("adam", "mse")
    report = kd.evaluate_ranks(model, x, y, ranks=[2, chosen], verbose=0)
    assert report.ranks == [2, chosen]  # 80 and 84 parameters, with the head


@pytest.mark.once
def test_report_of_both():
    model = enabled()
    small, large = (allocation(model, r) for r in ([0, 2, 0, 1], [2, 1, 3, 4]))
    data = tokens(), labels()
    report = kd.evaluate_ranks(
        model, *data, ranks=[large, 4, small, 1], verbose=0
    )
    assert report.ranks == [small, 1, large, 4]
    sizes = list(report.parameters.values())
    column = 16 + 16
    assert [n - sizes[0] for n in sizes] == [0, column, 7 * column, 13 * column]
    for b in report.ranks:
        with model.rank_scope(b):
            loss, accuracy = model.evaluate(*data, verbose=0)
        assert report.metrics[b]["loss"] == pytest.approx(loss, abs=1e-5)
        assert report.metrics[b]["accuracy"] == pytest.approx(accuracy)
    everything = report.best("loss", tolerance=100, max_parameters=sizes[0])
    assert everything is small
    model.set_rank(report.best("loss"))
    assert "0 to 2, 18.8%" in str(report)
    assert "0 to 2, 18.8%" in report._repr_html_()
    content = json.loads(report.to_json())
    assert list(content["metrics"]) == ["1", "4"]
    assert [x["ranks"] for x in content["allocations"]] == [
        small.ranks,
        large.ranks,
    ]
    axes = report.plot(rank=small).axes[0]
    assert "parameters" in axes.get_xlabel()
    curves = [line.get_xdata().tolist() for line in axes.lines]
    assert curves[0] == [sizes[1], sizes[3]]
    assert curves[1] == [sizes[0], sizes[2]]
    frame = report.to_dataframe()
    assert frame.index.tolist() == [small.label, 1, large.label, 4]
    assert frame["parameters"].tolist() == sizes
    assert report.area("loss") == pytest.approx(
        (report.metrics[1]["loss"] + report.metrics[4]["loss"]) / 2
    )


def test_report_needs_sizes_of_allocations():
    model = enabled()
    small = allocation(model, [0, 2, 0, 1])
    metrics = {small: {"loss": 1.0}, 2: {"loss": 2.0}}
    with pytest.raises(ValueError, match="`parameters` of each"):
        kd.RankReport(metrics, parameters={small: 5})
    report = kd.RankReport(metrics, min_rank=2, parameters={small: 5, 2: 8})
    assert not report.is_trained(small)
    with pytest.raises(ValueError, match="every report must have"):
        report.plot(others={"LoRA": kd.RankReport({1: {"loss": 3.0}})})


@pytest.mark.long
def test_exports_it_under_a_name(tmp_path):
    model = enabled()
    chosen = {
        name.replace("-", "_"): allocation(model, ranks)
        for name, ranks in ALLOCATIONS.items()
    }
    named = {**chosen, "one": 1, "all": 4}
    shared, merged = tmp_path / "shared", tmp_path / "merged"
    kd.export_ranks(model, shared, ranks=named, verbose=False)
    manifest = json.loads((shared / "manifest.json").read_text())
    values = manifest["names"]
    assert values == {"with_zeros": 6, "one": 1, "low": 7, "mixed": 5, "all": 4}
    assert manifest["allocations"] == {k: v.ranks for k, v in chosen.items()}
    kd.export_ranks(model, merged, ranks=chosen, layout="merged", verbose=False)
    inputs = batch(5, 8)
    expected = {name: live(model, b, inputs) for name, b in named.items()}
    assert len({x.tobytes() for x in expected.values()}) == 5
    calls = {name: (shared, name, inputs) for name in named}
    calls |= {f"merged {x}": (merged / x, "serve", inputs) for x in chosen}
    ranks = np.int32(list(values.values()))
    calls["each"] = shared, "serve", {**inputs, "rank": ranks}
    calls["default"] = shared, "serving_default", inputs
    calls["wrong"] = shared, "serve", {**inputs, "rank": np.int32(8)}
    found, _ = serve(tmp_path / "served", list(calls.values()))
    found = dict(zip(calls, found, strict=True))
    error = str(found.pop("wrong")["error"])
    assert "between 1 and 4 or one of [6, 7, 5]" in error
    rows = [expected[name][i] for i, name in enumerate(values)]
    expected |= {f"merged {x}": expected[x] for x in chosen}
    expected |= {"each": np.stack(rows), "default": expected["all"]}
    for name, outputs in found.items():
        np.testing.assert_allclose(
            outputs["output_0"], expected[name], atol=1e-5, err_msg=name
        )


def test_json_round_trip(tmp_path):
    model = enabled()
    chosen = allocation(model, [2, 1, 0, 4])
    chosen.to_json(tmp_path / "small.json")
    again = kd.RankAllocation.from_json(tmp_path / "small.json")
    assert again == chosen and hash(again) == hash(chosen)
    assert (again.parameters, again.share) == (7 * 32, 7 / 16)
    assert again.parameters == sum(b * 32 for b in chosen.ranks.values())
    (tmp_path / "other.json").write_text('{"ranks": {"a": 1}}')
    with pytest.raises(ValueError, match="to_json` wrote.*matrices"):
        kd.RankAllocation.from_json(tmp_path / "other.json")


@pytest.mark.once
def test_table_and_heat_map(tmp_path):
    model = randomize(gpt2())
    kd.enable_dylora(model, rank=4, target_layers="all-linear", verbose=0)
    chosen = allocation(model, range(4))
    lines = str(chosen).splitlines()
    assert lines[0].split()[-2:] == ["0", "1"]
    (query,) = (x.split() for x in lines if "attention/query" in x)
    (output,) = (x.split() for x in lines if "attention/attention_out" in x)
    assert (query[1:], output[1:]) == (["0", "1"], ["3", "1"])
    size = f"{chosen.parameters:,} parameters"
    assert size in lines[-1]
    shown = chosen._repr_html_()
    assert shown.count("<tr>") == 1 + 6 and size in shown
    assert "attention/query</td><td>0</td><td>1</td>" in shown
    axes = chosen.plot(tmp_path / "ranks.png").axes[0]
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (6, 2)
    assert image[:4, 0].tolist() == [0, 1, 2, 3]


def test_columns_are_the_numbers_of_the_layers():
    ranks = {"body1": 1, "body2": 2, "head": 3, "block_4/dense": 4}
    chosen = kd.RankAllocation(ranks, dict.fromkeys(ranks, (5, 5)), 4)
    names, rows = chosen._rows()
    assert names[1:] == ["0", "1", "2", "4"]
    assert rows == [
        ["body", "", "1", "2", ""],
        ["head", "3", "", "", ""],
        ["block/dense", "", "", "", "4"],
    ]


WRONG = {
    "other-model": (
        lambda m, c: m.set_rank(kd.RankAllocation({"x": 1}, {"x": (1, 1)}, 4)),
        ValueError,
        r"without \['transformer_layer_0.*and with \['x'\]",
    ),
    "too-high": (
        lambda m, c: m.set_rank(dict.fromkeys(c, 5)),
        ValueError,
        "`rank of transformer_layer_0.*between 0 and 4",
    ),
    "no-rank": (
        lambda m, c: kd.save_adapter(m, "nowhere", rank=dict.fromkeys(c, 0)),
        ValueError,
        "At least one layer must have a rank",
    ),
    "evaluated": (
        lambda m, c: kd.evaluate_ranks(
            m,
            tokens(),
            labels(),
            ranks=[kd.RankAllocation({"x": 1}, {"x": (1, 1)}, 4)],
        ),
        ValueError,
        r"with \['x'\]",
    ),
    "not-in-a-list": (
        lambda m, c: kd.evaluate_ranks(m, tokens(), labels(), ranks=c),
        TypeError,
        "must be a list",
    ),
    "exported-without-a-name": (
        lambda m, c: kd.export_ranks(m, "nowhere", ranks=[c]),
        TypeError,
        "under a name of yours",
    ),
    "exported-as-a-dict": (
        lambda m, c: kd.export_ranks(m, "nowhere", ranks={"a": dict(c)}),
        TypeError,
        "an integer or a `RankAllocation`",
    ),
    "exported-as-serve": (
        lambda m, c: kd.export_ranks(m, "nowhere", ranks={"serve": c}),
        ValueError,
        "identifier.*Received: 'serve'",
    ),
    "layout": (
        lambda m, c: kd.to_peft(m, "nowhere", layout="vllm"),
        ValueError,
        "layout='vllm'",
    ),
    "float": (
        lambda m, c: m.set_rank(dict.fromkeys(c, 1.5)),
        TypeError,
        "integer.*1.5",
    ),
    "ranks-of-other-matrices": (
        lambda m, c: kd.RankAllocation({"a": 1}, {"b": (1, 1)}, 4),
        ValueError,
        r"without \['b'\] and with \['a'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.once
def test_wrong_ranks_change_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    do, error, message = WRONG[case]
    model = enabled()
    model.set_rank(2)
    with pytest.raises(error, match=message):
        do(model, allocation(model, [1, 2, 3, 4]))
    assert model.rank == 2
    assert not any(tmp_path.iterdir())

import argparse
import json
import subprocess
import sys

import keras
import pytest

from benchmarks import competitors, generate, growth, kinds, step
from benchmarks.gpu import RIVALS, SERVED

ONCE = ("--processes", "1", "--rounds", "1", "--steps", "1")


def measured(benchmark, folder, *arguments):
    """The rows of a benchmark that ran in a process of its own."""
    backend = keras.backend.backend()
    subprocess.run(
        [sys.executable, "-m", "benchmarks", benchmark, "--backend", backend]
        + ["--size", "tiny", "--output", folder, *arguments],
        check=True,
        timeout=900,
    )
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.long
def test_gpu(tmp_path):
    backend = keras.backend.backend()
    rows = measured("gpu", tmp_path, *ONCE)
    assert {row["model"] for row in rows} == {"tiny", "tiny-gpt2"}
    found = {(row["model"], row["method"]): row for row in rows}
    assert all(row["peak"] > 0 and min(row["seconds"]) > 0 for row in rows)
    for ours, rivals in RIVALS.items():
        for rival in rivals:
            if ("tiny", rival) not in found:
                assert backend != "torch"
                assert "PEFT" in rival or rival.endswith(("traced", "compiled"))
            elif "PEFT" in rival:
                sizes = {found["tiny", n]["parameters"] for n in (ours, rival)}
                assert len(sizes) == 1
    for method, ranks in SERVED.items():
        row = found.get(("tiny-gpt2", method))
        if row is not None:
            assert list(row["generate"]) == [str(rank or 8) for rank in ranks]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak")
def test_large(tmp_path):
    rows = measured("large", tmp_path)
    held = {row["name"]: row["over_base"] for row in rows}
    assert {"enable_dylora", "merge", "export_ranks"} < held.keys()
    assert min(held.values()) >= 1 and max(held.values()) > 1
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak")
def test_growth(tmp_path):
    rows = measured("growth", tmp_path, "--axes", "model", *ONCE)
    torch = keras.backend.backend() == "torch"
    methods = growth.METHODS if torch else (growth.OURS, growth.KERAS)
    assert [(row["at"], row["method"]) for row in rows] == [
        (model, method) for model in ("tiny", "tiny-gpt2") for method in methods
    ]
    assert all(row["bytes"] > 0 and min(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / f"growth-tiny-{keras.backend.backend()}.png").exists()


@pytest.mark.long
def test_kinds(tmp_path):
    found = measured("kinds", tmp_path, *ONCE)
    rows = {row["method"]: row for row in found}
    assert list(rows) == kinds.NAMES
    for kind in kinds.MODELS:
        ours, keras_lora = (
            rows[f"{who}, {kind}"] for who in (kinds.OURS, kinds.KERAS)
        )
        assert ours["parameters"] == keras_lora["parameters"]
        assert min(ours["seconds"]) > 0 and min(ours["memory"]) > 0


@pytest.mark.long
def test_generate(tmp_path):
    rows = measured("generate", tmp_path, *ONCE)
    backend = keras.backend.backend()
    assert [row["method"] for row in rows] == [
        name
        for name, (method, _) in generate.CELLS.items()
        if competitors.run_on(backend, method)
    ]
    assert all(row["rows"] > 0 and min(row["seconds"]) > 0 for row in rows)


def test_axes_of_growth():
    axes = growth.axes("minilm")
    assert axes["rank"][64] == (growth.SIZES["minilm"], 64)
    assert axes["length"][512][0].length == 512
    again, _ = axes["base"]["int4, remat"]
    assert (again.quantized, again.remat) == ("int4", True)
    with pytest.raises(SystemExit, match="Received: colour"):
        growth.main(argparse.Namespace(size="tiny", axes=["rank", "colour"]))


def test_what_does_not_write():
    with pytest.raises(SystemExit, match="Received: --size minilm"):
        generate.main(argparse.Namespace(size="minilm"))


def test_nothing_to_divide_by():
    with pytest.raises(SystemExit, match="Received: --over colour"):
        step.main(argparse.Namespace(backend="jax", over="colour"))

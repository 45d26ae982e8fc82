"""The text that `dylora_summary` prints."""

import os

import numpy as np

import keras_dylora as kd
from tests.models import (
    mlp,
    randomize_adapters,
    roberta_classifier,
    with_tuned_cuts,
)


def test_layers_and_sizes_by_rank(capsys):
    model = kd.enable_dylora(roberta_classifier(), rank=4, verbose=0)
    model.dylora_summary()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "query" in line]
    assert rows == [
        [f"transformer_layer_{i}/self_attention_layer/query"]
        + ["16", "x", "16", "4", "128"]
        for i in range(2)
    ]
    sizes = [line.split() for line in lines[-4:]]
    assert [row[0] for row in sizes] == ["1", "2", "3", "4"]
    trained = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert sizes[-1][1:] == [f"{trained:,}", f"{4 * trained:,}"]


def test_bytes_are_those_of_a_file(tmp_path):
    model = kd.enable_dylora(roberta_classifier(), rank=4, verbose=0)
    shown = []
    model.dylora_summary(print_fn=shown.append)
    size = int(shown[0].splitlines()[-3].split()[2].replace(",", ""))
    kd.save_adapter(model, tmp_path / "adapter", rank=2)
    header = 3000  # names, shapes and offsets
    stored = os.path.getsize(tmp_path / "adapter" / "adapter.safetensors")
    assert size < stored < size + header


def test_a_hand_built_model():
    shown = []
    mlp(rank=3).dylora_summary(print_fn=shown.append)
    assert "first" in shown[0] and "10 x 12" in shown[0]


def test_tuned_ranks_are_named():
    model, shown = with_tuned_cuts(randomize_adapters(mlp()), 2), []
    model.dylora_summary(print_fn=shown.append)
    rows = [line.split() for line in shown[0].splitlines()]
    assert [r[-1] == "tuned" for r in rows if r and r[0] in "1234"] == [
        False, True, False, False,
    ]  # fmt: skip

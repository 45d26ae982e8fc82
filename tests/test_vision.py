"""The experiment on images, small."""

import dataclasses

import pytest

from experiments import vision_digits
from experiments.runs import Results

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", vision_digits.MODELS)
def test_every_method_at_every_rank(name, tmp_path):
    settings = vision_digits.Settings(
        epochs=2, train_size=50, rank=2, pretraining_epochs=1
    )
    results, runs = Results(tmp_path / "runs.jsonl"), {}
    for method in ("lora-each", "progressive", "lora-tuned"):
        arguments = name, method, 10, settings, tmp_path / "weights", 0
        found = vision_digits.run(results, *arguments)
        assert vision_digits.run(results, *arguments) == found
        assert list(found["metrics"]) == ["1", "2"]
        runs[method] = [found, found]
    table = vision_digits.table(runs, "test loss")
    assert table.startswith("| test loss at rank | 1 | 2 |")
    assert "± 0.000" in table
    (images, labels), (others, _) = vision_digits.halves()
    assert len(images) + len(others) == 1797
    assert images.shape[1:] == (16, 16, 3)
    assert set(labels) == set(range(5))
    assert dataclasses.asdict(settings)["rank"] == 2

"""Runs in several processes."""

import os
import time

import pytest

from experiments import parallel
from experiments.runs import Results


def keep(path, number):
    cores = len(os.sched_getaffinity(0))
    Results(path).add({"number": number}, {"cores": cores})


def fail(path, number):
    if number == 1:
        raise ValueError(f"Received: {number}")
    time.sleep(0.1)
    keep(path, number)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="cores are given on Linux"
)
def test_every_run_is_kept_and_has_a_core(tmp_path):
    path = tmp_path / "runs.jsonl"
    parallel.run_all(keep, [(path, n) for n in range(20)], processes=2)
    results = Results(path)
    assert all(results.get({"number": n}) == {"cores": 1} for n in range(20))


def test_an_error_ends_it(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="Received: 1"):
        parallel.run_all(fail, [(path, n) for n in range(1, 200)], processes=2)
    assert len(path.read_text().splitlines()) < 190

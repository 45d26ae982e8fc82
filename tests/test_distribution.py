"""Several devices: the ranks and the weights of one device."""

import json
import sys

import keras
import numpy as np
import pytest

from keras_dylora.distributions import RankDraw
from tests import backend

TOLERANCE = 1e-5  # after ten AdamW steps of 1e-3

RUN = """
from examples import multi_device
multi_device.main()
"""
METHODS = ("dylora-frozen", "progressive")
PARTS = 2


def draw_in_parts(patch=setattr):
    """Gives a whole batch on one device the ranks of its replicas' parts."""
    from examples.multi_device import BATCH

    for_examples = RankDraw.for_examples

    def of_parts(self, position, size):
        part = for_examples(self, position, BATCH // PARTS)
        return keras.ops.concatenate([part] * PARTS)[:size]

    patch(RankDraw, "for_examples", of_parts)


def check(result, method):
    assert result["ranks"] == result["ranks_of_one_device"]
    if method == "dylora-frozen":
        assert len(result["ranks"]) == 10 and len(set(result["ranks"])) > 1
    assert result["difference"] <= TOLERANCE


@pytest.mark.skipif(backend.NAME != "jax", reason="keras.distribution is JAX's")
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_eight_jax_devices(method):
    printed = backend.run_python(
        RUN, "data_parallel", "model_parallel", "--method", method
    )
    results = [json.loads(line) for line in printed.splitlines()]
    assert [result["way"] for result in results] == [
        "data_parallel",
        "model_parallel",
    ]
    for result in results:
        check(result, method)


@pytest.mark.skipif(
    backend.NAME != "tensorflow", reason="tf.distribute is TensorFlow's"
)
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_mirrored_strategy(method):
    printed = backend.run_python(
        "from tests.test_distribution import draw_in_parts\n"
        f"draw_in_parts()\n{RUN}",
        "mirrored",
        "--method",
        method,
    )
    check(json.loads(printed.splitlines()[-1]), method)


@pytest.mark.skipif(backend.NAME != "torch", reason="gloo is torch's")
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_two_torch_processes(method, monkeypatch):
    from examples import multi_device

    ranks, weights = multi_device.ddp(method)
    draw_in_parts(monkeypatch.setattr)
    model = multi_device.classifier(method)
    start = backend.snapshot(model.trainable_variables)
    expected_ranks, expected = multi_device.fit(model)
    assert ranks == expected_ranks
    assert len(set(ranks)) > 1 or method == "progressive"
    assert any((a != b).any() for a, b in zip(start, expected, strict=True))
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_the_backend_that_a_way_needs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # which the example would set
    from examples import multi_device

    way = "mirrored" if backend.NAME != "tensorflow" else "ddp"
    monkeypatch.setattr(sys, "argv", ["multi_device", way])
    with pytest.raises(SystemExit, match=f"KERAS_BACKEND={backend.NAME}"):
        multi_device.main()

"""Several devices: the ranks and the weights of one device."""

import json
import sys

import numpy as np
import pytest

from tests import backend

TOLERANCE = 1e-5  # after ten AdamW steps of 1e-3

RUN = """
import sys
from examples import multi_device
multi_device.main()
"""


def check(result):
    assert result["ranks"] == result["ranks_of_one_device"]
    assert len(result["ranks"]) == 10 and len(set(result["ranks"])) > 1
    assert result["difference"] <= TOLERANCE


@pytest.mark.skipif(backend.NAME != "jax", reason="keras.distribution is JAX's")
def test_eight_jax_devices():
    printed = backend.run_python(
        RUN, "data_parallel", "model_parallel", "--frozen"
    )
    results = [json.loads(line) for line in printed.splitlines()]
    assert [result["way"] for result in results] == [
        "data_parallel",
        "model_parallel",
    ]
    for result in results:
        check(result)


@pytest.mark.skipif(
    backend.NAME != "tensorflow", reason="tf.distribute is TensorFlow's"
)
def test_mirrored_strategy():
    printed = backend.run_python(RUN, "mirrored", "--frozen")
    check(json.loads(printed.splitlines()[-1]))


@pytest.mark.skipif(backend.NAME != "torch", reason="gloo is torch's")
def test_two_torch_processes():
    from examples import multi_device

    ranks, weights = multi_device.ddp(frozen=True)
    model = multi_device.classifier(frozen=True)
    start = backend.snapshot(model.trainable_variables)
    expected_ranks, expected = multi_device.fit(model)
    assert ranks == expected_ranks and len(set(ranks)) > 1
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

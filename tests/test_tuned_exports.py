"""Tuned cuts as they are served, without Keras."""

import numpy as np
import pytest

import keras_dylora as kd
from tests.models import allocation, randomize_adapters, with_tuned_cuts
from tests.test_export import LENGTH, batch, gpt2, live, prompts, roberta, serve
from tests.test_export_adapters import expected

pytestmark = pytest.mark.long


def assert_served(model, ranks, inputs, wanted, mixed, layout, folder):
    """That an artifact computes what the model does, at each rank and mixed.

    Ranks and outputs are dicts by name; `mixed` are the ranks of a batch, of
    which those above the maximum are the allocation.
    """
    path = folder / "artifact"
    kd.export_ranks(model, path, ranks, layout=layout, verbose=False)
    calls = [
        (path, name, inputs)
        if layout == "shared"
        else (path / name, "serve", inputs)
        for name in ranks
    ]
    if layout == "shared":
        served = np.array(mixed, "int32")
        calls.append((path, "serve", {**inputs, "rank": served}))
    outputs, _ = serve(folder / "server", calls)
    for name, found in zip(ranks, outputs, strict=False):
        np.testing.assert_allclose(
            found["output_0"], wanted[name], atol=2e-5, rtol=0
        )
    if layout == "shared":
        names = {rank: name for name, rank in ranks.items()}
        *_, last = ranks
        rows = [wanted[names.get(b, last)][i] for i, b in enumerate(mixed)]
        np.testing.assert_allclose(outputs[-1]["output_0"], rows, atol=2e-5)


def assert_written(model, folder):
    """That an artifact writes what the model does, at mixed ranks."""
    path = folder / "artifact"
    kd.export_ranks(model, path, [1, 3], generate_signature=True, verbose=False)
    inputs = {**prompts(), "end_token_id": np.int32(-1)}
    mixed = {**inputs, "rank": np.array([3, 1, 3], "int32")}
    (found,), _ = serve(folder / "server", [(path, "generate", mixed)])
    rows = []
    for i, b in enumerate([3, 1, 3]):
        with model.rank_scope(b):
            made = model.generate(prompts(), stop_token_ids=None)
        rows.append(made["token_ids"][i])
    np.testing.assert_array_equal(found["token_ids"], rows)


@pytest.mark.parametrize("layout", ["shared", "merged"])
def test_every_rank(layout, tmp_path):
    model = roberta()
    small = allocation(model, [2, 0, 1])
    with_tuned_cuts(model, 1, 3, small)
    ranks = {"one": 1, "two": 2, "three": 3, "all": 4, "small": small}
    inputs = batch(5, LENGTH)
    wanted = {name: live(model, b, inputs) for name, b in ranks.items()}
    mixed = [3, 1, 5, 4, 2]  # the last rank has a number of its own
    assert_served(model, ranks, inputs, wanted, mixed, layout, tmp_path)


def test_several_adapters(tmp_path):
    model = with_tuned_cuts(roberta(), 1, 2)
    model.add_adapter("other")
    randomize_adapters(model, seed=3)
    with_tuned_cuts(model, 2, 3, seed=8)
    path = tmp_path / "artifact"
    kd.export_ranks(model, path, [1, 2, 3, 4], adapters="all", verbose=False)
    inputs = batch(6, LENGTH)
    names = np.array(["default", "other"] * 3)
    ranks = np.array([1, 1, 2, 2, 3, 3], "int32")
    call = {**inputs, "adapter": names, "rank": ranks}
    (found,), _ = serve(tmp_path / "server", [(path, "serve", call)])
    wanted = expected(model, inputs, names, map(int, ranks))
    np.testing.assert_allclose(found["output_0"], wanted, atol=1e-5)


def test_generated_text(tmp_path):
    assert_written(with_tuned_cuts(gpt2(), 1, 3), tmp_path)

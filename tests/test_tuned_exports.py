"""Tuned cuts as they are served, without Keras."""

import numpy as np
import pytest

import keras_dylora as kd
from tests.models import allocation, randomize_adapters, with_tuned_cuts
from tests.test_export import LENGTH, batch, gpt2, live, prompts, roberta, serve
from tests.test_export_adapters import expected

pytestmark = pytest.mark.long


@pytest.mark.parametrize("layout", ["shared", "merged"])
def test_every_rank(layout, tmp_path):
    model = roberta()
    small = allocation(model, [2, 0, 1])
    with_tuned_cuts(model, 1, 3, small)
    ranks = {"one": 1, "two": 2, "three": 3, "all": 4, "small": small}
    path = tmp_path / "artifact"
    kd.export_ranks(model, path, ranks, layout=layout, verbose=False)
    inputs = batch(5, LENGTH)
    calls = [
        (path, name, inputs)
        if layout == "shared"
        else (path / name, "serve", inputs)
        for name in ranks
    ]
    if layout == "shared":
        mixed = np.array([3, 1, 5, 4, 2], "int32")
        calls.append((path, "serve", {**inputs, "rank": mixed}))
    outputs, _ = serve(tmp_path / "server", calls)
    wanted = {rank: live(model, rank, inputs) for rank in ranks.values()}
    for rank, found in zip(ranks.values(), outputs, strict=False):
        np.testing.assert_allclose(
            found["output_0"], wanted[rank], atol=1e-5, rtol=0
        )
    if layout == "shared":
        rows = [wanted[small if b == 5 else int(b)] for b in mixed]
        rows = np.stack([row[i] for i, row in enumerate(rows)])
        np.testing.assert_allclose(outputs[-1]["output_0"], rows, atol=1e-5)


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
    model = with_tuned_cuts(gpt2(), 1, 3)
    path = tmp_path / "artifact"
    kd.export_ranks(model, path, [1, 3], generate_signature=True, verbose=False)
    inputs = {**prompts(), "end_token_id": np.int32(-1)}
    mixed = {**inputs, "rank": np.array([3, 1, 3], "int32")}
    (found,), _ = serve(tmp_path / "server", [(path, "generate", mixed)])
    rows = []
    for i, b in enumerate([3, 1, 3]):
        with model.rank_scope(b):
            made = model.generate(prompts(), stop_token_ids=None)
        rows.append(made["token_ids"][i])
    np.testing.assert_array_equal(found["token_ids"], rows)

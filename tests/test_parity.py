"""The backends against each other: the same ranks, losses and outputs.

Each backend trains in its own process, from the same weights, on the same
data, with the same seed: 20 AdamW steps without dropout.
"""

import numpy as np
import pytest

from tests import backend

CASES = [
    (name, mode)
    for name in ("roberta", "gpt2", "mlp")
    for mode in ("all", "frozen")
]
TRAIN = """
import sys
import keras, numpy as np
import keras_dylora as kd
from tests import models
from tests.test_parity import CASES


def make(name, frozen):
    if name == "mlp":
        return models.mlp(frozen=frozen, seed=11), *models.mlp_data(), "mse"
    build = {"roberta": models.roberta_classifier, "gpt2": models.gpt2}[name]
    model = kd.enable_dylora(build(), rank=4, frozen=frozen, seed=11)
    x, y = models.tokens(), models.labels()
    if name == "gpt2":
        y = np.roll(x["token_ids"], -1, axis=1)
    return model, x, y, models.classification_loss()


for name, mode in CASES:
    model, x, y, loss = make(name, mode == "frozen")
    models.randomize(model, scale=0.1)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    losses, ranks = [], []
    for step in range(20):
        logs = model.train_on_batch(x, y, return_dict=True)
        losses.append(float(logs["loss"]))
        ranks.append(int(logs["rank"]))
    outputs = {}
    for rank in range(5):
        model.set_rank(rank)
        outputs[f"outputs_{rank}"] = model.predict(x, verbose=0)
    chosen = kd.allocate_ranks(model, x, y, [0.25, 0.5], verbose=0)
    outputs["chosen"] = [list(each.values()) for each in chosen]
    path = f"{sys.argv[1]}-{name}-{mode}.npz"
    np.savez(path, losses=losses, ranks=ranks, **outputs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for target in backend.BACKENDS:
        backend.run_python(TRAIN, folder / target, backend=target)
    return folder


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_backends_agree(name, mode, folder):
    first, *others = (
        np.load(folder / f"{target}-{name}-{mode}.npz")
        for target in backend.BACKENDS
    )
    assert len(set(first["ranks"])) == 4
    for other in others:
        np.testing.assert_array_equal(other["ranks"], first["ranks"])
        np.testing.assert_allclose(
            other["losses"], first["losses"], atol=1e-4, rtol=0
        )
        np.testing.assert_array_equal(other["chosen"], first["chosen"])
        for rank in range(5):
            key = f"outputs_{rank}"
            np.testing.assert_allclose(
                other[key], first[key], atol=1e-3, rtol=0
            )

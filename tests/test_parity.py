"""One run, three backends: the same ranks, losses and outputs.

Each backend trains in its own process, from the same weights, on the same
data, with the same seed: 20 AdamW steps without dropout.
"""

import numpy as np
import pytest

from tests import backend

TRAIN = """
import sys
import keras, numpy as np
import keras_dylora as kd
from tests import models

name, frozen, path = sys.argv[1], sys.argv[2] == "frozen", sys.argv[3]
if name == "mlp":
    model = models.mlp(frozen=frozen, seed=11)
    (x, y), loss = models.mlp_data(), "mse"
else:
    make = {"roberta": models.roberta_classifier, "gpt2": models.gpt2}[name]
    model = kd.enable_dylora(make(), rank=4, frozen=frozen, seed=11)
    x, loss = models.tokens(), models.classification_loss()
    y = models.labels() if name == "roberta" else np.roll(
        x["token_ids"], -1, axis=1
    )
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
np.savez(path, losses=losses, ranks=ranks, **outputs)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("parity"), {}

    def run(name, mode):
        for target in backend.BACKENDS:
            if (name, mode, target) not in found:
                path = folder / f"{name}-{mode}-{target}.npz"
                backend.run_python(TRAIN, name, mode, path, backend=target)
                found[name, mode, target] = np.load(path)
        return [found[name, mode, target] for target in backend.BACKENDS]

    return run


@pytest.mark.parametrize("mode", ["all", "frozen"])
@pytest.mark.parametrize("name", ["roberta", "gpt2", "mlp"])
def test_backends_agree(name, mode, runs):
    first, *others = runs(name, mode)
    assert len(set(first["ranks"])) == 4
    for other in others:
        np.testing.assert_array_equal(other["ranks"], first["ranks"])
        np.testing.assert_allclose(
            other["losses"], first["losses"], atol=1e-4, rtol=0
        )
        for rank in range(5):
            key = f"outputs_{rank}"
            np.testing.assert_allclose(
                other[key], first[key], atol=1e-3, rtol=0
            )

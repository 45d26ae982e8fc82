"""Adapted embeddings and convolutions as they are served, without Keras."""

import numpy as np
import pytest

import keras_dylora as kd
from tests.models import randomize_adapters, with_tuned_cuts
from tests.test_conv import images, network
from tests.test_embedding import classifier, language_model
from tests.test_export import batch, serve
from tests.test_tokens import enabled, rows_of, table_of
from tests.test_tuned_exports import assert_served, assert_written

pytestmark = pytest.mark.long


def text_classifier():
    return classifier(), batch(5, 12)


def image_classifier():
    return network(), {"image": images(5)[0]}


MODELS = {"embedding": text_classifier, "convolutions": image_classifier}


def at(model, rank, inputs):
    x = inputs.get("image", inputs)
    with model.rank_scope(rank):
        return model.predict(x, verbose=0)


@pytest.mark.parametrize("layout", ["shared", "merged"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_rank(kind, layout, tmp_path):
    model, inputs = MODELS[kind]()
    with_tuned_cuts(model, 1)
    ranks = {"one": 1, "two": 2, "all": 4}
    wanted = {name: at(model, b, inputs) for name, b in ranks.items()}
    mixed = [2, 1, 4, 4, 1]
    assert_served(model, ranks, inputs, wanted, mixed, layout, tmp_path)


def test_generated_text(tmp_path):
    assert_written(with_tuned_cuts(language_model(), 1), tmp_path)


def test_trained_tokens_of_each_example(tmp_path):
    model, inputs = enabled("roberta"), batch(6, 12)
    inputs["token_ids"][:, 1] = 49  # a trained one
    wanted = {"default": at(model, 2, inputs)}
    model.add_adapter("other")
    randomize_adapters(model, seed=3)
    table_of(model).trained_tokens.assign(-rows_of(model))
    wanted["other"] = at(model, 2, inputs)
    path = tmp_path / "artifact"
    kd.export_ranks(model, path, [2], adapters="all", verbose=False)
    names = np.array(["default", "other"] * 3)
    call = {**inputs, "adapter": names, "rank": np.full(6, 2, "int32")}
    (found,), _ = serve(tmp_path / "server", [(path, "serve", call)])
    rows = [wanted[name][i] for i, name in enumerate(names)]
    np.testing.assert_allclose(found["output_0"], rows, atol=2e-5)

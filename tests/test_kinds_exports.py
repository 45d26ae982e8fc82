"""Adapted embeddings and convolutions as they are served, without Keras."""

import pytest

from tests.models import with_tuned_cuts
from tests.test_conv import images, network
from tests.test_embedding import classifier, language_model
from tests.test_export import batch
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

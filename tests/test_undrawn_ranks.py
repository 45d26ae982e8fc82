"""A training that draws no ranks warns, unless its rank is meant."""

import warnings

import keras
import pytest

import keras_dylora as kd
from tests.models import (
    classification_loss,
    enabled,
    labels,
    mlp_data,
    roberta_classifier,
    tokens,
)


def fit(model):
    model.compile("sgd", classification_loss())
    model.fit(tokens(), labels(), verbose=0)


def around_a_backbone():
    model = roberta_classifier()
    kd.enable_dylora(model.backbone, rank=2, verbose=0)
    return model


def distiller():
    return keras.distillation.Distiller(
        teacher=roberta_classifier(),
        student=enabled(),
        distillation_losses=keras.distillation.LogitsDistillation(),
    )


@pytest.mark.parametrize("make", [around_a_backbone, distiller])
@pytest.mark.once
def test_fit_of_a_model_around_an_enabled_one_warns(make):
    with pytest.warns(UserWarning, match="enable the outer model") as caught:
        fit(make())
    assert len([w for w in caught if "outer model" in str(w.message)]) == 1


def test_fit_of_a_plain_model_with_adapted_layers_warns():
    inputs = keras.Input((10,))
    model = keras.Model(inputs, kd.DyLoRADense(3)(inputs))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="`DyLoRAModel`, draws ranks"):
        model.fit(*mlp_data(), verbose=0)


def at_a_chosen_rank(model):
    with model.rank_scope(2):
        model(tokens(), training=True)


def at_drawn_ranks(model):
    with model.draw_ranks(tokens()):
        model(tokens(), training=True)


def at_no_other_rank(model):
    one = kd.enable_dylora(roberta_classifier(), rank=2, min_rank=2, verbose=0)
    one(tokens(), training=True)


@pytest.mark.parametrize(
    "train", [fit, at_a_chosen_rank, at_drawn_ranks, at_no_other_rank]
)
@pytest.mark.once
def test_no_warning_where_the_rank_is_meant(train):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Only a model that is enabled")
        train(enabled())


def test_a_loop_of_ones_own_without_ranks_warns():
    with pytest.warns(UserWarning, match="`model.draw_ranks` does"):
        enabled()(tokens(), training=True)

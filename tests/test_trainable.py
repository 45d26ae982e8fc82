"""The flag `trainable` of an enabled model."""

import pytest

import keras_dylora as kd
from tests.models import enabled


def test_trainable_again_is_what_was_chosen():
    model = enabled()
    chosen = [v.path for v in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [v.path for v in model.trainable_variables] == chosen


def test_trainable_brings_back_a_head_that_is_frozen_alone():
    model = enabled()
    chosen = [v.path for v in model.trainable_variables]
    model.get_layer("logits").trainable = False
    assert [v.path for v in model.trainable_variables] != chosen
    model.trainable = True  # as it is already
    assert [v.path for v in model.trainable_variables] == chosen


def test_trainable_is_anything_once_disabled():
    model = kd.disable_dylora(enabled())
    model.trainable = False
    model.trainable = True
    assert len(model.trainable_variables) == len(model.weights)


def test_an_adapter_with_the_base_warns(tmp_path):
    model = enabled()
    model.backbone.trainable = False  # TensorFlow skips what is so already
    model.backbone.trainable = True
    with pytest.warns(UserWarning, match="28 weights") as caught:
        kd.save_adapter(model, tmp_path / "adapter")
    assert caught[0].filename == __file__

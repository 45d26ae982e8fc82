"""The scale of a rank, and the fields of a progressive run."""

import numpy as np
import pytest

import keras_dylora as kd
from tests.models import (
    mlp,
    mlp_data,
    randomize,
    randomize_adapters,
    roberta_classifier,
    tokens,
)


def test_truncating_keeps_a_constant_scale():
    model = randomize_adapters(mlp(scaling="constant"))
    x, _ = mlp_data()
    with model.rank_scope(2):
        expected = model.predict(x, verbose=0)
    kd.truncate(model, 2)
    assert model.dylora_config.alpha == 4
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)


def test_a_saved_adapter_keeps_a_constant_scale(tmp_path):
    source = kd.enable_dylora(
        randomize(roberta_classifier()), rank=3, scaling="constant"
    )
    randomize_adapters(source)
    x = tokens()
    with source.rank_scope(2):
        expected = source.predict(x, verbose=0)
    kd.save_adapter(source, tmp_path / "cut", rank=2)
    model = kd.load_adapter(randomize(roberta_classifier()), tmp_path / "cut")
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    other = kd.enable_dylora(roberta_classifier(), rank=2, alpha=16 * 2 / 3)
    with pytest.raises(ValueError, match="scaling='constant' for a model of"):
        kd.load_adapter(other, tmp_path / "cut")


def test_recipe():
    config = kd.DyLoRAConfig.progressive(10, rank=4, draw="step")
    assert config.scaling == "constant"
    assert config.full_rank_steps == 10
    assert config.rank_distribution == kd.Uniform(full=0.25)
    assert config.draw == "step"
    assert kd.DyLoRAConfig.from_config(config.get_config()) == config


def test_an_old_config_scales_by_the_rank():
    config = kd.DyLoRAConfig().get_config()
    for name in ("scaling", "draw", "full_rank_steps"):
        del config[name]
    assert kd.DyLoRAConfig.from_config(config) == kd.DyLoRAConfig()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scaling": "alpha"}, ValueError, "`scaling`.*Received: scaling='al"),
        ({"draw": "batch"}, ValueError, "`draw` must be.*Received: draw='batc"),
        ({"full_rank_steps": -1}, ValueError, "Received: full_rank_steps=-1"),
        ({"full_rank_steps": 1.5}, TypeError, "Received: full_rank_steps=1.5"),
        ({"draw": "example", "frozen": True}, ValueError, "frozen=True"),
        (
            {"draw": "example", "objective": "summed"},
            ValueError,
            "objective='summed'",
        ),
        ({"full_rank_steps": 3, "frozen": True}, ValueError, "frozen=True"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        kd.DyLoRAConfig(**fields)

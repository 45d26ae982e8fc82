"""DyLoRAConfig: what it accepts, what it refuses, its round trip."""

import json

import numpy as np
import pytest

import keras_dylora as kd


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank`.*Received: rank=0"),
        ({"rank": -2}, ValueError, "`rank`.*Received: rank=-2"),
        ({"rank": 2.0}, TypeError, "`rank` must be an integer"),
        ({"rank": True}, TypeError, "`rank` must be an integer"),
        ({"rank": 4, "min_rank": 5}, ValueError, "`min_rank`.*min_rank=5"),
        ({"min_rank": 0}, ValueError, "`min_rank`"),
        ({"alpha": float("nan")}, ValueError, "`alpha`.*Received: alpha=nan"),
        ({"alpha": float("inf")}, ValueError, "`alpha`"),
        ({"alpha": 0}, ValueError, "`alpha`"),
        ({"alpha": "16"}, ValueError, "`alpha`"),
        ({"dropout": 1.0}, ValueError, "`dropout`.*Received: dropout=1.0"),
        ({"dropout": -0.1}, ValueError, "`dropout`"),
        ({"frozen": 1}, TypeError, "`frozen`"),
        ({"rank_distribution": "normal"}, ValueError, "rank_distribution"),
        (
            {"rank": 4, "rank_distribution": kd.Categorical({5: 1})},
            ValueError,
            "between 1 and 4.*\\[5\\]",
        ),
        ({"objective": "summed_up"}, ValueError, "`objective`"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": 0.5}, TypeError, "`seed`"),
    ],
)
def test_bad_values(arguments, error, message):
    with pytest.raises(error, match=message):
        kd.DyLoRAConfig(**arguments)


@pytest.mark.parametrize(
    "distribution",
    ["uniform", "geometric", kd.Categorical({1: 1, 3: 2})],
    ids=["uniform", "geometric", "categorical"],
)
def test_round_trip_through_json(distribution):
    config = kd.DyLoRAConfig(
        rank=4,
        rank_distribution=distribution,
        target_layers=["query", "key"],
        frozen=True,
    )
    saved = json.loads(json.dumps(config.get_config()))
    assert kd.DyLoRAConfig.from_config(saved) == config


def test_a_callable_has_no_config():
    config = kd.DyLoRAConfig(target_layers=lambda path, layer: True)
    with pytest.raises(ValueError, match="callable `target_layers`"):
        config.get_config()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({1: 1, 4: 1}, kd.Categorical({1: 1})), ({4: 1}, "uniform")],
    ids=["some-left", "none-left"],
)
def test_truncated_keeps_the_ranks_that_are_left(weights, expected):
    config = kd.DyLoRAConfig(
        rank=4, min_rank=1, rank_distribution=kd.Categorical(weights)
    )
    assert config.at_maximum(2).rank_distribution == expected


def test_numpy_scalars_become_python_numbers():
    config = kd.DyLoRAConfig(
        rank=np.int64(4), alpha=np.float32(8), seed=np.int32(3)
    )
    assert type(config.rank) is type(config.seed) is int
    assert type(config.alpha) is float
    json.dumps(config.get_config())

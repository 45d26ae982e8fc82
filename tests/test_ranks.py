"""Distributions, the draw and the gate, against NumPy."""

import numpy as np
import pytest
from keras import ops

import keras_dylora as kd
from keras_dylora import distributions, ranks
from tests import backend


def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def oracle(probabilities, min_rank, seed, count):
    """The draw restated with Python integers."""
    first, second = np.random.SeedSequence(seed).generate_state(2)
    limits = np.round(np.cumsum(probabilities)[:-1] * 2**30)
    drawn = []
    for position in range(count):
        x = mix(mix(position ^ int(first)) ^ int(second)) >> 2
        drawn.append(min_rank + int((x >= limits).sum()))
    return drawn


def draw(distribution, min_rank, rank, seed, count):
    sampler = distributions.RankDraw(distribution, min_rank, rank, seed)
    positions = [ops.convert_to_tensor(i) for i in range(count)]
    return [int(sampler(position)) for position in positions]


DISTRIBUTIONS = {
    "uniform": kd.Uniform(),
    "geometric": kd.Geometric(),
    "categorical": kd.Categorical({2: 1, 4: 3, 5: 0}),
}


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draw_is_the_same_everywhere(name, seed):
    distribution = DISTRIBUTIONS[name]
    expected = oracle(distribution.probabilities(1, 6), 1, seed, 100)
    assert draw(distribution, 1, 6, seed, 100) == expected


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draw_follows_the_distribution(name):
    probabilities = DISTRIBUTIONS[name].probabilities(2, 6)
    drawn = oracle(probabilities, 2, 3, 20_000)
    counts = np.bincount(drawn, minlength=7)[2:] / len(drawn)
    np.testing.assert_allclose(counts, probabilities, atol=0.012)


def test_draws_are_not_serially_correlated():
    drawn = np.array(oracle(kd.Uniform().probabilities(1, 8), 1, 0, 20_000))
    pairs = np.histogram2d(drawn[:-1], drawn[1:], bins=8)[0] / len(drawn)
    np.testing.assert_allclose(pairs, 1 / 64, atol=0.004)


def test_geometric_is_truncated_and_renormalised():
    expected = 0.85 ** np.arange(3, 9)
    np.testing.assert_allclose(
        kd.Geometric(0.15).probabilities(3, 8), expected / expected.sum()
    )


@pytest.mark.parametrize("rank", range(9))
def test_gate(rank):
    expected = np.where(np.arange(8) < rank, 16 / max(rank, 1), 0)
    np.testing.assert_allclose(
        backend.to_numpy(ranks.gate(rank, 8, 16.0)), expected, rtol=1e-6
    )


def test_gate_of_each_example():
    rows = backend.to_numpy(ranks.gate(ops.convert_to_tensor([0, 1, 3]), 3, 6))
    np.testing.assert_allclose(rows, [[0, 0, 0], [6, 0, 0], [2, 2, 2]])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_config_round_trip(name):
    distribution = DISTRIBUTIONS[name]
    assert type(distribution).from_config(distribution.get_config()) == (
        distribution
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kd.Geometric(0), ValueError, "`p`.*Received: p=0"),
        (lambda: kd.Geometric(1.5), ValueError, "`p`"),
        (lambda: kd.Categorical({}), TypeError, "dict of rank to weight"),
        (lambda: kd.Categorical({1: -1}), ValueError, "not negative.*-1"),
        (lambda: kd.Categorical({1: float("nan")}), ValueError, "finite"),
        (lambda: kd.Categorical({1: 0, 2: 0}), ValueError, "positive"),
        (lambda: kd.Categorical({1.5: 1}), TypeError, "integer"),
        (lambda: kd.Categorical({0: 1}), ValueError, "between 1"),
    ],
)
def test_bad_distributions(make, error, message):
    with pytest.raises(error, match=message):
        make()

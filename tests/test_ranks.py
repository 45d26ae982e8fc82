"""Distributions, the draw and the gate, against NumPy."""

import numpy as np
import pytest
from keras import ops

import keras_dylora as kd
from keras_dylora import distributions, ranks
from tests import backend
from tests.marks import once


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
    "full": kd.Uniform(full=0.5),
}


@pytest.mark.parametrize("seed", once([0, 1, 2**40], but=[2**40]))
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


def oracle_for_examples(probabilities, min_rank, seed, position, size):
    """Systematic sampling restated with Python integers."""
    first, second = np.random.SeedSequence(seed).generate_state(2)
    limits = np.round(np.cumsum(probabilities)[:-1] * 2**30)
    x = mix(mix(position ^ int(first)) ^ int(second))
    hashes = [mix(mix(x) ^ i) for i in range(size)]
    # As signed numbers, which is what int32 tensors are sorted by.
    signed = [h - 2**32 if h >= 2**31 else h for h in hashes]
    spacing = 2**30 // size
    points = [
        (x >> 2) % spacing + i * spacing for i in np.argsort(signed).tolist()
    ]
    return [min_rank + int((p >= limits).sum()) for p in points]


@pytest.mark.parametrize("size", once([1, 3, 16, 50], but=[16]))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_examples_are_drawn_the_same_everywhere(name, size):
    probabilities = DISTRIBUTIONS[name].probabilities(1, 6)
    sampler = distributions.RankDraw(DISTRIBUTIONS[name], 1, 6, 7)
    for position in range(50):
        drawn = backend.to_numpy(
            sampler.for_examples(ops.convert_to_tensor(position), size)
        )
        expected = oracle_for_examples(probabilities, 1, 7, position, size)
        assert drawn.tolist() == expected
        counts = np.bincount(drawn, minlength=7)[1:]
        assert (np.abs(counts - size * probabilities) < 1).all()


def test_an_example_of_a_batch_gets_every_rank():
    """The places in a batch get ranks without a pattern."""
    probabilities = kd.Uniform().probabilities(1, 4)
    drawn = np.array(
        [oracle_for_examples(probabilities, 1, 0, i, 8) for i in range(4000)]
    )
    for place in range(8):
        counts = np.bincount(drawn[:, place], minlength=5)[1:] / len(drawn)
        np.testing.assert_allclose(counts, 0.25, atol=0.03)


def test_a_share_of_the_draws_at_the_maximum():
    np.testing.assert_allclose(
        kd.Uniform(full=0.5).probabilities(1, 4), [1 / 8, 1 / 8, 1 / 8, 5 / 8]
    )
    np.testing.assert_allclose(kd.Uniform(full=1).probabilities(2, 3), [0, 1])


def test_geometric_is_truncated_and_renormalised():
    expected = 0.85 ** np.arange(3, 9)
    np.testing.assert_allclose(
        kd.Geometric(0.15).probabilities(3, 8), expected / expected.sum()
    )


@pytest.mark.parametrize("rank", range(9))
def test_gate(rank):
    expected = np.where(np.arange(8) < rank, 16 / max(rank, 1), 0)
    scale = ranks.Scale(8, 16.0)
    np.testing.assert_allclose(
        backend.to_numpy(scale.gate(rank)), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("scaling", "scales"),
    [
        ("rank", [6, 3, 2]),
        ("sqrt", [6, 6 / 2**0.5, 6 / 3**0.5]),
        ("constant", [2, 2, 2]),
    ],
)
def test_scaling(scaling, scales):
    scale = ranks.Scale(3, 6.0, scaling)
    for b, expected in enumerate(scales, start=1):
        assert scale.at(b) == pytest.approx(expected)
        np.testing.assert_allclose(
            backend.to_numpy(scale.gate(b)),
            [expected] * b + [0] * (3 - b),
            rtol=1e-6,
        )


def test_gate_of_each_example():
    scale = ranks.Scale(3, 6.0)
    rows = backend.to_numpy(scale.gate(ops.convert_to_tensor([0, 1, 3])))
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
        (lambda: kd.Uniform(1.5), ValueError, "`full`.*Received: full=1.5"),
        (lambda: kd.Uniform("1"), ValueError, "`full`.*Received: full='1'"),
        (lambda: kd.Geometric(1.5), ValueError, "`p`"),
        (lambda: kd.Categorical({}), TypeError, "dict of rank to weight"),
        (lambda: kd.Categorical({1: -1}), ValueError, "not negative.*-1"),
        (lambda: kd.Categorical({1: float("nan")}), ValueError, "finite"),
        (lambda: kd.Categorical({1: 0, 2: 0}), ValueError, "positive"),
        (lambda: kd.Categorical({1.5: 1}), TypeError, "integer"),
        (lambda: kd.Categorical({0: 1}), ValueError, "at least 1"),
    ],
)
def test_bad_distributions(make, error, message):
    with pytest.raises(error, match=message):
        make()

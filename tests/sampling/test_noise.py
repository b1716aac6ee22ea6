"""Counter-based noise: twins, range, lanes, uniformity and independence. Chi-squares at 1e-9 each, fixed seeds."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from outrider.errors import OutriderError
from outrider.noise import LANES, Noise, derive_seed, key_of, open_unit, uniform, uniforms

ALPHA = 1e-9


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_vector_and_scalar_are_twins(parts):
    many = uniforms(key_of(*parts), 7)
    assert many.dtype == torch.float64
    assert many.tolist() == [uniform(*parts, i) for i in range(7)]


def test_exponentials_come_from_their_lane():
    noise = Noise((12, 99), (3, 40))
    e = noise.exponential(1, 2, 50)
    assert e.shape == (50,)
    u = [uniform(99, LANES["gumbel"], 42, i) for i in range(50)]
    assert torch.equal(e, -torch.log(torch.tensor(u, dtype=torch.float64)))


def test_gumbel_lane_is_keyed_by_absolute_position_alone():
    here, later = Noise((5,), (10,)), Noise((5,), (12,))
    assert torch.equal(here.exponential(0, 3, 8), later.exponential(0, 1, 8))
    assert here.uniform(0, 3, "accept") != later.uniform(0, 1, "accept")


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_interval_is_open(bits):
    """Whatever 64 bits the mixer returns: 0 < u < 1, and the exponential is finite and positive."""
    u = open_unit(bits)
    assert 0 < u < 1
    e = -torch.log(torch.tensor(u, dtype=torch.float64))
    assert 0 < float(e) < 37


def test_exponentials_are_finite_and_positive():
    e = Noise((0,), (0,)).exponential(0, 1, 200_000)
    assert bool(((e > 0) & torch.isfinite(e)).all())


def chi_square(counts: np.ndarray) -> bool:
    expected = counts.sum() / counts.size
    return bool(((counts - expected) ** 2 / expected).sum() < chi2.isf(ALPHA, counts.size - 1))


def test_uniforms_are_uniform():
    """256 cells of 10^6 draws, and the lowest 2^-12 of them in 64 cells; the control is a square of a uniform."""
    u = uniforms(key_of(1, 2, 3), 1_000_000).numpy()
    assert chi_square(np.histogram(u, 256, (0, 1))[0])
    assert not chi_square(np.histogram(u**1.02, 256, (0, 1))[0])
    low = np.histogram(uniforms(key_of(4), 4_000_000).numpy(), 64, (0, 2.0**-8))[0]
    assert chi_square(low)


def test_low_bits_are_uniform():
    """The last 8 of the 52 bits: a generator with 24 or 32 random bits fails here."""
    u = uniforms(key_of(9), 300_000).numpy()
    last = np.floor(u * 2.0**52).astype(np.int64) & 255
    assert chi_square(np.bincount(last, minlength=256))


@pytest.mark.parametrize("lane", ["accept", "final", "draft"])
def test_scalar_lanes_are_uniform(lane):
    noise = Noise(tuple(range(30_000)), (17,) * 30_000)
    assert chi_square(np.histogram([noise.uniform(b, 1, lane) for b in range(30_000)], 64, (0, 1))[0])


NEIGHBOURS = {
    "seed": ((0, 0, 1, "accept", 0), (1, 0, 1, "accept", 0)),
    "position": ((0, 0, 1, "accept", 0), (0, 1, 1, "accept", 0)),
    "depth": ((0, 0, 1, "accept", 0), (0, 0, 2, "accept", 0)),
    "sibling": ((0, 0, 1, "accept", 0), (0, 0, 1, "accept", 1)),
    "position and depth": ((0, 0, 2, "accept", 0), (0, 1, 1, "accept", 0)),
    "accept and final": ((0, 0, 1, "accept", 0), (0, 0, 1, "final", 0)),
    "draft and accept": ((0, 0, 1, "draft", 0), (0, 0, 1, "accept", 0)),
    "draft and final": ((0, 0, 1, "draft", 0), (0, 0, 1, "final", 0)),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_keys_are_independent(name):
    """Pairs of coins whose keys differ in one part: 16 x 16 cells of 20,000 pairs."""
    counts = np.zeros((16, 16))
    for base in range(20_000):
        pair = []
        for seed, position, depth, lane, index in NEIGHBOURS[name]:
            pair.append(Noise((3 * base + seed,), (5 + position,)).uniform(0, depth, lane, index))
        counts[int(16 * pair[0]), int(16 * pair[1])] += 1
    assert chi_square(counts)


def test_neighbouring_columns_and_positions_of_the_race_are_independent():
    noise = Noise((7,), (0,))
    here = torch.exp(-noise.exponential(0, 1, 200_001)).numpy()
    there = torch.exp(-noise.exponential(0, 2, 200_001)).numpy()
    for a, b in ((here[:-1], here[1:]), (here, there)):
        assert chi_square(np.histogram2d(a, b, 16, ((0, 1), (0, 1)))[0])


def test_every_part_of_the_key_matters_and_none_is_confused():
    """All keys of a small grid, all lanes: no two numbers are equal."""
    grid = product((0, 1, -1, 2**63), (0, 1, 2), (1, 2, 3), ("accept", "final", "draft"), (0, 1, 2))
    values = [Noise((seed,), (position,)).uniform(0, depth, lane, index) for seed, position, depth, lane, index in grid]
    assert len(set(values)) == len(values) == 4 * 3 * 3 * 3 * 3


def test_any_integer_is_a_seed():
    for seed in (-1, 0, 2**63, 2**64 - 1, 2**200):
        assert 0 < Noise((seed,), (0,)).uniform(0, 1, "accept") < 1
    assert Noise((-1,), (0,)).uniform(0, 1, "draft") == Noise((2**64 - 1,), (0,)).uniform(0, 1, "draft")


def test_take_keeps_each_sequences_noise():
    noise = Noise((4, 5, 6), (1, 2, 3))
    some = noise.take([2, 0])
    assert some == Noise((6, 4), (3, 1))
    assert some.uniform(0, 1, "final") == noise.uniform(2, 1, "final")


def test_unknown_lane_is_an_error():
    with pytest.raises(KeyError):
        Noise((0,), (0,)).uniform(0, 1, "accepted")


def test_derived_seeds():
    assert derive_seed(42, 0) == 42
    seeds = [derive_seed(s, i) for s in (0, 1, 42) for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(OutriderError, match="sample index"):
        derive_seed(1, -1)

"""The earth mover's distance: its closed form on a line, the laws of a distance, and its bounds by total variation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from outrider.theory.batch import total_variation
from outrider.theory.earth_mover import earth_movers_distance as distance

RNG = np.random.default_rng(1)
TOLERANCE = 1e-7
CASES = [tuple(RNG.dirichlet(np.full(7, 0.4), size=3)) for _ in range(12)]
PLANE = RNG.random((7, 2))


@pytest.mark.parametrize(("p", "q", "r"), CASES)
def test_on_a_line_it_is_the_area_between_the_sums(p, q, r) -> None:
    places = np.sort(RNG.random(7))
    area = sum(abs(gap) * (b - a) for gap, (a, b) in zip((p - q).cumsum(), pairwise(places), strict=False))
    assert distance(p, q, places[:, None]) == pytest.approx(area, abs=TOLERANCE)


@pytest.mark.parametrize(("p", "q", "r"), CASES)
def test_it_is_a_distance_and_lies_between_its_bounds(p, q, r) -> None:
    there = distance(p, q, PLANE)
    gaps = np.linalg.norm(PLANE[:, None] - PLANE[None], axis=-1)
    variation = float(total_variation(p, q))
    assert there == pytest.approx(distance(q, p, PLANE), abs=TOLERANCE)
    assert there <= distance(p, r, PLANE) + distance(r, q, PLANE) + TOLERANCE
    assert gaps[gaps > 0].min() * variation - TOLERANCE <= there <= gaps.max() * variation + TOLERANCE


def test_of_equal_distributions_it_is_nothing_and_of_point_masses_their_distance() -> None:
    assert distance(CASES[0][0], CASES[0][0], PLANE) == 0.0
    one, other = np.eye(7)[2], np.eye(7)[5]
    assert distance(one, other, PLANE) == pytest.approx(float(np.linalg.norm(PLANE[2] - PLANE[5])))
    assert distance(one, CASES[0][0], PLANE) == pytest.approx(
        float((np.linalg.norm(PLANE - PLANE[2], axis=-1) * CASES[0][0]).sum()), abs=TOLERANCE
    )


@pytest.mark.parametrize("size", [40, 256])
def test_small_masses_leave_a_programme_with_a_solution(size: int) -> None:
    """Distributions of many codes, most of them next to nothing, that differ by little: as image models have them."""
    rng = np.random.default_rng(size)
    for _ in range(5):
        p = rng.dirichlet(np.full(size, 0.02))
        q = p + 0.01 * (rng.dirichlet(np.full(size, 0.02)) - p)
        places = np.sort(rng.random(size))
        area = float((np.abs((p - q).cumsum())[:-1] * np.diff(places)).sum())
        assert distance(p, q / q.sum(), places[:, None]) == pytest.approx(area, rel=1e-4, abs=1e-8)


def test_what_is_no_distribution_or_has_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="first must sum to one"):
        distance([0.5, 0.2], [0.5, 0.5], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="as many points, got 3"):
        distance([0.5, 0.5], [0.5, 0.5], [[0.0], [1.0], [2.0]])

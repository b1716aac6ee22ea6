"""Instances: what is accepted, what is refused, and that the random one is the one it says it is."""

from __future__ import annotations

import numpy as np
import pytest

from outrider import theory
from outrider.theory import chains
from outrider.theory.chains import Chain

HALF = np.full((2, 2, 2), 0.5)
START = np.array([0.5, 0.5])


def test_the_random_instance_is_the_legacy_stream_with_the_draft_first() -> None:
    chain = chains.best_guess(states=3, horizon=4, seed=10)
    stream = np.random.RandomState(10)
    draft, target = stream.rand(4, 3, 3), stream.rand(4, 3, 3)
    np.testing.assert_array_equal(chain.draft, draft / draft.sum(axis=2, keepdims=True))
    np.testing.assert_array_equal(chain.target, target / target.sum(axis=2, keepdims=True))
    np.testing.assert_array_equal(chain.start, [1 / 3] * 3)
    assert (chain.states, chain.horizon) == (3, 4)


def test_truncation_keeps_the_first_positions_and_is_not_a_new_draw() -> None:
    chain = chains.best_guess(horizon=9)
    short = chain.truncated(4)
    np.testing.assert_array_equal(short.target, chain.target[:4])
    np.testing.assert_array_equal(short.draft, chain.draft[:4])
    assert not np.array_equal(short.draft, chains.best_guess(horizon=4).target)
    assert not np.array_equal(short.target, chains.best_guess(horizon=4).target)


@pytest.mark.parametrize("horizon", [0, -1, 10, 2.5, True])
def test_truncation_refuses_other_horizons(horizon: int) -> None:
    with pytest.raises(ValueError, match="horizon"):
        chains.best_guess(horizon=9).truncated(horizon)


def test_repeated_kernels_share_memory() -> None:
    chain = chains.stationary([1.0, 0.0], HALF[0], [[0.9, 0.1], [0.2, 0.8]], horizon=1_000_000)
    assert chain.target.shape == (1_000_000, 2, 2)
    assert chain.target.strides[0] == 0
    independent = chains.iid([0.25, 0.75], [0.5, 0.5], horizon=3)
    assert (independent.draft == [0.25, 0.75]).all()
    assert (independent.target == 0.5).all()


def test_arrays_are_held_read_only_and_the_callers_stay_writable() -> None:
    draft = HALF.copy()
    chain = Chain(START, draft, HALF)
    with pytest.raises(ValueError, match="read-only"):
        chain.draft[0, 0, 0] = 1.0
    draft[0, 0, 0] = 0.5


def test_chunks_cover_every_position_once() -> None:
    chain = chains.stationary(np.full(300, 1 / 300), np.full((300, 300), 1 / 300), np.full((300, 300), 1 / 300), 10)
    slices = list(chain.chunks())
    assert len(slices) > 1
    assert [n for s in slices for n in range(s.start, s.stop)] == list(range(10))


@pytest.mark.parametrize(
    ("name", "start", "draft", "target"),
    [
        ("start", [0.5, 0.6], HALF, HALF),
        ("start", [1.0], HALF, HALF),
        ("start", [[0.5, 0.5]], HALF, HALF),
        ("draft", START, HALF * 0.9, HALF),
        ("draft", START, HALF[0], HALF),
        ("draft", START, np.full((1, 2, 3), 1 / 3), HALF),
        ("draft", START, HALF[:0], HALF[:0]),
        ("draft", START, HALF[:1], HALF),
        ("target", START, HALF, np.array([[[1.5, -0.5]] * 2] * 2)),
        ("target", START, HALF, np.full((2, 2, 2), np.nan)),
        ("target", START, HALF, HALF.astype(np.float32) * np.float32(1.001)),
    ],
)
def test_bad_arrays_are_refused_by_name(name: str, start: object, draft: object, target: object) -> None:
    with pytest.raises(ValueError, match=name):
        Chain(start, draft, target)  # pyright: ignore[reportArgumentType]


def test_a_fault_at_one_position_is_found_and_located() -> None:
    target = HALF.copy()
    target[1, 0] = [0.5, 0.4]
    with pytest.raises(ValueError, match=r"target must sum to one along its last axis, got 0\.9 at \[1, 0\]"):
        Chain(START, HALF, target)


@pytest.mark.parametrize("wrong", [{"states": 0}, {"horizon": 0}, {"seed": -1}, {"seed": 2**32}, {"states": 2.0}])
def test_the_generator_refuses_wrong_sizes(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        chains.best_guess(**wrong)


def test_repeated_kernels_are_checked() -> None:
    with pytest.raises(ValueError, match="target"):
        chains.iid([0.5, 0.5], [0.5, 0.6], horizon=3)
    with pytest.raises(ValueError, match="draft and target"):
        chains.iid([0.5, 0.5], [1.0], horizon=3)
    with pytest.raises(ValueError, match="horizon"):
        chains.stationary(START, HALF[0], HALF[0], horizon=0)


def test_the_package_names_its_modules_and_loads_them_when_asked() -> None:
    for name in dir(theory):
        assert getattr(theory, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = theory.nothing

"""Predictions chosen by a client cost what their length costs: n-grams are found by bisection, and nothing is read twice."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from outrider.drafters import prediction as module
from outrider.drafters.prediction import MAX_N, Places, Replay, accepted_of
from outrider.errors import RequestError
from outrider.params import SamplingParams
from tests.drafters.drafting import evidence, view


def by_scanning(prediction: list[int], end: list[int], base: int) -> tuple[int, int]:
    """The definition: longest n-gram first, nearest after `base`, else the first."""
    for n in range(min(MAX_N, len(end)), 0, -1):
        places = [p for p in range(n, len(prediction) + 1) if prediction[p - n : p] == end[-n:]]
        if places:
            return next((p for p in places if p >= base), places[0]), n
    return -1, 0


@given(
    prediction=st.lists(st.integers(0, 2), max_size=40),
    end=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    base=st.integers(0, 45),
)
@settings(max_examples=150, deadline=None)
def test_places_are_those_a_scan_finds(prediction: list[int], end: list[int], base: int) -> None:
    assert Places(tuple(prediction)).behind(end[-MAX_N:], base) == by_scanning(prediction, end[-MAX_N:], base)


def test_keys_that_meet_by_chance_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FACTORS", (1, 1, 1, 1))  # now 1 2 and 2 1 have one key
    assert Places((1, 2, 9)).behind([2, 1], 0) == (1, 1)


class Read(tuple):
    """Counts how many of its elements are handed out."""

    seen = 0

    def __getitem__(self, i):
        got = super().__getitem__(i)
        Read.seen += len(got) if isinstance(i, slice) else 1
        return got


@pytest.mark.parametrize("output", [[10, 11] * 500, [10] * 1000, list(range(1000))])
def test_work_does_not_grow_with_the_product_of_the_lengths(output: list[int]) -> None:
    """65,536 equal tokens, and outputs that leave them in every step: a few elements are looked at for each token."""
    steps: list[tuple[tuple[int, ...], int]] = []
    Read.seen = 0
    replay = Replay(Places(Read([10] * 65_536)), steps)
    for token in output:
        steps.append(((token,), 0))
        replay.accepted()
    assert Read.seen <= 2 * (MAX_N + 1) * MAX_N * len(output)
    assert replay.read == len(output)


def test_a_replay_in_pieces_is_a_replay_at_once() -> None:
    prediction = tuple([1, 2, 3, 4, 5] * 30)
    whole = [((7,), 0), ((1, 2), 1), ((3, 4, 5), 3), ((9,), 0), ((2,), 0), ((3, 4), 2), ((8,), 0)]
    growing: list[tuple[tuple[int, ...], int]] = []
    replay = Replay(Places(prediction), growing)
    for step in whole:
        growing.append(step)
        now = replay.accepted()
        assert now == accepted_of(prediction, growing) == replay.accepted()
    assert now > 0


def test_samples_of_a_request_share_what_is_sorted() -> None:
    drafter = module.PredictedOutput(3)
    one = view([7, 1], prediction=(1, 2, 3))
    predicted = one.params.prediction
    assert drafter.places_of(predicted) is not drafter.places_of(predicted), "no sample is under way"
    drafter.draft(evidence([one], 10), [3])
    assert drafter.places_of(predicted) is drafter.places_of(predicted)
    assert drafter.places_of((1, 2, 3, 4)) is not drafter.places_of(predicted)


def test_sizes_are_checked_before_elements() -> None:
    read = iter(range(10**9))
    with pytest.raises(RequestError, match="at most 65536 tokens, got more than 65536"):
        SamplingParams(prediction=read)
    assert next(read) == 65_537
    for bad in ([1, -1], [1, 2**31], [1, True], ["1"], [1.0]):
        with pytest.raises(RequestError, match="each token of prediction"):
            SamplingParams(prediction=bad)

"""Who enters in a round: those whom a count of all pages before each of them lets in, though every sequence is counted once."""

from __future__ import annotations

import pytest

from outrider.engine.room import Room
from outrider.params import SamplingParams
from tests.contract.asked import VOCAB
from tests.engine.test_prefix_cache import engine, model


def test_a_round_that_counts_once_admits_whom_a_count_of_all_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages run out again and again, prompts share beginnings, and several enter at once."""
    honest, said = Room.admission, []

    def compared(self: Room, running: list):
        admits = honest(self, running)

        def both(sequence) -> bool:
            said.append((admits(sequence), honest(self, list(running))(sequence), len(running)))
            return said[-1][0]

        return both

    monkeypatch.setattr(Room, "admission", compared)
    one = engine(model(30), slots=6)
    prompts = [[(3 * i + j * (i % 3)) % VOCAB for j in range(1 + 5 * (i % 7))] for i in range(40)]
    one.generate(prompts, [SamplingParams(max_tokens=3 + i % 9, seed=i) for i in range(40)])
    assert all(fast == plain for fast, plain, _ in said)
    assert {fast for fast, *_ in said} == {True, False}
    assert {0, 1, 2, 3} <= {running for *_, running in said}


def test_the_work_of_a_round_grows_with_those_who_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is counted once: a sum over all before each would be 780 counts for 40."""
    one = engine(model(), slots=40)
    counted, honest = [], one.parts.kv.lacking
    monkeypatch.setattr(one.parts.kv, "lacking", lambda slot, tokens: counted.append(slot) or honest(slot, tokens))
    for i in range(40):
        one.submit([1 + i % 5], SamplingParams(max_tokens=2, seed=i))
    one.scheduler.admit()
    assert len(counted) == 39
    assert len(one.scheduler.running) == 40

"""Drafters without a model: prompt lookup and the user's prediction."""

from __future__ import annotations

import time
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.verify import SpeculativeSampling
from tests.drafters.drafting import chain, evidence, view

V = 50


def propose(drafter: NGram | PredictedOutput, tokens: list[int], budget: int = 8, **how) -> list[int]:
    return chain(drafter.draft(evidence([view(tokens, **how)], V), [budget]))


def lookup(tokens: list[int], sizes: range, depth: int) -> list[int]:
    """The definition, by scanning."""
    for n in reversed(sizes):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                return tokens[end : end + depth]
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 9), max_size=12),
    sizes=st.sampled_from([(1, 1), (1, 3), (2, 4), (4, 4)]),
)
@settings(max_examples=30)
def test_ngram_finds_what_a_scan_finds(text: list[int], cuts: list[int], sizes: tuple[int, int]) -> None:
    """However the tokens arrive, in steps of any size, budgets of 0 among them."""
    drafter = NGram(5, min_n=sizes[0], max_n=sizes[1])
    at = 1
    for i, cut in enumerate([*cuts, len(text)]):
        budget = 0 if i % 3 == 2 else 5 - i % 2
        got = propose(drafter, text[:at], budget)
        assert got == (lookup(text[:at], range(sizes[0], sizes[1] + 1), budget) if budget else [])
        at = min(at + cut, len(text))


def test_ngram_prefers_the_longest_and_the_latest() -> None:
    text = [1, 2, 3, 10, 9, 2, 3, 11, 1, 2, 3, 12, 7, 2, 3]
    assert propose(NGram(2, min_n=1, max_n=4), [*text]) == [12, 7]
    assert propose(NGram(2, min_n=1, max_n=4), [*text, 11, 1, 2, 3]) == [12, 7]
    assert propose(NGram(2, min_n=3, max_n=4), [*text]) == []
    assert propose(NGram(4, min_n=1, max_n=1), [5, 6, 5]) == [6, 5]  # the followers run out


def test_ngram_state_belongs_to_the_slot() -> None:
    drafter = NGram(3)
    assert propose(drafter, [1, 2, 3, 1, 2], slot=1) == [3, 1, 2]
    drafter.release([1])
    assert propose(drafter, [4, 1, 2], slot=1) == []
    assert propose(drafter, [7, 8], slot=1) == []  # another text without a release
    assert propose(drafter, [7, 8, 1, 2], slot=1) == []
    both = drafter.draft(evidence([view([5, 6, 5, 6], 0), view([1, 2], 2), view([3, 4, 9, 3, 4], 3)], V), [1, 3, 3])
    assert both.counts == (1, 0, 3)
    assert both.parent == (-1, -1, 1, 2)
    assert both.tokens == (5, 9, 3, 4)
    assert both.q is None


def test_ngram_reads_a_long_prompt_in_time_proportional_to_its_length() -> None:
    """Processor time of four times the tokens, the best of five: a reading that looks back at every token would take 16 times as
    long."""
    best = []
    for n in (10_000, 40_000):
        text, times = [(i * i) % 977 for i in range(n)], []
        for _ in range(5):
            start = time.process_time()
            propose(NGram(4), text)
            times.append(time.process_time() - start)
        best.append(min(times))
    assert best[1] < 10 * best[0]


def predict(drafter: PredictedOutput, output: list[int], prediction: tuple[int, ...], prompt: int = 2) -> list[int]:
    tokens = [*([0] * prompt), *output]
    return propose(drafter, tokens, 4, prompt=prompt, prediction=prediction)


def test_prediction_is_followed_and_found_again() -> None:
    p = tuple(range(10, 30))
    drafter = PredictedOutput(4)
    assert predict(drafter, [], p) == [10, 11, 12, 13]
    assert predict(drafter, [10, 11], p) == [12, 13, 14, 15]
    assert predict(drafter, [10, 11, 40], p) == []  # a substitution: nowhere
    assert predict(drafter, [10, 11, 40, 13], p) == [14, 15, 16, 17]  # and back
    assert predict(drafter, [10, 11, 40, 13, 14, 41, 42, 43, 15], p) == [16, 17, 18, 19]  # an insertion
    assert predict(drafter, [10, 11, 40, 13, 14, 41, 42, 43, 15, 16, 25, 26], p) == [27, 28, 29]  # a deletion
    assert predict(drafter, [*range(10, 30)], p) == []


def test_prediction_takes_the_longest_match_nearest_after_the_pointer() -> None:
    p = (1, 2, 3, 9, 5, 1, 2, 3, 8, 6, 1, 2, 3, 7)
    drafter = PredictedOutput(1)
    assert predict(drafter, [1, 2, 3, 9, 5], p) == [1]
    assert predict(drafter, [1, 2, 3, 9, 5, 40, 1, 2, 3], p) == [8]
    assert predict(drafter, [1, 2, 3, 9, 5, 40, 1, 2, 3, 8, 6, 41, 1, 2, 3], p) == [7]
    assert predict(drafter, [1, 2, 3, 9, 5, 40, 1, 2, 3, 8, 6, 41, 1, 2, 3, 42, 9, 5], p) == [1]  # only behind: go back


def test_single_chance_matches_do_not_carry_the_pointer_away() -> None:
    """A common token of an insertion matches far ahead; the next real match is found near the last sure place."""
    p = (1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 30, 0, 3, 4, 31, 0, 32)
    drafter = PredictedOutput(2)
    assert predict(drafter, [1, 2], p) == [3, 4]
    assert predict(drafter, [1, 2, 0, 40, 0, 41, 0], p) == [1, 2]
    assert predict(drafter, [1, 2, 0, 40, 0, 41, 0, 42, 3, 4], p) == [5, 6]


def test_prediction_without_one_and_in_another_slot() -> None:
    drafter = PredictedOutput(4)
    assert predict(drafter, [10], ()) == []
    assert predict(drafter, [10], (10, 11)) == [11]
    assert predict(drafter, [10], (10, 12)) == [12]  # another request without a release
    drafter.release([0])
    assert predict(drafter, [], (10, 12)) == [10, 12]
    assert propose(drafter, [0, 10], 0, prediction=(10, 12)) == []
    assert propose(drafter, [0, 10], 4, prediction=(10, 12)) == [12]


@given(output=st.lists(st.integers(0, 4), max_size=30), prediction=st.lists(st.integers(0, 4), min_size=1, max_size=30))
@settings(max_examples=30)
def test_prediction_in_any_steps_is_the_same(output: list[int], prediction: list[int]) -> None:
    """Contract 6: fed token by token or at once, the pointer ends in the same place."""
    p, slow = tuple(prediction), PredictedOutput(4)
    for n in range(len(output) + 1):
        step = predict(slow, output[:n], p)
    assert step == predict(PredictedOutput(4), output, p)
    assert not step or any(p[i : i + len(step)] == tuple(step) for i in range(len(p)))


def test_a_true_prediction_is_accepted_whole() -> None:
    """Through the engine: a prediction that comes true costs one step per `length + 1` tokens, a wrong one costs no token."""
    model = TinyLM(V, seed=1, sharp=4.0)
    build = lambda: Engine(model, PredictedOutput(4), SpeculativeSampling(), Fixed(4), slots=1, max_length=64)  # noqa: E731
    plain = build().generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=21))[0].outputs[0].token_ids
    params = SamplingParams(temperature=0.0, max_tokens=21, prediction=plain)
    engine = build()
    assert engine.generate([[1, 2, 3]], params)[0].outputs[0].token_ids == plain
    assert (engine.counts.rejected, engine.counts.steps) == (0, 5)
    wrong = replace(params, prediction=tuple(t ^ 1 for t in plain))
    assert build().generate([[1, 2, 3]], wrong)[0].outputs[0].token_ids == plain


def test_none_fixed_and_options() -> None:
    nothing = NoDraft()
    nothing.bind(2, 8)
    assert nothing.draft(evidence([view([1]), view([2], 1)], V), [4, 4]).counts == (0, 0)
    nothing.release([0])
    assert Fixed(3).budget([view([1])] * 2) == [3, 3]
    for bad in (lambda: NGram(0), lambda: NGram(2, min_n=3, max_n=2), lambda: PredictedOutput(0), lambda: Fixed(-1)):
        with pytest.raises(ConfigError):
            bad()

"""Planning by context: constants from timed passes of a target whose clock is known, and what is chosen from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from outrider.cli.options import parse_acceptance
from outrider.cli.plan_contexts import drafts_of, parse_contexts, print_contexts
from outrider.errors import ConfigError
from outrider.evaluate.planning.contexts import Candidate, choose, fit_contexts
from outrider.models.toy import TinyLM
from outrider.theory.context_times import ContextTimes
from outrider.types import Scores

TIMES = ContextTimes(2e-3, 1e-5, 1e-6, 8e-8)

LENGTHS = [0, *range(1, 17)]


class Clocked(TinyLM):
    """A target whose forwards take what TIMES says, on a clock of its own, and compute nothing."""

    now = 0.0

    def forward(self, rows, kv, *, layers=()) -> Scores:
        kv.reserve(rows)
        segment = rows.segments[0]
        self.now += TIMES.seconds(len(rows.segments), segment.count, segment.cached)
        return Scores(torch.zeros(len(rows.scored), self.vocab_size), ())


def test_the_constants_of_a_machine_are_found_from_its_passes() -> None:
    target = Clocked(7, max_length=4096)
    found = fit_contexts(target, 2048, 4, rounds=2, clock=lambda: target.now)
    for shape in ((1, 1, 100), (2, 4, 1000), (8, 6, 2048)):
        assert found.seconds(*shape) == pytest.approx(TIMES.seconds(*shape), rel=1e-4)


def test_contexts_beyond_the_target_s_are_refused() -> None:
    with pytest.raises(ConfigError, match="the target reads 64"):
        fit_contexts(Clocked(7, max_length=64), 64, 1)


def test_a_view_is_chosen_from_its_crossing_on() -> None:
    at = TIMES.crossing(1, 512, 0.8)
    assert at is not None
    view = Candidate("view", 0.8, 512)
    found = choose(TIMES, [at // 2, at, 4 * at], [1], [view], LENGTHS)
    assert [c.length > 0 for c in found] == [False, True, True] and found[2].gain > found[1].gain > found[0].gain == 1.0
    assert [c.draft for c in found] == ["", "view", "view"]


def test_a_draft_model_is_chosen_until_its_own_cache_or_its_end_makes_it_slower() -> None:
    """A small model whose tokens cost a third of the target's: better at short context, and nothing beyond its own."""
    small = ContextTimes(2e-4, 1e-6, 3e-7, 2e-8)
    at = TIMES.overtakes(1, 512, 0.8, small, 1 << 20)
    assert at is not None and at > 512
    models = [Candidate("view", 0.8, 512), Candidate("model", 0.8, math.inf, small, 1 << 20)]
    found = choose(TIMES, [600, at - 1, at, 4 * at], [1], models, LENGTHS)
    assert [c.draft for c in found] == ["model", "model", "view", "view"]
    ended = [models[0], replace(models[1], end=2000)]
    assert [c.draft for c in choose(TIMES, [1999, 2000], [4], ended, LENGTHS)] == ["model", "view"]
    assert TIMES.overtakes(4, 512, 0.8, small, 2000) == 2000
    likely = [models[0], replace(models[1], acceptance=0.3)]
    assert [c.draft for c in choose(TIMES, [8192], [1], likely, LENGTHS)] == ["view"]
    assert TIMES.overtakes(1, 512, 0.8, ContextTimes(1e-5, 0, 0, 0), 1 << 25) is None, (
        "nothing overtakes a free drafter"
    )


def test_acceptances_of_drafts() -> None:
    assert parse_acceptance("0.8", 2) == [0.8, 0.8] and parse_acceptance("0.9,0.6", 2) == [0.9, 0.6]
    for text in ("x", "2", "0.1,0.2,0.3", "", "nan"):
        with pytest.raises(ConfigError, match="--acceptance takes"):
            parse_acceptance(text, 2)


def test_what_cannot_be_planned_is_said() -> None:
    assert parse_contexts("8192, 2048,2048") == [2048, 8192] and drafts_of(["auto"]) == ["sparse:window:16+496"]
    for drafts in (["sparse:pillar:512"], ["sparse:window:16+496", "some/model"], ["sparse:int8"]):
        assert drafts_of(drafts) == drafts
    for text in ("", "2k", "0", "1,,2", "99999999", "-3"):
        with pytest.raises(ConfigError, match="contexts are numbers"):
            parse_contexts(text)
    views, trees = ["greedy:sparse:window:16+496"], ["tree:2x2:some/model"]
    for drafts in (["ngram"], ["sparse:window:16+496", "medusa"], ["ngram+sparse:window:16+496"], views, trees):
        with pytest.raises(ConfigError, match="views of the target's own cache and draft models"):
            drafts_of(drafts)


def test_the_plan_is_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"context": 960, "batch": 4, "plain_seconds": 0.02768, "length": 3, "gain": 1.25, "draft": "view"}
    crossing = [{"draft": "view", "batch": b, "context": at} for b, at in ((1, None), (4, 948))]
    print_contexts({"drafts": [{"draft": "view", "acceptance": 0.9}], "choices": [row], "crossing": crossing})
    said = capsys.readouterr().out
    assert said.isascii() and said.splitlines()[2].split() == ["960", "4", "27.68", "ms", "view", "3", "1.25"]
    assert (
        "view, 1 at a time: faster than plain decoding at no context" in said
        and "from 948 tokens of context on" in said
    )

"""Planning by context: constants from timed passes of a target whose clock is known, and what is chosen from them."""

from __future__ import annotations

import pytest
import torch

from outrider.cli.plan_contexts import parse_contexts, print_contexts, view_of
from outrider.errors import ConfigError
from outrider.evaluate.planning.contexts import choose, fit_contexts
from outrider.models.toy import TinyLM
from outrider.theory.context_times import ContextTimes
from outrider.types import Scores

TIMES = ContextTimes(2e-3, 1e-5, 1e-6, 8e-8)


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
    found = choose(TIMES, [at // 2, at, 4 * at], [1], 512, 0.8, [0, *range(1, 17)])
    assert [c.length > 0 for c in found] == [False, True, True] and found[2].gain > found[1].gain > found[0].gain == 1.0


def test_what_cannot_be_planned_is_said() -> None:
    assert parse_contexts("8192, 2048,2048") == [2048, 8192] and view_of(["auto"]) == "window:16+496"
    assert view_of(["sparse:pillar:512"]) == "pillar:512"
    for text in ("", "2k", "0", "1,,2", "99999999", "-3"):
        with pytest.raises(ConfigError, match="contexts are numbers"):
            parse_contexts(text)
    for drafts in (["ngram"], ["sparse:window:16+496", "sparse:snap:512"]):
        with pytest.raises(ConfigError, match="one view"):
            view_of(drafts)


def test_the_plan_is_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"context": 960, "batch": 4, "plain_seconds": 0.02768, "length": 3, "gain": 1.25}
    print_contexts({"draft": "sparse:window:16+496", "acceptance": 0.9, "choices": [row], "crossing": {"1": None, "4": 948}})
    said = capsys.readouterr().out
    assert said.isascii() and said.splitlines()[2].split() == ["960", "4", "27.68", "ms", "3", "1.25"]
    assert "1 at a time: faster than plain decoding at no context" in said and "from 948 tokens of context on" in said

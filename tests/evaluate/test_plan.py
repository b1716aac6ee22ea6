"""Plans predict what they are checked against, rank by it, and notice when they are wrong; on a clock made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from outrider.drafters.registry import parse_speculative_config
from outrider.errors import ConfigError
from outrider.evaluate.planning import plan as pl
from outrider.evaluate.planning import plan_check as pc
from outrider.evaluate.records import Record
from outrider.records import PHASES, Counts
from outrider.theory.forecast import Estimate

COST = {0: 1.0, 2: 1.3, 4: 1.8}
"""Seconds per step by length."""
RATE = {0: 1.0, 2: 2.0, 4: 2.4}
"""Tokens per step by length."""


def run(n: int, group: int, rng: np.random.Generator, drift: float) -> Record:
    """One run of 60 steps: its tokens and seconds vary by a tenth."""
    steps = 60
    accepted = 0 if n == 0 else round(steps * (RATE[n] * rng.normal(1, 0.05) - 1))
    seconds = steps * COST[n] * drift * rng.normal(1, 0.05)
    counts = Counts(steps, steps * n, 0, accepted, 0, steps + accepted)
    return Record("x", group, 0, 0, steps + accepted, seconds, dict.fromkeys(PHASES, seconds / 4), counts, 0)


def timings(seed: int, drift: float = 1.0) -> dict[pl.Key, pl.StepTiming]:
    """Runs for the plan, and for the check on a machine that has become slower by `drift`."""
    rng = np.random.default_rng(seed)
    out = {}
    for n in COST:
        key = ("none" if n == 0 else "d", n, 1)
        out[key] = pl.StepTiming(1, [run(n, g, rng, 1.0) for g in range(8)], [run(n, g, rng, drift) for g in range(16)])
    return out


CALLS = {"d": {n: Estimate(r, r * 0.98, r * 1.02) for n, r in RATE.items()}}


def test_the_plan_finds_the_best_and_its_interval_holds_the_truth() -> None:
    held = 0
    for seed in range(40):
        choices = pl.rank(timings(seed), CALLS)
        assert choices[0].name == "d, length 2, batch 1"
        assert [c.tokens_per_second for c in choices] == sorted((c.tokens_per_second for c in choices), reverse=True)
        held += sum(c.low <= RATE[c.length] / COST[c.length] <= c.high for c in choices)
    assert held >= 0.9 * 120


def test_a_check_passes_a_right_plan_and_fails_a_wrong_one() -> None:
    found = timings(1)
    choices = pl.rank(found, CALLS)
    rows = pc.check(choices, found)
    assert [pc.outcome(r, 0.1) for r in rows] == ["within"] * 3
    assert pc.first_choices(choices, found)[0].verdict in ("the measured best", "tied with it")
    wrong = pl.rank(found, {"d": {0: CALLS["d"][0], 2: CALLS["d"][2], 4: Estimate(3.2, 3.1, 3.3)}})
    outcomes = {r.name: pc.outcome(r, 0.1) for r in pc.check(wrong, found)}
    assert outcomes["d, length 4, batch 1"] == "off" and outcomes["d, length 2, batch 1"] == "within"
    assert wrong[0].length == 4 and pc.first_choices(wrong, found)[0].verdict == "slower"
    drifted = timings(1, drift=1.3)
    assert "within" not in {pc.outcome(r, 0.1) for r in pc.check(pl.rank(drifted, CALLS), drifted)}


def test_a_drafter_without_a_distribution_is_planned_from_its_own_counts() -> None:
    choices = pl.rank(timings(3), {})
    assert {c.length: c.tokens_per_call for c in choices} == pytest.approx(RATE, rel=0.05)
    assert all(c.low < c.tokens_per_second < c.high for c in choices)


def test_too_few_prompts_to_check() -> None:
    found = timings(1)
    for t in found.values():
        del t.checked[1:]
    with pytest.raises(ConfigError, match="at least 2 prompts"):
        pc.check(pl.rank(found, CALLS), found)


def test_work_is_spread_and_every_prompt_is_checked_once() -> None:
    for batch, prompts, rounds in ((1, 12, 4), (4, 12, 4), (5, 12, 3)):
        turns = pl.turns_of(batch, prompts, rounds, True)
        assert all(0 <= t < 1 for t, _ in turns)
        starts = [round(t * prompts) // batch * batch for t, kind in turns if kind == "checked"]
        assert starts == list(range(0, prompts, batch))
        assert [round(t * rounds) for t, kind in turns if kind == "planned"] == list(range(rounds))
    assert pl.configurations(["a", "b"], [0, 2], [1, 4]) == [
        ("none", 0, 1), ("a", 2, 1), ("b", 2, 1), ("none", 0, 4), ("a", 2, 4), ("b", 2, 4)
    ]  # fmt: skip


def test_the_advice_is_what_the_engine_takes() -> None:
    choices = pl.rank(timings(1), CALLS)
    said = pl.advice(choices, 1, {"d": "some/model"})
    assert said["options"] == ["--draft", "d", "--length", "2"]
    assert parse_speculative_config(said["vllm"]) == {"draft": "some/model", "length": 2}
    for name in ("eagle:/some/folder", "dflash:/some/folder", "ngram:2-4", "greedy:eagle:/some/folder"):
        made = pl.vllm(replace(choices[0], draft=name), {})
        assert parse_speculative_config(made or "")["draft"] == name
    assert pl.vllm(replace(choices[0], draft="medusa:/some/folder"), {}) is None  # gone from vLLM 0.33
    assert pl.vllm(replace(choices[0], draft="tree:2x2:some/model"), {}) is None
    assert pl.advice(choices, 1, {}, "block")["options"][-2:] == ["--rule", "block"]

"""The detectors keep their stated false-alarm rates on exact engines, and see the ones that are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from outrider.records import Counts
from outrider.telemetry import detect
from outrider.telemetry.alerts import Alerts, Condition, WindowSample
from outrider.telemetry.detect import Residuals


def step(g: np.random.Generator, bias: float = 0.0, tokens: int = 6) -> Counts:
    """The sums of a step of coins that reject with the stated probability, plus `bias`."""
    risk = g.choice([0.02, 0.2, 0.5, 0.9], tokens)
    rejected = int((g.random(tokens) < np.clip(risk + bias, 0, 1)).sum())
    return Counts(judged=tokens, rejected=rejected, risk=float(risk.sum()), spread=float((risk * (1 - risk)).sum()))


def test_evidence_ever_reaches_its_level_no_more_often_than_stated() -> None:
    """200 honest servers of 150 steps, looked at after every one; false-alarm rate of each assertion below 1e-9."""
    g, highest = np.random.default_rng(1), list[float]()
    for _ in range(200):
        one = Residuals()
        for _ in range(150):
            one.add(step(g))
        highest.append(one.highest)
    for level in (0.02, 0.2):
        assert sum(h >= math.log(1 / level) for h in highest) <= binom.isf(1e-9, 200, level)


def test_the_detector_raises_false_alarms_no_more_often_than_stated() -> None:
    """Honest servers reach 1/a in n steps with probability at most n a (Ville, over the starts of the detector), here 0.1."""
    g, alarms, a, steps = np.random.default_rng(2), 0, 1e-3, 100
    for _ in range(200):
        one, highest = Residuals(), -math.inf
        for _ in range(steps):
            one.add(step(g))
            highest = max(highest, one.log_detector)
        alarms += highest >= math.log(1 / a)
    assert alarms <= binom.isf(1e-9, 200, a * steps)


@pytest.mark.parametrize("bias", [0.1, -0.1, 0.4])
def test_a_change_is_seen_however_long_all_was_well(bias: float) -> None:
    """The negative control: 2,000 good steps, then rejections that differ by `bias` from what the rule says."""
    g, one = np.random.default_rng(3), Residuals()
    for _ in range(2000):
        one.add(step(g))
    assert not one.changed and not one.doubted
    delay = 0
    while not one.changed:
        one.add(step(g, bias))
        delay += 1
    assert delay * 6 * bias**2 < 60, delay  # some log(1e9) / (2 bias^2) tokens
    for _ in range(4 * delay + 500):
        one.add(step(g))
    assert not one.changed  # it forgets
    for _ in range(20 * delay):
        one.add(step(g, bias))
    assert one.doubted


def test_certain_rejections_and_rounding_are_no_evidence() -> None:
    one = Residuals()
    for _ in range(10_000):
        one.add(Counts(judged=3, rejected=1, risk=1.0 - 2e-5, spread=0.0))  # greedy: the rule knows, up to float32
    assert one.log_evidence <= 0 and one.log_detector < math.log(detect.STEPS_BETWEEN_FALSE_ALARMS) / 2
    one.add(Counts())
    assert Residuals().log_detector == -math.inf


LIMIT = Condition("high", "warning", "too high", lambda r: r.speedup, 2.0, 1.0, hold=10.0)


def played(values: list[float | None], every: float = 5.0) -> list[tuple[float, bool]]:
    alerts = Alerts((LIMIT,))
    return [
        (i * every, n.firing) for i, v in enumerate(values) for n in alerts.look(WindowSample(speedup=v), i * every)
    ]


def test_hysteresis() -> None:
    assert played([3, 3, 3, 3]) == [(10.0, True)]
    assert played([3, 3, 1.5, 3, 3, 1.5] * 5) == []  # never long enough: each dip below begins anew
    assert played([3, 3, 3, 1.5, 1.9, 1.5, 0.5, 0.5, 0.5, 3, 3]) == [(10.0, True), (40.0, False)]
    assert played([3, 3, 3, 0.5, 1.5, 0.5, 1.5, 0.5]) == [(10.0, True)]
    assert played([3, 3, 3, None, None, None]) == [(10.0, True), (25.0, False)]  # silence is an end
    assert played([None] * 9) == []


def test_every_condition_fires_on_its_own_trouble_and_none_on_a_good_day() -> None:
    good = {"judged": 5000, "rejected": 1500, "emitted": 9000, "speedup": 1.4, "break_even": 0.5}
    good |= {"steps": 4000, "drafts": 4000}
    trouble = {
        "rejections_above_break_even": {"rejected": 3000},
        "acceptance_suspicious": {"rejected": 3},
        "speculation_loses": {"speedup": 0.9},
        "not_exact": {"doubted": True},
        "residuals_changed": {"changed": True},
        "quality_spent": {"bias": 400.0},
        "queue_full": {"overloaded": 7},
        "requests_fail": {"failed": 1},
        "few_drafts": {"drafts": 20},
        "engine_silent": {"alive": False},
    }
    assert set(trouble) == {c.name for c in Alerts().conditions}
    for name, change in trouble.items():
        alerts, got = Alerts(), list[tuple[str, bool]]()
        for t in range(0, 600, 20):
            reading = WindowSample(**(good | (change if 100 <= t < 300 else {})))
            got += [(n.name, n.firing) for n in alerts.look(reading, float(t))]
        assert got == [(name, True), (name, False)]
    quiet = Alerts()
    assert not [
        n for t in range(600) for n in quiet.look(WindowSample(judged=20, rejected=20, break_even=0.5), float(t))
    ]

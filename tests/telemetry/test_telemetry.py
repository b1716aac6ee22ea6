"""The ledger's interval holds at its stated level, and ratios are ratios of sums."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from outrider.evaluate.statistics.ratios import paired_ratio
from outrider.records import Counts
from outrider.telemetry.ledger import (
    LEVEL,
    acceptance_at,
    acceptance_length,
    expected_length,
    ledger,
    predicted_speedup,
)
from outrider.telemetry.prometheus import SECONDS, Histogram, quantile


def simulate(g: np.random.Generator, tosses: int, bias: float = 0.0) -> Counts:
    """A run whose rule rejects with the probability it states, plus `bias`."""
    risk = g.uniform(0.05, 0.9, tosses)
    rejected = int((g.random(tosses) < np.clip(risk + bias, 0, 1)).sum())
    risks, spread = float(risk.sum()), float((risk * (1 - risk)).sum())
    return Counts(judged=tosses, accepted=tosses - rejected, rejected=rejected, risk=risks, spread=spread)


@pytest.mark.parametrize("tosses", [1, 7, 50, 1000])
def test_an_honest_rule_stays_inside_at_the_stated_level(tosses: int) -> None:
    """2,000 runs; more alarms than the level allows have probability below 1e-9 if the interval is honest."""
    g = np.random.default_rng(tosses)
    alarms = sum(not ledger(simulate(g, tosses)).agrees for _ in range(2000))
    assert alarms <= binom.isf(1e-9, 2000, LEVEL)


def test_a_rule_that_rejects_more_than_it_says_is_seen() -> None:
    g = np.random.default_rng(0)
    assert all(not ledger(simulate(g, 3000, bias=0.1)).agrees for _ in range(100))


def test_an_empty_run_agrees() -> None:
    assert ledger(Counts()).agrees
    assert acceptance_length(Counts()) is None


def test_sums_of_steps() -> None:
    counts = Counts()
    counts.add(proposed=4, accepted=2, judged=3, risk=0.9, spread=0.4, bias=0.0)
    counts.add(proposed=4, accepted=4, judged=4, risk=0.8, spread=0.3, bias=0.0)
    counts.add(proposed=0, accepted=0, judged=0, risk=0.0, spread=0.0, bias=0.0)
    assert (counts.steps, counts.proposed, counts.judged, counts.accepted, counts.rejected) == (3, 8, 7, 6, 1)
    assert acceptance_at(counts) == [1.0, 1.0, 0.5, 1.0]
    assert acceptance_length(counts) == pytest.approx((6 + 3) / 3) == pytest.approx(expected_length(counts))
    double = Counts()
    double.merge(counts)
    double.merge(counts)
    assert double.judged_at == [4, 4, 4, 2]
    assert acceptance_length(double) == acceptance_length(counts)


def test_every_sum_is_merged() -> None:
    """A count that is added to the class and forgotten in `merge` would be lost in every total."""
    one = Counts()
    for i, f in enumerate(fields(Counts), 1):
        setattr(one, f.name, [i] if f.name.endswith("_at") else i)
    total = Counts()
    total.merge(one)
    total.merge(one)
    assert asdict(total) == {n: [2 * x for x in v] if isinstance(v, list) else 2 * v for n, v in asdict(one).items()}


def test_predicted_speedup_is_length_times_cost() -> None:
    counts, plain = Counts(), Counts(steps=100)
    for _ in range(10):
        counts.add(proposed=2, accepted=1, judged=2, risk=0.5, spread=0.2, bias=0.0)
    assert predicted_speedup(counts, {"target": 2.0, "draft": 1.0}, plain, {"target": 10.0}) == pytest.approx(
        2 * 0.1 / 0.3
    )


def test_paired_ratio_cancels_what_both_arms_share() -> None:
    """Slow minutes hit both arms of a prompt: the paired interval stays narrow and holds the truth."""
    g = np.random.default_rng(1)
    slow = g.uniform(1, 4, 40)
    tokens = np.full(40, 100.0)
    r = paired_ratio(tokens, slow * 1.0 * g.uniform(0.97, 1.03, 40), tokens, slow * 2.0 * g.uniform(0.97, 1.03, 40))
    assert r.low < 2.0 < r.high
    assert r.high - r.low < 0.1
    assert r.verdict == "faster"
    same = paired_ratio(tokens, slow, tokens, slow * g.uniform(0.9, 1.1, 40))
    assert same.verdict == "undecided"


@given(values=st.lists(st.floats(0.0, 400.0), min_size=1, max_size=60), share=st.sampled_from((0.05, 0.5, 0.95, 1.0)))
def test_a_quantile_of_a_histogram_is_in_the_bucket_of_the_values_own(values: list[float], share: float) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    own = float(np.quantile(values, share, method="inverted_cdf"))
    found = quantile(histogram.bounds, histogram.counts, share)
    upper = [b for b in SECONDS if own <= b]
    lower = [b for b in SECONDS if b < own]
    assert found is not None and max(lower, default=0.0) <= found <= (upper[0] if upper else SECONDS[-1])
    assert quantile(histogram.bounds, [0] * len(histogram.counts), share) is None

"""Experiments on live traffic: who gets which arm, what may vary, what the records say, in any order, and when harm is called so.

Binomial bounds at 1e-9 each: their false-alarm rate.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, binomtest

from outrider.errors import ConfigError
from outrider.evaluate.experiments.assignment import arm_of, arm_overrides, parts_of, shares_of, unit_key, unit_of
from outrider.evaluate.experiments.experiment import Experiment, build_arms, read_experiment
from outrider.evaluate.experiments.tally import HELD, Tally, log_evidence
from outrider.options import EngineOptions
from outrider.records import Counts

FALSE_ALARM = 1e-9
ARMS: dict[str, dict[str, Any]] = {"off": {"draft": "none"}, "two": {"length": 2}, "four": {}}
SERVED = EngineOptions(length=4)


def experiment(**changes: Any) -> Experiment:
    return replace(Experiment("x", ARMS, "off"), **changes)


# ----------------------------------------------------------------- who gets which arm
USERS = [f"user {i}" for i in range(20_000)]


@pytest.mark.parametrize("shares", [None, {"off": 0.6, "two": 0.1, "four": 0.2}])
def test_users_land_in_the_arms_by_their_shares(shares: dict[str, float] | None) -> None:
    e = experiment(shares=shares)
    got = [arm_of(e, u) for u in USERS]
    for arm, share in [*shares_of(e).items(), (None, 1 - sum(shares_of(e).values()))]:
        low, high = binom.ppf(FALSE_ALARM / 2, len(USERS), share), binom.isf(FALSE_ALARM / 2, len(USERS), share)
        assert low <= got.count(arm) <= high
    low = binom.ppf(FALSE_ALARM / 2, len(USERS), 0.45)  # negative control: other shares are told apart
    assert not low <= got.count("off") <= binom.isf(FALSE_ALARM / 2, len(USERS), 0.45)


def test_a_user_has_one_arm_and_experiments_are_independent() -> None:
    e = experiment()
    got = [arm_of(e, u) for u in USERS]
    assert got == [
        arm_of(experiment(arms=dict(reversed(ARMS.items()))), u) for u in USERS
    ]  # the file's order is nothing
    for other in (experiment(name="y"), experiment(salt="pepper")):
        same = sum(a == arm_of(other, u) for a, u in zip(got, USERS, strict=True))
        low, high = (f(FALSE_ALARM / 2, len(USERS), 1 / 3) for f in (binom.ppf, binom.isf))
        assert low <= same <= high
        assert not {unit_of(e, u) for u in USERS} & {unit_of(other, u) for u in USERS}
    assert len({unit_of(e, u) for u in USERS}) == len(USERS)
    assert arm_of(e, "\udc80") == arm_of(e, "\udc80")


def test_a_stretch_of_time_is_a_unit() -> None:
    e = experiment(window=10.0)
    assert unit_key(e, "a", 1009.9) == unit_key(e, "b", 1000.0) != unit_key(e, "a", 1010.0)
    assert unit_key(experiment(), "a", 1009.9) == "a"


# ----------------------------------------------------------------- what may vary
def test_arms_become_parameters_of_their_requests() -> None:
    assert arm_overrides(experiment(), SERVED) == {
        "off": {"draft_length": 0},
        "two": {"draft_length": 2},
        "four": {"draft_length": 4},
    }
    lossy = EngineOptions(length=4, rule="tv_budget:per_sequence=2", allow_lossy=True)
    arms = {"exact": {"tv_budget": 0}, "lossy": {"rule": lossy.rule, "draft": "auto"}}
    assert arm_overrides(experiment(arms=arms, base="exact"), lossy) == {
        "exact": {"draft_length": 4, "tv_budget": 0.0},
        "lossy": {"draft_length": 4},
    }


def test_an_arm_may_have_some_of_the_loaded_drafters() -> None:
    served = replace(SERVED, draft="ngram:3-1+forced:2+a/b+c")
    assert parts_of(served.draft) == ["ngram:3-1", "forced:2", "a/b+c"]
    arms = {"all": {}, "gram": {"draft": "ngram:3-1"}, "rest": {"draft": "forced:2+a/b+c", "length": 1}}
    found = arm_overrides(experiment(arms=arms, base="all"), served)
    assert {arm: w.get("drafters") for arm, w in found.items()} == {"all": None, "gram": (0,), "rest": (1, 2)}
    for other in ("ngram", "a/b+c+ngram:3-1", "a/b"):
        with pytest.raises(ConfigError, match="is not loaded"):
            arm_overrides(experiment(arms={"all": {}, "b": {"draft": other}}, base="all"), served)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "ngram"}, "'ngram' is not loaded"),
        ({"length": 9}, "start it with --length 9"),
        ({"length": "long"}, "more than this server drafts"),
        ({"rule": "match"}, "rule 'match' cannot vary"),
        ({"allow_lossy": True}, "allow_lossy True cannot vary"),
        ({"draft_quantize": "int8"}, "draft_quantize 'int8' cannot vary"),
        ({"tv_budget": 1.0}, "'auto' is exact"),
        ({"draft": "none", "length": 2}, "leave `length` out"),
    ],
)
def test_what_cannot_vary_is_refused_with_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"arm 'b': .*{words}"):
        arm_overrides(experiment(arms={"a": {}, "b": options}, base="a"), SERVED)


def test_what_no_experiment_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fixed-length"):
        arm_overrides(experiment(), SERVED, fixed=False)
    with pytest.raises(ConfigError, match="add up to more than 1"):
        arm_overrides(experiment(shares={"off": 0.6, "two": 0.6, "four": 0.1}), SERVED)
    with pytest.raises(ConfigError, match="plain ASCII"):
        arm_overrides(experiment(arms={"off": {}, "vier\n": {}}), SERVED)
    with pytest.raises(ConfigError, match="live requests"):
        build_arms(
            type("E", (), {"loaded": type("L", (), {"options": None})})(), experiment(arms={"a": {"tv_budget": 1}})
        )
    path = tmp_path / "e.yaml"
    path.write_text("arms: {a: {}, b: {}}\nwindow: 300\nshares: {a: 0.1, b: 0.2}\nsalt: x\neach: 2\n")
    e = read_experiment(path)
    assert (e.window, e.shares, e.salt, e.each) == (300.0, {"a": 0.1, "b": 0.2}, "x", 2)
    for text, words in (
        ("arms: {a: {}, b: {}}\nshares: {a: 0.5}\n", "every arm once"),
        ("arms: {a: {}, b: {}}\nshares: {a: 0.5, b: 2.0}\n", "between 0 and 1"),
        ("arms: {a: {}, b: {}}\neach: 0\n", "each"),
        ("arms: {a: {}, b: {}}\nwindow: -1.0\n", "window"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_experiment(path)


# ----------------------------------------------------------------- harm
def test_the_evidence_is_the_integral_it_says() -> None:
    for ours, both, chance in ((0, 0, 0.5), (5, 5, 0.5), (7, 12, 0.3), (40, 60, 0.5), (0, 9, 0.9)):

        def likelihood(t: float, k: int = ours, f: int = both, c: float = chance) -> float:
            return (t / c) ** k * ((1 - t) / (1 - c)) ** (f - k) / (1 - c)

        assert math.exp(log_evidence(ours, both, chance)) == pytest.approx(quad(likelihood, chance, 1)[0], rel=1e-6)


def test_equal_arms_are_called_harmful_no_more_often_than_stated() -> None:
    """Looked at after each of 100 errors, over 1,000 experiments; the count exceeds its bound with probability below 1e-9."""
    level, runs, errors = 0.05, 1000, 100
    for chance in (0.5, 0.1):
        table = np.array([[log_evidence(k, f, chance) for k in range(errors + 1)] for f in range(errors + 1)])
        draws = np.random.default_rng(0).random((runs, errors)) < chance
        paths = table[np.arange(1, errors + 1), draws.cumsum(1)]
        assert (paths >= math.log(1 / level)).any(1).sum() <= binom.isf(FALSE_ALARM, runs, level)
        worse = np.random.default_rng(1).random((runs, errors)) < 3 * chance / (1 + 2 * chance)  # three times the rate
        assert (table[np.arange(1, errors + 1), worse.cumsum(1)] >= math.log(1 / level)).any(1).mean() > 0.7
    looked = [[binomtest(k, f, 0.5, "greater").pvalue if f else 1 for k in range(f + 1)] for f in range(errors + 1)]
    fair = np.random.default_rng(2).random((runs, errors)) < 0.5  # negative control: a usual test at every look
    alarms = sum(any(looked[f + 1][k] < level for f, k in enumerate(row)) for row in fair.cumsum(1))
    assert alarms > 1.3 * binom.isf(FALSE_ALARM, runs, level)


# ----------------------------------------------------------------- what records say
def record(unit: str, rate: float = 100.0, outcome: str = "length", later: int = 40, **counts: Any) -> dict[str, Any]:
    sums = {name: getattr(Counts(), name) for name in Counts.__dataclass_fields__} | counts
    made = {"unit": unit, "outcome": outcome, "tokens": later + 1, "later": later, "seconds": later / rate}
    return {**made, "seeded": False, "counts": sums}


def traffic(
    ratio: float, *, units: int = 120, sd: float = 0.1, errors: float = 0.0, seed: int = 0
) -> list[tuple[str, dict[str, Any]]]:
    """Requests of users, in order of arrival: those in arm "four" are `ratio` times faster and fail with probability `errors`."""
    rng, e, out = random.Random(seed), experiment(arms={"off": {}, "four": {}}), []
    for i in range(units):
        arm = arm_of(e, f"u{i}") or ""
        bad = arm == "four" and rng.random() < errors
        rate = 100 * math.exp(rng.gauss(0, sd)) * (ratio if arm == "four" else 1)
        out.append((arm, record(f"u{i}", rate, "error" if bad else "length", 0 if bad else 40)))
    return out


def tally(made: list[tuple[str, dict[str, Any]]], order: list[int] | None = None, **changes: Any) -> Tally:
    out = Tally(experiment(arms={"off": {}, "four": {}}, **changes))
    for i in order or range(len(made)):
        out.add(made[i][0], i, 0, made[i][1])
    return out


@pytest.mark.parametrize(
    ("made", "decision"),
    [
        (traffic(1.3), "better"),
        (traffic(0.7), "worse"),
        (traffic(1.0, units=2000), "equivalent"),
        (traffic(1.0, units=20), "undecided"),
        (traffic(1.0, errors=0.3), "vetoed"),
    ],
    ids=["better", "worse", "equivalent", "undecided", "errors"],
)
def test_decisions(made: list[tuple[str, dict[str, Any]]], decision: str) -> None:
    (found,) = tally(made).status().comparisons
    assert found.decision == decision


def test_equal_arms_are_found_different_no_more_often_than_stated_and_a_harmful_one_early() -> None:
    """Speed, errors and early leaving together, looked at after every 15th of 150 users, over 100 experiments."""

    def decisions(ratio: float, errors: float, seed: int) -> list[str]:
        made, out, said = traffic(ratio, units=150, sd=0.2, errors=errors, seed=seed), tally([]), []
        for i, (arm, r) in enumerate(made):  # the other arm fails as often: the shares of harm are equal
            out.add(arm, i, 0, r | {"outcome": "error"} if random.Random(f"{seed} {i}").random() < 0.1 else r)
            if i % 15 == 14:
                said.append(out.status().comparisons[0].decision)
        return said

    equal = [decisions(1.0, 0.0, seed) for seed in range(100)]
    false = sum(any(d in ("better", "worse", "vetoed") for d in said) for said in equal)
    assert false <= binom.isf(FALSE_ALARM, 100, experiment().level)
    harmful = [decisions(0.8, 0.0, seed) for seed in range(20)]
    assert all("worse" in said for said in harmful)
    assert np.median([said.index("worse") for said in harmful]) < 7  # before two thirds of the users


def test_the_order_in_which_requests_end_does_not_matter_and_open_ones_hold_back() -> None:
    made = traffic(1.2)
    order = list(range(len(made)))
    random.Random(1).shuffle(order)
    whole, mixed = tally(made), tally(made, order)
    assert {a: s.values for a, s in whole.arms.items()} == {a: s.values for a, s in mixed.arms.items()}
    assert whole.status() == mixed.status()
    held = tally(made, [i for i in order if i != 50])
    assert sum(s.requests for s in held.arms.values()) == 50
    held.add(made[50][0], 0, 1, made[50][1])  # the server was started again: 50 will never come
    assert sum(s.requests for s in held.arms.values()) == len(made)


def test_a_request_that_does_not_end_holds_back_so_many_and_no_more() -> None:
    made = traffic(1.0, units=HELD + 2)
    out = tally(made, list(range(1, HELD + 1)))
    assert sum(s.requests for s in out.arms.values()) == 0
    out.add(made[HELD + 1][0], HELD + 1, 0, made[HELD + 1][1])
    assert sum(s.requests for s in out.arms.values()) == HELD + 1
    out.add(made[0][0], 0, 0, made[0][1])
    assert sum(s.requests for s in out.arms.values()) == HELD + 2


def test_a_user_is_one_value_of_its_first_requests() -> None:
    e = experiment(arms={"off": {}, "four": {}}, each=2)
    out = Tally(e)
    for i, (unit, rate) in enumerate([("a", 10), ("b", 20), ("a", 30), ("a", 1000), ("b", 20), ("c", 5)]):
        out.add("off", i, 0, record(unit, rate))
    assert out.arms["off"].values == pytest.approx([math.log(80 / (4 + 40 / 30)), math.log(20)])
    assert out.arms["off"].requests == 6 and len(out.arms["off"].units) == 3
    out.add("off", 6, 0, record("c", 5, later=3))  # too short to be a speed
    out.add("off", 7, 0, record("d", outcome="refused", later=0))
    assert len(out.arms["off"].values) == 2 and out.arms["off"].requests == 7


def test_a_stretch_of_time_is_one_value_when_it_is_over() -> None:
    out = Tally(experiment(arms={"off": {}, "four": {}}, window=10.0))
    for i, (arm, unit, rate) in enumerate(
        [("off", "w0", 10), ("off", "w0", 30), ("four", "w1", 50), ("off", "w2", 20)]
    ):
        out.add(arm, i, 0, record(unit, rate))
    assert out.arms["off"].values == pytest.approx([math.log(80 / (4 + 40 / 30))])
    assert out.arms["four"].values == pytest.approx([math.log(50)])


def test_unequal_shares_use_all_units() -> None:
    e = experiment(arms={"off": {}, "four": {}}, shares={"off": 0.75, "four": 0.25})
    out = Tally(e)
    units = itertools.count()
    for i, arm in enumerate(["off", "off", "off", "four"] * 10):
        out.add(arm, i, 0, record(f"u{next(units)}", 10.0 if arm == "off" else 20.0))
    (found,) = out.status().comparisons
    assert found.speed.n == 10 and found.speed.mean == pytest.approx(math.log(2))


def test_a_ledger_that_disagrees_is_vetoed_unless_the_client_chose_the_noise() -> None:
    wrong = {"judged": 100, "rejected": 90, "accepted": 10, "risk": 30.0, "spread": 20.0}
    made = [(arm, record(r["unit"], **wrong) if arm == "four" else r) for arm, r in traffic(1.0)]
    (found,) = tally(made).status().comparisons
    assert found.decision == "vetoed" and "the ledger disagrees" in found.vetoes[0]
    seeded = [(arm, r | {"seeded": True}) for arm, r in made]
    assert tally(seeded).status().comparisons[0].vetoes == ()


def test_a_stopped_arm_stays_stopped() -> None:
    made = traffic(0.5)
    out = tally(made)
    assert out.status().stopped == ("four",)
    for i, (arm, r) in enumerate(traffic(3.0, seed=1)):
        out.add(arm, len(made) + i, 0, r | {"unit": f"v{i}"})
    assert out.status().stopped == ("four",) and out.status().comparisons[0].decision == "worse"

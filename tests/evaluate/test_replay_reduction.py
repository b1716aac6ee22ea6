"""Arms on the same continuations: the reduced estimate is of the same number, varies less, covers, and says when it is not right.

z-tests with |z| < 6.2 and binomial bounds at 1e-9 each: their false-alarm rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from outrider.build import Engine
from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.evaluate.experiments.continuations import Continuations, way_of
from outrider.evaluate.experiments.control_variates import compare, controlled, noise_covariate, ratio_bounds
from outrider.evaluate.experiments.experiment import Experiment, analyse, run_experiment
from outrider.evaluate.measure import Arm
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.sequential import bounds
from outrider.evaluate.store.store import Store
from outrider.params import SamplingParams
from outrider.records import PHASES, Counts
from outrider.verify import load_rule
from tests.evaluate.liars import DRAFT, TARGET, VOCAB

Z, LEVEL, G = 6.2, 0.05, 0.25
TEXTS, TOKENS = 200, 20
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [[1 + i % (VOCAB - 1), (7 * i) % VOCAB] for i in range(TEXTS)]


def arm(name: str, length: int, rule: str = "speculative_sampling") -> Arm:
    drafter = ModelDrafter(DRAFT, length) if length else NoDraft()
    return Arm(name, Engine(TARGET, drafter, load_rule(rule), Fixed(length), slots=16, max_length=64))


ARMS = [arm("plain", 0), arm("two", 2), arm("four", 4, "block")]


def taken(one: Arm) -> np.ndarray:
    """[TEXTS] target calls per token of an arm's own runs."""
    runs = one.engine.generate(PROMPTS, [replace(PARAMS, seed=i) for i in range(TEXTS)])
    return np.array([r.outputs[0].counts.steps for r in runs]) / TOKENS


def along(target=TARGET) -> dict[str, np.ndarray]:
    """[TEXTS] per arm: calls per token that replay expects along continuations of `target`, which is not always the arms'."""
    lines = Continuations(ARMS, PROMPTS, PARAMS, 1, seed=3)
    writer = Engine(target, NoDraft(), load_rule("auto"), Fixed(0), slots=16, max_length=64)
    reader, lines.plain = lines.plain, writer
    texts = lines.draw(PROMPTS, 0)
    lines.plain = reader
    found = [lines.calls([replace_item(e)]) for e in texts]
    return {a.name: np.array([f[a.name] for f in found]) for a in ARMS}


def replace_item(text):
    return text._replace(item=0)


@pytest.fixture(scope="module")
def own() -> dict[str, np.ndarray]:
    return {a.name: taken(a) for a in ARMS}


@pytest.fixture(scope="module")
def common() -> dict[str, np.ndarray]:
    return along()


@pytest.fixture(scope="module")
def wrong() -> dict[str, np.ndarray]:
    """Continuations that the draft wrote, read as if they were the target's."""
    return along(DRAFT)


def z_of(x: np.ndarray) -> float:
    return float(x.mean() / (x.std(ddof=1) / math.sqrt(len(x))))


@pytest.mark.parametrize("name", ["two", "four"])
def test_replay_expects_what_the_arms_own_runs_take_and_not_so_along_the_drafts_texts(
    name: str, own, common, wrong
) -> None:
    assert abs(z_of(own[name] - common[name])) < Z
    assert abs(z_of(own[name] - wrong[name])) > Z  # negative control
    assert (common["plain"] == 1).all() and (own["plain"] == 1).all()


def records(
    seconds: dict[str, np.ndarray], calls: dict[str, np.ndarray], replayed: dict[str, np.ndarray]
) -> list[Record]:
    """What an experiment would have kept of these runs."""
    out = []
    for name, c in calls.items():
        for g, x in enumerate(c):
            counts = Counts(steps=round(TOKENS * x))
            times = (name, g, 0, 0, TOKENS, float(seconds[name][g]), dict.fromkeys(PHASES, 0.1), counts, 0)
            out.append(Record(*times, replayed=float(replayed[name][g])))
    return out


def clock(calls: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Seconds of runs whose time goes by target calls, with a prompt's pace and a machine's noise."""
    size = len(next(iter(calls.values())))
    pace = np.exp(rng.normal(0, 0.5, size))
    return {n: TOKENS * c * pace * np.exp(rng.normal(0, 0.03, size)) for n, c in calls.items()}


def pairs_of(made: list[Record], a: str, b: str) -> list[tuple[Record, Record]]:
    return list(zip([r for r in made if r.arm == a], [r for r in made if r.arm == b], strict=True))


@pytest.mark.parametrize(("metric", "least"), [("speed", 3.0), ("acceptance", 4.0)])
def test_the_interval_is_narrower_and_says_by_how_much(metric, least: float, own, common) -> None:
    made = records(clock(own, np.random.default_rng(0)), own, common)
    found, reduction = compare(metric, LEVEL, G, pairs_of(made, "four", "two"))
    assert reduction is not None and reduction.agrees
    assert reduction.factor > least
    assert (found.high - found.low) / (reduction.without.high - reduction.without.low) == pytest.approx(
        reduction.factor**-0.5, rel=0.1
    )
    plain, none = compare(metric, LEVEL, G, [(replace(a, replayed=None), b) for a, b in pairs_of(made, "four", "two")])
    assert none is None and plain == reduction.without


# ----------------------------------------------------------------- coverage: experiments drawn from a pool whose truth is known
RUNS, LOOKS = 600, 60
MOST = int(binom.isf(1e-9, RUNS, LEVEL))


def speed_experiments(own, common) -> tuple[np.ndarray, np.ndarray, float]:
    """[RUNS, LOOKS] differences with and without, and their true mean: the pool is the population, its luck centred."""
    rng = np.random.default_rng(7)
    seconds = clock(own, rng)
    y = np.log(seconds["two"] / seconds["four"])
    some = rng.integers(0, TEXTS, (RUNS, LOOKS))
    middle = {n: own[n] - (own[n] - common[n]).mean() for n in own}
    z = [[noise_covariate(middle[n][row], common[n][row]) for n in ("four", "two")] for row in some]
    reduced = np.array([controlled(y[row], np.stack([a, -b], 1)) for row, (a, b) in zip(some, z, strict=True)])
    return y[some], reduced, float(y.mean())


def missed(draws: np.ndarray, truth: float) -> int:
    """Experiments whose interval misses the truth at one of the looks."""
    found = [[bounds(row[:n], LEVEL, G) for n in range(5, LOOKS + 1, 5)] for row in draws]
    return sum(any(not b.low <= truth <= b.high for b in row) for row in found)


def test_speed_is_unbiased_and_covered_at_all_looks(own, common) -> None:
    plain, reduced, truth = speed_experiments(own, common)
    for draws in (plain, reduced):
        assert abs(z_of(draws.mean(1) - truth)) < Z
        assert missed(draws, truth) <= MOST
    assert plain.mean(1).var() > 3 * reduced.mean(1).var()


def test_acceptance_is_covered_at_all_looks_and_along_the_drafts_texts_it_is_not(own, common, wrong) -> None:
    """The truth is the arms' own runs'; the common continuations' pool, centred on it, is what the intervals see."""
    rng = np.random.default_rng(8)
    some = rng.integers(0, TEXTS, (RUNS, LOOKS))
    truth = math.log(own["two"].mean() / own["four"].mean())

    def misses(pool: dict[str, np.ndarray]) -> int:
        found = [
            [ratio_bounds(pool["four"][row[:n]], pool["two"][row[:n]], LEVEL, G) for n in range(5, LOOKS + 1, 5)]
            for row in some
        ]
        return sum(any(not b.low <= truth <= b.high for b in looks) for looks in found)

    centred = {n: common[n] * own[n].mean() / common[n].mean() for n in common}
    assert misses(centred) <= MOST
    assert misses(wrong) > MOST  # negative control


def test_the_interval_of_a_ratio_is_the_confidence_sequence_turned_around() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.3, 0.5, 30), rng.uniform(0.4, 0.7, 30)
    found = ratio_bounds(a, b, LEVEL, G)
    for edge in (found.low, found.high):
        inside, outside = (bounds(b - math.exp(edge + d) * a, LEVEL, G) for d in (1e-6, -1e-6))
        assert (inside.low <= 0 <= inside.high) != (outside.low <= 0 <= outside.high)
    assert found.low < found.mean < found.high
    assert ratio_bounds(a[:4], b[:4], LEVEL, G).low == -math.inf
    assert ratio_bounds(rng.normal(0.01, 1, 10), b[:10], LEVEL, G).high == math.inf


def test_weights_never_look_ahead() -> None:
    rng = np.random.default_rng(1)
    y, z = rng.normal(size=40), rng.normal(size=(40, 2))
    whole = controlled(y, z)
    for n in (1, 6, 20):
        assert controlled(y[:n], z[:n]) == pytest.approx(whole[:n])
    assert controlled(y[:3], z[:3]) == pytest.approx(y[:3] - z[:3].sum(1))
    assert controlled(y, np.zeros((40, 2))) == pytest.approx(y)
    assert controlled(3 * z[:, 0] - z[:, 1], z)[-1] == pytest.approx(
        (8 / 47) * (3 * z[-1, 0] - z[-1, 1] - z[-1].sum()), abs=0.1
    )


# ----------------------------------------------------------------- in an experiment
def experiment(**changes: object) -> Experiment:
    arms = {"two": {"length": 2}, "four": {"length": 4}}
    return replace(Experiment("r", arms, "two", max_tokens=TOKENS, replay=1), **changes)


@pytest.mark.parametrize("metric", ["speed", "acceptance"])
def test_an_experiment_with_replay_keeps_what_it_needs_and_goes_on(metric: str, tmp_path: Path) -> None:
    e, prompts = experiment(metric=metric, batch=2), PROMPTS[:12]
    with Store(tmp_path / "a.db") as db:

        def stop(state) -> None:
            if state.groups == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_experiment(e, ARMS[1:], prompts, db, stop_early=False, progress=stop)
        run_experiment(e, ARMS[1:], prompts, db, stop_early=False)
        cut = db.records(db.run("r").id)
    with Store(tmp_path / "b.db") as db:
        state = run_experiment(e, ARMS[1:], prompts, db, stop_early=False)
        whole = db.records(db.run("r").id)
    assert {k: r["replayed"] for k, r in cut.items()} == {k: r["replayed"] for k, r in whole.items()}
    assert all(1 / 5 <= r["replayed"] <= 1 for r in whole.values())
    assert state.comparisons[0].reduction is not None


def test_an_arm_that_is_not_what_replay_says_is_vetoed(own, wrong, common) -> None:
    seconds = clock(own, np.random.default_rng(0))
    mine = [r for r in records(seconds, own, common) if r.arm != "plain"]
    assert analyse(experiment(), mine, TEXTS).comparisons[0].decision == "better"
    other = [r for r in records(seconds, own, wrong) if r.arm != "plain"]
    (comparison,) = analyse(experiment(), other, TEXTS).comparisons
    assert comparison.decision == "vetoed" and "replay disagrees" in comparison.vetoes[0]


def test_what_is_not_replayed() -> None:
    model = ModelDrafter(DRAFT, 4)
    for drafter, rule, control in (
        (NGram(4), "speculative_sampling", Fixed(4)),
        (model, "tv_budget", Fixed(4)),
        (model, "block", Adaptive(4, 4)),
        (ModelDrafter(DRAFT, 2, branching=(2, 1)), "speculative_sampling", Fixed(2)),
        (ModelDrafter(DRAFT, 4, sample="coupled"), "match", Fixed(4)),
    ):
        one = Engine(TARGET, drafter, load_rule(rule), control, slots=2, max_length=64, allow_lossy=True)
        assert way_of(one) is None
        with pytest.raises(ConfigError, match="replay needs an arm"):
            Continuations([Arm("x", one)], PROMPTS[:2], PARAMS, 1, 0)
    greedy = way_of(
        Engine(TARGET, ModelDrafter(DRAFT, 4, sample="greedy"), load_rule("block"), Fixed(3), max_length=64)
    )
    assert greedy is not None and (greedy.length, greedy.drafting) == (3, "greedy")

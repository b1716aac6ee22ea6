"""Experiments claim falsely no more often than they say, cover what they should, and see what they were designed to see."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import Experiment, analyse, read_experiment, run_experiment
from outrider.evaluate.measure import Arm
from outrider.evaluate.records import Record, Timing
from outrider.evaluate.statistics.sequential import bounds, design, half_width_factor, prior
from outrider.evaluate.store.store import Store
from outrider.records import PHASES, Counts
from outrider.verify import load_rule
from tests.evaluate.liars import TARGET, engine

LEVEL, LOOKS, RUNS = 0.05, 300, 3000
FALSE_ALARM = 1e-9
MOST = int(binom.isf(FALSE_ALARM, RUNS, LEVEL))

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
"""Half a kilobyte of YAML that stands for 9^12 texts."""


def paths(draw: np.ndarray, level: float, g: float) -> tuple[np.ndarray, np.ndarray]:
    """[runs, looks] lower and upper bounds after every observation."""
    n = np.arange(1, draw.shape[1] + 1)
    mean = draw.cumsum(1) / n
    square = np.maximum((draw**2).cumsum(1) / n - mean**2, 0)
    factor = np.array([half_width_factor(int(k), level, g) for k in n])
    with np.errstate(invalid="ignore", divide="ignore"):
        width = factor * np.sqrt(square / (n - 1))
    width[:, ~np.isfinite(factor)] = np.inf
    return mean - width, mean + width


def misses(draw: np.ndarray, mean: float, level: float = LEVEL, g: float = 0.1) -> int:
    low, high = paths(draw, level, g)
    return int(((low > mean) | (high < mean)).any(1).sum())


def test_the_paths_are_the_bounds() -> None:
    y = np.random.default_rng(0).normal(0.3, 1.0, 40)
    low, high = paths(y[None], 0.05, 0.2)
    for n in (5, 17, 40):
        b = bounds(y[:n], 0.05, 0.2)
        assert (b.low, b.high) == pytest.approx((low[0, n - 1], high[0, n - 1]))


@pytest.mark.parametrize("kind", ["normal", "student", "skewed"])
def test_looking_after_every_prompt_raises_no_more_false_alarms_than_stated(kind: str) -> None:
    """The count exceeds its bound with probability below 1e-9 if the level holds."""
    rng = np.random.default_rng(1)
    draw = {
        "normal": lambda s: rng.normal(size=s),
        "student": lambda s: rng.standard_t(6, size=s),
        "skewed": lambda s: rng.gamma(8.0, size=s) / 8 - 1,
    }[kind]((RUNS, LOOKS))
    assert misses(draw, 0.0) <= MOST


def test_coverage_at_all_times_is_at_least_nominal() -> None:
    rng = np.random.default_rng(2)
    draw = rng.normal(0.04, 0.1, size=(RUNS, LOOKS))
    assert 1 - misses(draw, 0.04) / RUNS >= 1 - MOST / RUNS


def test_the_usual_interval_looked_at_every_time_fails_this_test() -> None:
    """Negative control: a t-interval per look."""
    from scipy.stats import t

    draw = np.random.default_rng(3).normal(size=(RUNS, LOOKS))
    n = np.arange(1, LOOKS + 1)
    mean = draw.cumsum(1) / n
    sd = np.sqrt(np.maximum((draw**2).cumsum(1) / n - mean**2, 0) / np.maximum(n - 1, 1))
    z = t.isf(LEVEL / 2, np.maximum(n - 1, 1))
    assert (np.abs(mean) > z * sd)[:, 4:].any(1).sum() > 3 * MOST


@pytest.mark.parametrize(("effect", "sd"), [(0.05, 0.1), (0.1, 0.15)])
def test_the_design_has_its_power(effect: float, sd: float) -> None:
    d = design(effect, sd, power=0.8)
    assert d.fixed < d.sequential < 6 * d.fixed
    draw = np.random.default_rng(4).normal(effect, sd, size=(RUNS, d.sequential))
    found = (paths(draw, LEVEL, d.g)[0] > 0).any(1).sum()
    assert found >= binom.ppf(FALSE_ALARM, RUNS, 0.8)


def test_more_arms_need_more_prompts() -> None:
    assert design(0.05, 0.1, arms=4).sequential > design(0.05, 0.1).sequential
    assert prior(0.05, 0.1) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="positive"):
        design(0.0, 0.1)


# ----------------------------------------------------------------- experiments
def experiment(**changes: object) -> Experiment:
    return replace(Experiment("x", {"plain": {"draft": "none"}, "fast": {"length": 4}}, "plain"), **changes)


def records(
    ratio: float, *, groups: int = 60, sd: float = 0.05, lost: float = 0.0, loops: int = 0, seed: int = 0
) -> list[Record]:
    rng, out = np.random.default_rng(seed), []
    for g in range(groups):
        base = math.exp(rng.normal(0, 0.5))
        for arm in ("plain", "fast"):
            speed = base * (ratio * math.exp(rng.normal(0, sd)) if arm == "fast" else 1.0)
            counts = Counts(10, 40, 40, 30, 10, 40, 10.0, 7.0) if arm == "fast" else Counts()
            nll = 40 * (2.0 + rng.normal(0, 0.05) + (lost if arm == "fast" else 0.0))
            n = loops if arm == "fast" else 0
            text = (Timing(0.1, 1.0, 40),)
            out.append(Record(arm, g, 0, 0, 40, 40 / speed, dict.fromkeys(PHASES, 0.1), counts, 0, text, n, (), nll))
    return out


@pytest.mark.parametrize(
    ("made", "decision"),
    [
        (records(1.3), "better"),
        (records(0.8), "worse"),
        (records(1.0, groups=400), "equivalent"),
        (records(1.02, groups=8, sd=0.3), "undecided"),
        (records(2.0, loops=1), "vetoed"),
        (records(2.0, lost=0.5), "vetoed"),
    ],
    ids=["better", "worse", "equivalent", "undecided", "loops", "quality"],
)
def test_decisions(made: list[Record], decision: str) -> None:
    state = analyse(experiment(quality=0.1), made, 60)
    assert state.comparisons[0].decision == decision
    assert state.decided == (decision != "undecided")


def test_an_experiment_runs_stops_and_goes_on(tmp_path: Path) -> None:
    """Run in two pieces: the second does not repeat the first, and both together are what one run would have kept."""
    plain = Engine(TARGET, NoDraft(), load_rule("auto"), Fixed(0), slots=2, max_length=64)
    arms = [Arm("plain", plain), Arm("fast", engine(load_rule("speculative_sampling")))]
    e = experiment(max_tokens=8, quality=10.0)
    prompts = [[1, i] for i in range(8)]
    with Store(tmp_path / "a.db") as store:

        class Stop(Exception):
            pass

        def stop(state) -> None:
            if state.groups == 3:
                raise Stop

        with pytest.raises(Stop):
            run_experiment(e, arms, prompts, store, stop_early=False, progress=stop)
        run = store.run("x").id
        first = store.records(run)
        state = run_experiment(e, arms, prompts, store, stop_early=False)
        assert state.groups == 8
        last = store.records(run)
        assert len(first) == 6 and len(last) == 16
        assert all(last[k] == v for k, v in first.items())
        assert store.experiment("x")[2]["groups"] == 8
    with Store(tmp_path / "b.db") as store:
        run_experiment(e, arms, prompts, store, stop_early=False)
        whole = store.records(store.run("x").id)
    assert {k: (r["outputs"], r["counts"], r["order"]) for k, r in whole.items()} == {
        k: (r["outputs"], r["counts"], r["order"]) for k, r in last.items()
    }


def test_files_are_read_and_mistakes_named(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("arms:\n  plain: {draft: none}\n  three: {length: 3}\nmin_effect: 0.1\n")
    e = read_experiment(path)
    assert (e.name, e.base, e.min_effect) == ("e", "plain", 0.1)
    assert asdict(e)["arms"]["three"] == {"length": 3}
    for text, words in (
        ("arms: {a: {}, b: {}}\nmin_efect: 1\n", "min_effect"),
        ("arms: {a: {lenght: 3}, b: {}}\n", "length"),
        ("arms: {a: {}}\n", "at least two"),
        ("arms: {a: {}, b: {}}\nbase: c\n", "unknown arm"),
        ("arms: {a: {}, b: {}}\nlevel: 3\n", "level"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
        ("arms: {a: {}, b: {}}\nmax_tokens: many\n", "max_tokens"),
        ("arms: {a: {}, b: {}}\nbatch: 1.5\n", "batch"),
        ("arms: {a: fast, b: {}}\n", "mapping of options"),
        ("arms: {a: {length: true}, b: {}}\n", "length cannot be 'True'"),
        ("arms: {a: {tv_budget: -1}, b: {}}\n", "tv_budget cannot be '-1'"),
        ("arms: {a: {draft: [x]}, b: {}}\n", "draft cannot be"),
        ("arms: {a: {}, b: {}}\nmetric: sped\n", "metric"),
        ("arms: {a: {}, b: {}}\nreplay: 99\n", "replay"),
        ("arms: {a: {}, b: {}}\nprompts: &p [*p]\n", "no loop"),
        (f"arms: {'[' * 5000}", "no loop"),
        (BOMB + "arms: {a: {draft: *a11}, b: {}}\n", "aliases stand for more than 16 MiB"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_experiment(path)

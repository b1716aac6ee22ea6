"""Intervals cover what they claim, also with few prompts; energy and Spec-Bench's numbers are what their definitions say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from outrider.errors import ConfigError
from outrider.evaluate.bench import spec_bench as sb
from outrider.evaluate.bench.gate import comparable
from outrider.evaluate.energy import Meter
from outrider.evaluate.records import Record, Timing, speed_over, summarise
from outrider.evaluate.statistics.ratios import margin, paired_ratio
from outrider.records import PHASES, Counts

RUNS, FALSE_ALARM, COVERED = 2000, 1e-9, 0.915


def coverage(prompts: int, interval) -> int:
    """How often the interval of a paired ratio holds the true one, 1.3: prompts differ much, arms share that, noise is skewed."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(RUNS):
        tokens = rng.integers(20, 200, prompts).astype(float)
        pace = rng.lognormal(0, 0.5, prompts)
        ours, base = (tokens * pace / s * rng.gamma(20.0, 1 / 20.0, prompts) for s in (1.3, 1.0))
        low, high = interval(tokens, ours, tokens, base)
        held += low <= 1.3 <= high
    return held


def bootstrap(tokens, seconds, base_tokens, base_seconds) -> tuple[float, float]:
    """The percentile bootstrap over prompts."""
    n = len(tokens)
    pick = np.random.default_rng(1).integers(n, size=(400, n))
    rate = tokens[pick].sum(1) / seconds[pick].sum(1) * base_seconds[pick].sum(1) / base_tokens[pick].sum(1)
    low, high = np.quantile(rate, [0.025, 0.975])
    return float(low), float(high)


def ours(*arrays) -> tuple[float, float]:
    r = paired_ratio(*arrays)
    return r.low, r.high


@pytest.mark.parametrize("prompts", [5, 8, 16, 48])
def test_a_paired_ratio_is_covered_as_claimed(prompts: int) -> None:
    """Below its bound with probability 1e-9 if COVERED or more are covered: the interval is approximate."""
    assert coverage(prompts, ours) >= binom.ppf(FALSE_ALARM, RUNS, COVERED)


def test_the_percentile_bootstrap_fails_this_test() -> None:
    """Negative control."""
    assert coverage(5, bootstrap) < binom.ppf(FALSE_ALARM, RUNS, COVERED)


def test_two_independent_sets_have_welchs_interval() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 12), rng.normal(0, 3, 7)
    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert 2 * margin([a - a.mean(), b - b.mean()]) == pytest.approx(high - low)
    assert np.isnan(margin([a, b[:1]])) and margin([np.zeros(5)]) == 0


def test_runs_that_were_asked_different_things_are_not_compared() -> None:
    asked = {"prompts": "a", "temperature": 1.0, "batch": 1}
    comparable(asked, {**asked, "lengths": [0, 4]})
    comparable(asked, {})
    for change in ({"prompts": "b"}, {"temperature": 0.5}, {"batch": 2}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            comparable(asked, {**asked, **change})


# ----------------------------------------------------------------- energy
def counter(root: Path, name: str, label: str, value: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_packages_are_added_once_and_counters_may_start_again(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", "package-0", 100)
    second = counter(tmp_path, "intel-rapl:1", "package-1", 900_000)
    counter(tmp_path, "intel-rapl:0:0", "core", 10)
    counter(tmp_path, "intel-rapl:2", "psys", 10)
    meter = Meter(tmp_path)
    before = meter.read()
    counter(tmp_path, "intel-rapl:0", "package-0", 500_100)
    (second / "energy_uj").write_text("50000")
    after = meter.read()
    assert before is not None and after is not None
    assert after.joules_since(before) == pytest.approx(0.5 + 0.15)


def test_no_counters_is_said_plainly(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nothing"):
        meter = Meter(root)
        assert meter.read() is None and "no energy" in meter.absent


# ----------------------------------------------------------------- Spec-Bench
def record(arm: str, group: int, seconds: float, tokens: int, counts: Counts, repeat: int = 0) -> Record:
    text = tuple(range(tokens))
    phases = dict.fromkeys(PHASES, seconds / 4)
    return Record(
        arm, group, repeat, 0, tokens, seconds, phases, counts, 0, (Timing(0.1, seconds, tokens),), 0, (text,)
    )


def counts(accepted: list[int]) -> Counts:
    """Of steps that accepted these numbers of drafts."""
    out = Counts()
    for a in accepted:
        out.add(4, a, min(4, a + 1), 0.0, 0.0, 0.0)
    return out


def test_accept_lengths_come_back_from_the_counts() -> None:
    assert sb.accept_lengths(counts([0, 3, 4, 0, 1])) == [1, 1, 2, 4, 5]
    assert sb.accept_lengths(counts([0, 0])) == [1, 1]
    assert sb.accept_lengths(Counts()) == []


def test_spec_bench_numbers_are_those_of_its_formulas() -> None:
    """Worked by hand: means over questions of tokens over seconds; the baseline's tokens are counted again, less one."""
    questions = [sb.Question(81, "writing"), sb.Question(82, "qa"), sb.Question(83, "qa")]
    records = [
        record("plain", 0, 2.0, 10, counts([0] * 10)), record("four", 0, 1.0, 10, counts([4, 4])),
        record("plain", 1, 4.0, 20, counts([0] * 20)), record("four", 1, 1.0, 20, counts([3] * 5)),
        record("plain", 2, 8.0, 16, counts([0] * 16)), record("four", 2, 8.0, 16, counts([0] * 16)),
    ]  # fmt: skip
    found = sb.report(records, "plain", questions, lambda ids: " ".join(map(str, ids)), lambda text: len(text.split()))
    by = {s.task: s for s in found["four"]}
    assert set(by) == {"mt_bench", "qa", "overall"}
    assert by["overall"].tokens_per_second == pytest.approx((10 + 20 + 2) / 3)
    assert by["overall"].baseline_tokens_per_second == pytest.approx((9 / 2 + 19 / 4 + 15 / 8) / 3)
    assert by["overall"].speedup == pytest.approx(
        by["overall"].tokens_per_second / by["overall"].baseline_tokens_per_second
    )
    assert by["overall"].mean_accepted_tokens == pytest.approx((2 * 5 + 5 * 4 + 16) / 23)
    assert by["qa"].questions == 2 and by["mt_bench"].speedup == pytest.approx(10 / 4.5)
    # ours weighs tokens, not questions, and counts both arms alike
    assert summarise(records, "plain")[1].speedup.value == pytest.approx((46 / 10) / (46 / 14))


# ----------------------------------------------------------------- any arm over any other
def noisy(arm: str, speed: float, noise: float, tokens: int = 60) -> list[Record]:
    """20 prompts, twice each: a prompt's pace is its own in every arm, and an arm adds noise of its own."""
    pace = np.random.default_rng(3).lognormal(0, 0.6, 20)
    own = np.random.default_rng(len(arm)).lognormal(0, noise, (20, 2)) if noise else np.ones((20, 2))
    return [
        record(arm, g, tokens / speed * pace[g] * own[g, repeat], tokens, counts([1]), repeat)
        for g in range(20)
        for repeat in range(2)
    ]


def test_an_arm_is_itself() -> None:
    two = noisy("two", 2.0, 0.1)
    found = speed_over(two, two)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


def test_over_plain_is_the_speed_up_to_the_bit_and_other_figures_stay() -> None:
    records = [*noisy("plain", 1.0, 0.1), *noisy("two", 2.0, 0.1), *noisy("four", 3.0, 0.2)]
    alone, more = summarise(records, "plain"), summarise(records, "plain", ("plain", "two"))
    for before, arm in zip(alone, more, strict=True):
        assert replace(arm, against={}) == before
        assert arm.against.get("plain") == arm.speedup
    plain, two, four = more
    assert set(plain.against) == {"two"} and set(two.against) == {"plain"} and set(four.against) == {"plain", "two"}
    assert four.against["two"] == speed_over(noisy("four", 3.0, 0.2), noisy("two", 2.0, 0.1))


def test_a_known_ratio_between_two_drafters_comes_out_and_its_interval_is_paired() -> None:
    """Arms without noise of their own differ by 1.5 on every prompt: the interval has no width, though prompts differ much.

    Control: of the same arms, unpaired, the interval is wide.
    """
    records = [*noisy("plain", 1.0, 0.3), *noisy("two", 2.0, 0.0), *noisy("four", 3.0, 0.0)]
    four = summarise(records, "plain", ("two",))[2]
    found = four.against["two"]
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    shuffled = [replace(r, group=(r.group + 7) % 20) if r.arm == "two" else r for r in records]
    apart = summarise(shuffled, "plain", ("two",))[2].against["two"]
    assert apart.value == pytest.approx(1.5) and apart.low < 1.2 and apart.high > 1.8


def test_a_failed_group_is_part_of_no_comparison() -> None:
    records = [*noisy("plain", 1.0, 0.1), *noisy("two", 2.0, 0.1), *noisy("four", 3.0, 0.2)]
    broken = [replace(r, failed=1, seconds=1e3) if r.key == ("plain", 4, 1) else r for r in records]
    left = [r for r in records if (r.group, r.repeat) != (4, 1)]
    assert summarise(broken, "plain", ("two",))[2].against == summarise(left, "plain", ("two",))[2].against
    assert summarise(records, "plain", ("two",))[2].against != summarise(left, "plain", ("two",))[2].against


def test_answer_files_have_the_harness_fields_and_leave_failures_out() -> None:
    rows = sb.answers(
        [record("four", 0, 1.0, 3, counts([2])), replace(record("four", 1, 1.0, 3, counts([2])), failed=1)],
        [sb.Question(7, "rag"), sb.Question(8, "rag")], lambda ids: "abc", "four",
    )  # fmt: skip
    assert len(rows) == 1 and rows[0]["question_id"] == 7 and rows[0]["category"] == "rag"
    assert set(rows[0]["choices"][0]) == {
        "index",
        "turns",
        "decoding_steps",
        "new_tokens",
        "wall_time",
        "accept_lengths",
    }
    with pytest.raises(ConfigError, match="one question"):
        sb.answers(
            [replace(record("four", 0, 1.0, 3, counts([2])), outputs=((1,), (2,)))], [sb.Question(1, "qa")], str, "x"
        )

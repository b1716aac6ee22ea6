"""Replay of logs: against brute force over every pattern of coins, and against literal decoding of a Markov chain.

z-tests use the exact conditional variance given the texts; |z| < 6.2 has a false-alarm rate below 1e-9 each.
"""

from __future__ import annotations

import doctest
import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.theory import forecast as forecasts
from outrider.theory import logs, speedup
from outrider.theory import replay as r
from tests.theory.markov import Chain

Z = 6.2


@pytest.mark.parametrize("module", [r, logs, forecasts])
def test_doctests(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# ---------------------------------------------------------------------------- brute force
@dataclass
class Tally:
    """Counts of one run, as the engine keeps them."""

    calls: int = 0
    proposed: int = 0
    judged: int = 0
    accepted: int = 0
    rejected: int = 0
    judged_at: list[int] = field(default_factory=lambda: [0] * 32)
    accepted_at: list[int] = field(default_factory=lambda: [0] * 32)


def walk(coins: tuple[int, ...], length: int, limit: float, first_drafted: bool = False) -> Tally:
    """The engine's loop over a given text whose acceptances are given: coins[n] says whether x_n, if drafted, is kept."""
    size, n, out = len(coins), 0, Tally()
    while n < size:
        out.calls += 1
        budget = int(min(length, limit - n - 1)) if n or first_drafted else 0
        out.proposed += budget
        depth = 0
        while depth < budget and n < size:
            out.judged += 1
            out.judged_at[depth] += 1
            if not coins[n]:
                out.rejected += 1
                break
            out.accepted += 1
            out.accepted_at[depth] += 1
            depth, n = depth + 1, n + 1
        n += 1  # the correction, the bonus, or the plain token
    return out


def brute(
    accept: np.ndarray, length: int, limit: float, first_drafted: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Means of every count, variances of calls and rejections, and the law of calls, over all 2^N patterns."""
    size = len(accept)
    names = ("calls", "proposed", "judged", "accepted", "rejected")
    sums = dict.fromkeys((*names, "calls2", "rejected2"), 0.0)
    depths = np.zeros((2, length))
    pmf = np.zeros(size + 1)
    for coins in itertools.product((0, 1), repeat=size):
        weight = math.prod(a if c else 1 - a for a, c in zip(accept, coins, strict=True))
        if weight == 0:
            continue
        t = walk(coins, length, limit, first_drafted)
        for k in names:
            sums[k] += weight * getattr(t, k)
        sums["calls2"] += weight * t.calls**2
        sums["rejected2"] += weight * t.rejected**2
        depths += weight * np.array([t.judged_at[:length], t.accepted_at[:length]])
        pmf[t.calls] += weight
    out = {k: np.array(v) for k, v in sums.items()}
    return {**out, "depths": depths}, pmf


@settings(max_examples=60)
@given(
    accept=st.lists(st.sampled_from([0.0, 1.0, 0.3, 0.8, 1e-12]) | st.floats(0, 1), min_size=1, max_size=8),
    length=st.integers(1, 5),
    stopped=st.booleans(),
    room=st.integers(0, 6),
    first=st.booleans(),
)
def test_every_count_against_all_patterns_of_coins(accept, length, stopped, room, first) -> None:
    a = np.array(accept)
    with np.errstate(divide="ignore"):
        text = r.Text(np.zeros(len(a)), np.log(a), stopped=stopped, limit=len(a) + room if stopped else None)
    found = r.replay([text], length, first_drafted=first)
    want, pmf = brute(a, length, text.most, first)
    for name in ("calls", "proposed", "judged", "accepted", "rejected"):
        assert getattr(found, name)[0] == pytest.approx(float(want[name]), abs=1e-9), name
    assert found.calls_variance[0] == pytest.approx(float(want["calls2"] - want["calls"] ** 2), abs=1e-9)
    assert found.rejected_variance[0] == pytest.approx(float(want["rejected2"] - want["rejected"] ** 2), abs=1e-9)
    np.testing.assert_allclose(found.judged_at[0], want["depths"][0], atol=1e-9)
    np.testing.assert_allclose(found.accepted_at[0], want["depths"][1], atol=1e-9)
    np.testing.assert_allclose(r.calls_pmf(text, length, first_drafted=first), pmf, atol=1e-9)


def test_groups_and_padding_do_not_show() -> None:
    rng = np.random.default_rng(0)
    texts = [r.Text(*np.log(rng.uniform(0.05, 1, (2, n))), stopped=bool(n % 2)) for n in rng.integers(1, 12, 150)]
    for verification in ("token", "block"):
        together = r.replay(texts, 4, "sampled", verification)
        for i in (0, 63, 64, 149):
            alone = r.replay([texts[i]], 4, "sampled", verification)
            for name in ("calls", "calls_variance", "proposed", "judged", "accepted", "rejected", "rejected_variance"):
                assert getattr(together, name)[i] == pytest.approx(getattr(alone, name)[0], abs=1e-12)


def test_constant_acceptance_gives_the_closed_form() -> None:
    text = r.Text(np.zeros(4000), np.full(4000, math.log(0.8)))
    for length in (1, 4, 16):
        found = r.replay([text], length)
        assert found.acceptance_length == pytest.approx(speedup.tokens_per_call(0.8, length), rel=2e-3)
        np.testing.assert_allclose(found.acceptance_at, 0.8)


def test_always_and_never_accepted() -> None:
    same = r.Text(np.log([0.3] * 9), np.log([0.3] * 9))
    assert r.replay([same], 3).calls[0] == pytest.approx(3.0)  # 1 + (3 + 1) + (3 + 1)
    never = r.Text(np.log([0.3] * 9), np.full(9, -np.inf))
    for verification in ("token", "block"):
        found = r.replay([never], 3, "sampled", verification)
        assert found.calls[0] == pytest.approx(9.0)
        assert found.calls_variance[0] == pytest.approx(0.0, abs=1e-12)
    assert r.replay([never], 3).rejected[0] == pytest.approx(7.0)  # not the first token, and not the last


@given(
    ratios=st.lists(st.floats(-3, 3), min_size=1, max_size=30),
    length=st.integers(1, 8),
)
def test_block_verification_never_keeps_less(ratios, length) -> None:
    draft = np.minimum(np.array(ratios) - 3, 0)
    text = r.Text(np.full(len(ratios), -3.0), draft)
    token, block = r.survival(text, length), r.survival(text, length, "sampled", "block")
    assert (block >= token - 1e-12).all()
    assert r.replay([text], length, "sampled", "block").calls[0] <= r.replay([text], length).calls[0] + 1e-9
    # expected calls of one start cannot grow with the length
    assert r.replay([text], length + 1).calls[0] <= r.replay([text], length).calls[0] + 1 + 1e-9


# ---------------------------------------------------------------------------- literal decoding of a Markov chain
def z(observed: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """Standard score of a sum of independent counts whose conditional means and variances are known."""
    return float((observed.sum() - mean.sum()) / math.sqrt(variance.sum()))


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], tuple[list[r.Text], np.ndarray, np.ndarray]]:
    chain, out = Chain(), {}
    for drafting, verification in (("sampled", "token"), ("greedy", "token"), ("sampled", "block")):
        done = [chain.decode(20, 3, drafting, verification) for _ in range(2500)]
        texts = [chain.log(x, str(i)) for i, (x, _, _) in enumerate(done)]
        calls, rejected = (np.array([d[k] for d in done], float) for k in (1, 2))
        out[drafting, verification] = texts, calls, rejected
    return out


@pytest.mark.parametrize("way", [("sampled", "token"), ("sampled", "block")])
def test_literal_decoding_agrees(runs, way) -> None:
    texts, calls, rejected = runs[way]
    found = r.replay(texts, 3, *way)
    assert abs(z(calls, found.calls, found.calls_variance)) < Z
    assert abs(z(rejected, found.rejected, found.rejected_variance)) < Z
    # and the variance itself: squared deviations average to it (8 sd of a bounded variable's mean, by its own spread)
    squares = (calls - found.calls) ** 2 - found.calls_variance
    assert abs(squares.mean()) < 8 * squares.std() / math.sqrt(len(squares))


@pytest.mark.parametrize("way", [("sampled", "token"), ("sampled", "block")])
def test_wrong_formulas_are_seen(runs, way) -> None:
    """Negative controls: the other rule, the inverted ratio, the other length, drafts from the first token on."""
    texts, calls, _ = runs[way]
    other = "token" if way[1] == "block" else "block"
    swapped = [replace(t, target=t.draft, draft=t.target) for t in texts]
    wrong = [
        r.replay(texts, 3, "sampled", other),
        r.replay(swapped, 3, *way),
        r.replay(texts, 4, *way),
        r.replay(texts, 3, *way, first_drafted=True),
    ]
    for found in wrong:
        assert abs(z(calls, found.calls, found.calls_variance)) > Z


def test_greedy_drafts_leave_nothing_to_chance(runs) -> None:
    texts, calls, rejected = runs["greedy", "token"]
    found = r.replay(texts, 3, "greedy")
    np.testing.assert_allclose(found.calls, calls, atol=1e-9)
    np.testing.assert_allclose(found.rejected, rejected, atol=1e-9)
    np.testing.assert_allclose(found.calls_variance, 0, atol=1e-9)
    same = r.replay(texts, 3, "greedy", "block")
    np.testing.assert_allclose(same.calls, calls, atol=1e-9)


def test_variance_reduced_rejections_have_the_same_mean(runs) -> None:
    for drafting in ("sampled", "greedy"):
        texts, _, observed = runs[drafting, "token"]
        found = r.replay(texts, 3, drafting)
        gap = found.risk - observed
        assert abs(gap.mean()) < Z * gap.std() / math.sqrt(len(gap))
        assert found.risk.var() < observed.var()


def test_block_gain_is_the_enumerated_one() -> None:
    """E[kept] of one call: the mean over target paths of min-products equals the sum over draft paths of w_i."""
    chain, length = Chain(3, seed=8), 3
    paths = list(itertools.product(range(3), repeat=length))
    want = 0.0
    got = {"token": 0.0, "block": 0.0}
    token = 0.0
    for x in paths:
        path = (0, *x)
        p = [chain.p[a, b] for a, b in itertools.pairwise(path)]
        q = [chain.q[a, b] for a, b in itertools.pairwise(path)]
        weight, ratio, survive = 1.0, 1.0, 1.0
        for a, b in zip(p, q, strict=True):
            ratio = min(ratio * a / b, 1.0)
            survive *= min(1.0, a / b)
            weight *= b
            want += ratio * math.prod(q) / 1.0
            token += survive * math.prod(q)
        text = r.Text(np.log(p), np.log(q))
        for rule in ("token", "block"):
            got[rule] += math.prod(p) * r.survival(text, length, "sampled", rule)[0, 1:].sum()
    assert got["block"] == pytest.approx(want, rel=1e-12)
    assert got["token"] == pytest.approx(token, rel=1e-12)
    assert want > token + 1e-3


# ---------------------------------------------------------------------------- forecasts
def test_forecast_of_the_chain(runs) -> None:
    texts, calls, rejected = runs["sampled", "token"]
    f = forecasts.forecast(texts, lengths=range(1, 9), draft_cost=0.1)
    at3 = f.lengths[2]
    assert at3.acceptance_length.low < len(calls) * 20 / calls.sum() < at3.acceptance_length.high
    values = [a.acceptance_length.value for a in f.lengths]
    assert values == sorted(values)
    assert f.best is not None and f.best.speedup == max(a.speedup.value for a in f.lengths)
    assert f.rejections.value == pytest.approx(np.mean([t.tv.sum() for t in texts]))
    check = forecasts.compare(texts, 3, rejected.sum(), 20 * len(calls), len(calls))
    assert check.agrees
    assert not forecasts.compare(texts, 3, 1.1 * rejected.sum(), 20 * len(calls), len(calls)).agrees
    assert len(forecasts.by_position(texts)) == 20
    assert forecasts.forecast(texts[:50], lengths=(2,)).best is None


def test_interval_covers_at_its_level() -> None:
    """Ratio of sums with strongly clustered tokens: coverage of the 95% interval over 1500 repetitions of 16 prompts.

    The binomial sd at 0.95 is 0.0056; the band 0.91 .. 0.98 allows 5 sd and the jackknife's small-sample error. An interval
    that takes the texts for independent must fail it: the negative control.
    """
    rng, hits, naive, runs_ = np.random.default_rng(1), 0, 0, 1500
    clusters = [str(i // 4) for i in range(64)]
    for _ in range(runs_):
        prompt = np.repeat(rng.normal(0.6, 0.1, 16), 4)
        sizes = np.repeat(rng.integers(20, 60, 16), 4).astype(float)
        losses = sizes * (prompt + rng.normal(0, 0.03, 64))
        for names, count in ((clusters, 0), ([str(i) for i in range(64)], 1)):
            e = forecasts.clustered_ratio(losses, sizes, names)
            inside = e.low < 0.6 < e.high
            hits, naive = (hits + inside, naive) if count == 0 else (hits, naive + inside)
    assert 0.91 < hits / runs_ < 0.98
    assert naive / runs_ < 0.85


def test_domains() -> None:
    texts = [
        r.Text(np.zeros(3), np.log([a] * 3), domain=d, prompt=d + str(i))
        for d, a in (("x", 0.5), ("y", 0.9))
        for i in (1, 2)
    ]
    out = forecasts.by_domain(texts)
    assert {k: round(v.value, 12) for k, v in out.items()} == {"x": 0.5, "y": 0.1}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: r.replay([], 3), "texts must not be empty"),
        (lambda t: r.replay([t], 0), "length"),
        (lambda t: r.replay([t], 2, "greedy"), "hit must be logged"),
        (lambda t: r.replay([t], 2, "beam"), "drafting must be"),
        (lambda t: r.replay([t], 2, "sampled", "tree"), "verification must be"),
        (lambda t: r.Text(np.array([0.1]), np.array([-1.0])), "target must be finite and at most 0, got 0.1"),
        (lambda t: r.Text(np.array([-0.1]), np.array([np.nan])), "draft must be at most 0"),
        (lambda t: r.Text(np.zeros(2), np.zeros(3)), r"draft must have 2 log-probabilities"),
        (lambda t: r.Text(np.zeros(2), np.zeros(2), tv=np.zeros(1)), "tv must have 2 entries"),
        (lambda t: r.Text(np.zeros(2), np.zeros(2), limit=1), "limit must be at least"),
        (lambda t: forecasts.forecast([t], lengths=()), "lengths"),
        (lambda t: forecasts.compare([t], 2, 1, 10, 1), "at least two prompts"),
        (lambda t: forecasts.clustered_ratio([1.0], [1.0, 2.0], ["a", "b"]), "one entry per text"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(r.Text(np.zeros(2), np.zeros(2)))

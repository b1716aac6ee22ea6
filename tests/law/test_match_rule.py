"""Match: output independent of the drafter, the distribution of the race, and the closed form of its ledger."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from outrider.errors import RequestError
from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft, Proposal
from outrider.verify.match import Match, match_probability

ALPHA = 1e-9
RULE = Match()
V = 6


def one_hot(x: int) -> torch.Tensor:
    return torch.eye(V, dtype=torch.float64)[x]


class Deaf(Noise):
    """Noise that must not be listened to."""

    def exponential(self, b, depth, vocab_size, device="cpu"):
        raise AssertionError("read V-wide noise for a one-hot distribution")


class Scripted(Noise):
    """Exponentials such that token `winner` wins any race it has a real chance in."""

    def exponential(self, b, depth, vocab_size, device="cpu"):
        e = torch.ones(vocab_size, dtype=torch.float64)
        e[(self.seed[b] + depth) % vocab_size] = 1e-9
        return e


def table(seed: int, sharp: float = 1.5) -> torch.Tensor:
    """Distributions [previous token, V]."""
    return torch.softmax(torch.from_numpy(np.random.default_rng(seed).normal(size=(V, V)) * sharp), -1)


def random_draft(rng: np.random.Generator, last: int, p: torch.Tensor) -> tuple[torch.Tensor, Draft]:
    """Any forest with any tokens below an anchor `last`, and the distributions its rows have."""
    n = int(rng.integers(0, 7))
    parent = tuple(int(rng.integers(-1, k)) if k else -1 for k in range(n))
    token = torch.from_numpy(rng.integers(V, size=n))
    return p[[last, *token.tolist()]], Draft(token, parent, (n,))


@pytest.mark.parametrize("sharp", [0.0, 1.5, 60.0])
def test_same_string_as_plain_decoding_for_any_drafter(sharp):
    p = table(1, sharp)
    for seed in range(25):
        strings = []
        for drafter in range(3):
            rng = np.random.default_rng([seed, drafter])
            text = [0]
            while len(text) < 24:
                distributions, draft = random_draft(rng, text[-1], p) if drafter else (p[[text[-1]]], Draft.empty(1))
                verdict = RULE(distributions, draft, Noise((seed,), (len(text) - 1,)))
                text += [draft.tokens[k] for k in verdict.path[0]] + [verdict.next_token[0]]
            strings.append(text[:24])
        assert strings[0] == strings[1] == strings[2]


def test_accepts_the_child_the_target_draws():
    """Every winner at every depth of a full tree: the path is the string of winners, and then the next winner."""
    p = torch.full((1 + V + V * V, V), 1.0 / V, dtype=torch.float64)
    parent = (-1,) * V + tuple(k for k in range(V) for _ in range(V))
    draft = Draft(torch.arange(V + V * V) % V, parent, (V + V * V,))
    for seed in range(V):
        verdict = RULE(p, draft, Scripted((seed,), (0,)))
        tokens = [draft.tokens[k] for k in verdict.path[0]] + [verdict.next_token[0]]
        assert tokens == [(seed + d) % V for d in (1, 2, 3)]
        assert verdict.judged == (2,)
        assert verdict.risk[0] == pytest.approx(0, abs=1e-12)


def test_first_of_equal_children_and_refusal():
    p = torch.stack([one_hot(2), one_hot(0), one_hot(1), one_hot(3)])
    draft = Draft(torch.tensor([1, 2, 2]), (-1, -1, -1), (3,))
    verdict = RULE(p, draft, Deaf((0,), (0,)))
    assert (verdict.path, verdict.next_token, verdict.judged, verdict.risk) == (((1,),), (1,), (1,), (0.0,))
    verdict = RULE(p[:2], Draft(torch.tensor([5]), (-1,), (1,)), Deaf((0,), (0,)))
    assert (verdict.path, verdict.next_token, verdict.judged, verdict.risk) == (((),), (2,), (1,), (1.0,))


def test_one_hot_distributions_need_no_noise():
    p = torch.stack([one_hot(4), one_hot(1), one_hot(3)])
    q = Proposal(torch.full((1, V), 1.0 / V, dtype=torch.float64), (0,))
    verdict = RULE(p, Draft(torch.tensor([4]), (-1,), (1, 0), q), Deaf((0, 1), (0, 0)))
    assert verdict.path == ((0,), ())
    assert verdict.next_token == (3, 1)
    assert verdict.risk[0] == pytest.approx(1 - 1 / V)


def test_nearly_one_hot_is_not_one_hot():
    p = torch.tensor([[1.0, 1e-8, 0, 0, 0, 0]], dtype=torch.float64)

    class Second(Noise):
        def exponential(self, b, depth, vocab_size, device="cpu"):
            return torch.tensor([1.0, 1e-12, 1e-300, 1, 1, 1], dtype=torch.float64)

    assert RULE(p, Draft.empty(1), Second((0,), (0,))).next_token == (1,)


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_a_distribution_without_mass_is_refused(bad):
    with pytest.raises(RequestError, match="sequence 0"):
        RULE(torch.full((1, V), bad), Draft.empty(1), Noise((0,), (0,)))


def race_counts(p: torch.Tensor, draws: int, noise: type = Noise) -> np.ndarray:
    counts = np.zeros(V)
    for seed in range(draws):
        counts[RULE(p, Draft.empty(1), noise((seed,), (7,))).next_token[0]] += 1
    return counts


def test_race_has_the_targets_distribution():
    """Chi-square of 8,000 draws at 1e-9; the control shifts 15% of the mass and is rejected."""
    p = table(2)[:1]
    counts = race_counts(p, 8_000)
    want = p[0].numpy() * counts.sum()
    bound = chi2.isf(ALPHA, V - 1)
    assert ((counts - want) ** 2 / want).sum() < bound
    tilted = 0.85 * want + 0.15 * counts.sum() / V
    assert ((counts - tilted) ** 2 / tilted).sum() > bound


distribution = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-9]), st.floats(0, 1)), min_size=V, max_size=V)
distributions = distribution.filter(lambda w: sum(w) > 1e-3).map(lambda w: np.array(w) / sum(w))


def brute_force(p: np.ndarray, q: np.ndarray) -> float:
    both = [x for x in range(len(p)) if p[x] > 0 and q[x] > 0]
    with np.errstate(over="ignore"):  # a subnormal in the denominator: infinity is the right value of the ratio
        return sum(1.0 / sum(max(p[y] / p[x], q[y] / q[x]) for y in range(len(p))) for x in both)


@settings(max_examples=150)
@given(distributions, distributions)
def test_match_probability_against_brute_force_and_bounds(p, q):
    value = match_probability(torch.from_numpy(p), torch.from_numpy(q))
    assert value == pytest.approx(brute_force(p, q), abs=1e-12)
    distance = float(np.abs(p - q).sum() / 2)
    assert (1 - distance) / (1 + distance) - 1e-12 <= value <= 1 - distance + 1e-12
    assert match_probability(torch.from_numpy(p), torch.from_numpy(p)) == pytest.approx(1, abs=1e-12)


def test_match_probability_against_simulation():
    """200,000 shared races; |z| < 6 is 2e-9."""
    rng = np.random.default_rng(3)
    for seed in range(3):
        p, q = table(seed)[0].numpy(), table(seed + 10)[0].numpy()
        e = rng.exponential(size=(200_000, V))
        seen = ((p / e).argmax(1) == (q / e).argmax(1)).mean()
        value = match_probability(torch.from_numpy(p), torch.from_numpy(q))
        assert abs(seen - value) < 6 * np.sqrt(value * (1 - value) / len(e))


def coupled(noise, q: torch.Tensor, last: int, length: int) -> list[int]:
    """A chain drawn with the request's own race, as a drafter paired with Match draws."""
    out: list[int] = []
    for d in range(1, length + 1):
        out.append(int((q[last] / noise.exponential(0, d, V)).argmax()))
        last = out[-1]
    return out


@pytest.mark.parametrize("kind", ["coupled", "points", "tree"])
def test_ledger_is_a_martingale(kind):
    """sum(risk - rejections) / sqrt(sum spread) is standard normal to first order: |z| < 6 (2e-9), and the control fails."""
    p, q = table(4), table(5)
    rng = np.random.default_rng(6)
    excess = spread = wrong = 0.0
    for seed in range(2500):
        noise, last = Noise((seed,), (0,)), int(rng.integers(V))
        if kind == "coupled":
            token = coupled(noise, q, last, 3)
            rows = [last, *token[:-1]]
            draft = Draft(torch.tensor(token), (-1, 0, 1), (3,), Proposal(q, tuple(rows)))
        elif kind == "points":
            token = rng.integers(V, size=4).tolist()
            draft = Draft(torch.tensor(token), (-1, -1, 0, 0), (4,))
        else:
            token = [*(q[last] / noise.exponential(0, 1, V)).topk(2).indices.tolist(), int(rng.integers(V))]
            draft = Draft(torch.tensor(token), (-1, -1, 0), (3,), Proposal(q, (last, last, POINT_MASS)))
        verdict = RULE(p[[last, *token]], draft, noise)
        rejected = verdict.judged[0] - verdict.accepted[0]
        excess += verdict.risk[0] - rejected
        spread += verdict.spread[0]
        wrong += verdict.judged[0] * 0.05
    assert abs(excess) < norm.isf(1e-9) * np.sqrt(spread)
    assert abs(excess + wrong) > norm.isf(1e-9) * np.sqrt(spread), (
        "a ledger that is 0.05 too high per position is noticed"
    )

"""What rules and noise must hold, as checks that raise: the mutants of `test_mutants.py` are each killed by one of them.

They are the distribution suite's own methods at a small size: exact enumeration (`lab`), coins at the ends of their range, and
decoding with the engine's noise.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from outrider.noise import Noise
from outrider.types import Draft, Proposal
from outrider.verify import native
from outrider.verify.block import overlap_sums
from outrider.verify.match import Match, match_probability
from outrider.verify.numerics import as_weights, draw
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import examine
from tests.law.worlds import Shape, Siblings, chain, random_world

ALPHA = 1e-9
V, LENGTH = 3, 4
RULE, RACES = SpeculativeSampling(), Match()


def chains() -> None:
    """Output distribution of chains, by enumeration: distributions, point masses, both."""
    rng = np.random.default_rng(1)
    shapes = [chain(1), chain(2), chain(3), Shape((-1, 0), (True, False)), chain(2, has_q=False)]
    found = examine(RULE, [random_world(rng, V, shape) for shape in shapes for _ in range(6)], rng)
    assert found.distribution.max() < 1e-12


def support() -> None:
    """Output distribution and ledger of chains drawn from a draft vocabulary."""
    rng = np.random.default_rng(2)
    found = examine(RULE, [random_world(rng, 4, chain(2), np.array([2, 0, 3])) for _ in range(6)], rng)
    assert max(found.distribution.max(), found.ledger.max()) < 1e-12


def forest_worlds(rng: np.random.Generator, siblings: Siblings) -> list:
    two = Shape((-1, -1, 1), (True,) * 3, siblings)
    mixed = Shape((-1, -1, -1), (True, False, True), siblings)
    points = Shape((-1, -1, -1, 0), (False,) * 4, siblings)
    return [random_world(rng, V, shape, full=True) for shape in (two, mixed, points) for _ in range(6)]


def trees() -> None:
    """Output distribution of forests, by enumeration: i.i.d. siblings, without replacement, point masses, mixtures."""
    rng = np.random.default_rng(3)
    for worlds in (forest_worlds(rng, "iid"), forest_worlds(rng, "without_replacement")):
        assert examine(RULE, worlds, rng).distribution.max() < 1e-12


def ledger() -> None:
    """E[risk - rejections] = 0 and E[(risk - rejections)^2] = E[spread], by enumeration."""
    rng = np.random.default_rng(4)
    worlds = [random_world(rng, V, shape) for shape in (chain(2), chain(2, has_q=False)) for _ in range(6)]
    for batch in (worlds, forest_worlds(rng, "iid"), forest_worlds(rng, "without_replacement")):
        found = examine(RULE, batch, rng)
        assert max(found.ledger.max(), found.spread.max()) < 1e-12


def ends() -> None:
    """Coins of exactly 0 and 1, and near them, never draw a column without weight."""
    for width in (5, 5000):
        rows = torch.zeros(1, width, dtype=torch.float64)
        rows[0, [2, width - 2]] = 0.5
        for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0):
            token, _ = draw(as_weights(rows), [u])
            assert rows[0, int(token)] > 0


def long_rows() -> None:
    """A row of several blocks is drawn from by its inverse CDF."""
    p = np.random.default_rng(5).dirichlet(np.ones(5000))
    cells = np.arange(0, 5000, 97)
    middle = (np.cumsum(p) - p / 2)[cells]
    token, _ = draw(as_weights(torch.from_numpy(p)[None].repeat(len(cells), 1)), middle.tolist())
    assert token.tolist() == cells.tolist()


def decoding() -> None:
    """Joint distribution of four tokens over several steps, with the engine's noise in every lane: chains, then i.i.d. siblings."""
    for width, sequences in ((1, 4000), (2, 700)):
        p, q = markov(6), markov(7)
        text = decode(p, q, sequences, width)
        counts = np.zeros((V,) * LENGTH)
        np.add.at(counts, tuple(np.array(text).T), 1)
        want = p[0][:, None] * p
        for _ in range(LENGTH - 2):
            want = want[..., None] * p
        expected = want.ravel() * sequences
        few = expected < 5
        cells = [
            *zip(expected[~few], counts.ravel()[~few], strict=True),
            (expected[few].sum(), counts.ravel()[few].sum()),
        ]
        value = sum((seen - e) ** 2 / e for e, seen in cells if e >= 5)
        assert value < chi2.isf(ALPHA, len(cells) - 1)


def independence() -> None:
    """Coins of two siblings are independent and uniform in every lane: chi-square of 1,500 pairs in 4 x 4 cells."""
    noise = Noise(tuple(range(1500)), (7,) * 1500)
    for lane in ("accept", "draft"):
        counts = np.zeros((4, 4))
        for b in range(1500):
            counts[int(4 * noise.uniform(b, 1, lane, 0)), int(4 * noise.uniform(b, 1, lane, 1))] += 1
        expected = 1500 / 16
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(ALPHA, 15)


def matching() -> None:
    """Match: strings of plain decoding whatever is proposed, the distribution of its race, and the closed form of its ledger."""
    p = torch.from_numpy(markov(8, 0.4))
    strings = np.zeros((V, V))
    for seed in range(800):
        text, rng = [0], np.random.default_rng(seed)
        while len(text) < 3:
            last, at = text[-1], Noise((seed,), (len(text) - 1,))
            text.append(RACES(p[[last]], Draft.empty(1), at).next_token[0])
        strings[text[1], text[2]] += 1
        token = rng.integers(V, size=3).tolist()
        distributions, draft = p[[0, *token]], Draft(torch.tensor(token), (-1, -1, 0), (3,))
        verdict = RACES(distributions, draft, Noise((seed,), (0,)))
        emitted = [draft.tokens[k] for k in verdict.path[0]] + [verdict.next_token[0]]
        assert emitted[: len(text) - 1] == text[1 : 1 + len(emitted)]
    want = (p[0][:, None] * p).numpy() * 800
    assert ((strings - want) ** 2 / want).sum() < chi2.isf(ALPHA, V * V - 1)
    one_and_many = torch.tensor([[0.5] + [0.5 / 20] * 20], dtype=torch.float64)
    races = [RACES(one_and_many, Draft.empty(1), Noise((s,), (3,))).next_token[0] for s in range(400)]
    assert abs(races.count(0) - 200) < norm.isf(ALPHA) * 10
    for a, b in ((p[0], p[1]), (p[1], p[2])):
        direct = sum(1 / sum(max(a[y] / a[x], b[y] / b[x]) for y in range(V)) for x in range(V))
        assert abs(match_probability(a, b) - float(direct)) < 1e-12


def long_draws() -> None:
    """A native draw from rows of several blocks is the inverse CDF of (w p - q)_+."""
    rng = np.random.default_rng(12)
    for size in (7, 1024, 5001):
        p, q = (torch.from_numpy(rng.dirichlet(np.full(size, 0.3))).unsqueeze(0) for _ in range(2))
        for w, distribution in ((1.0, None), (1.0, q), (0.7, q)):
            weight = (w * p[0] - (0 if distribution is None else distribution[0])).clamp(min=0).numpy()
            cdf = np.cumsum(weight)
            for u in (0.0, 0.1, 0.35, 0.999, 1.0, *rng.random(20)):
                found = native.draw(p, distribution, w, u)
                assert found is not None
                assert found[1] == pytest.approx(cdf[-1], rel=1e-12)
                assert weight[found[0]] > 0
                assert cdf[found[0]] - weight[found[0]] - 1e-12 <= u * cdf[-1] <= cdf[found[0]] + 1e-12


def long_overlaps() -> None:
    """Native sums over rows with and without a rest behind the last vector are the twin's."""
    rng = np.random.default_rng(13)
    for size, dtype, close in ((3, torch.float64, 1e-13), (4100, torch.float64, 1e-13), (4100, torch.float32, 1e-6)):
        p, q = (torch.from_numpy(rng.dirichlet(np.full(size, 0.5))).to(dtype).unsqueeze(0) for _ in range(2))
        q[0, rng.integers(size)] = 0
        for w in (1.0, 0.4):
            found = native.overlap(p, q, w)
            assert found is not None
            assert found == pytest.approx(overlap_sums(p * w, q, None), rel=close)


def markov(seed: int, alpha: float = 1.0) -> np.ndarray:
    """A table of distributions [previous token, V]; a smaller alpha makes them sharper."""
    return np.random.default_rng(seed).dirichlet(np.full(V, alpha), size=V)


def decode(p: np.ndarray, q: np.ndarray, sequences: int, width: int) -> list[list[int]]:
    """LENGTH tokens after token 0 for each seed; each step proposes two nodes: a chain (width 1) or siblings (width 2)."""
    texts = [[0] for _ in range(sequences)]
    target, distributions, cdf = torch.from_numpy(p), torch.from_numpy(q), q.cumsum(-1)
    while live := [b for b in range(sequences) if len(texts[b]) <= LENGTH]:
        noise = Noise(tuple(live), tuple(len(texts[b]) - 1 for b in live))
        token, row, parent = [], [], []
        for i, b in enumerate(live):
            last = texts[b][-1]
            for j in range(2):
                depth, sibling = (j + 1, 0) if width == 1 else (1, j)
                row.append(last)
                token.append(min(int((cdf[last] <= noise.uniform(i, depth, "draft", sibling)).sum()), V - 1))
                parent.append(-1 if j == 0 or width == 2 else len(token) - 2)
                last = token[-1] if width == 1 else last
        draft = Draft(torch.tensor(token), tuple(parent), (2,) * len(live), Proposal(distributions, tuple(row)))
        verdict = RULE(target[[*(texts[b][-1] for b in live), *token]], draft, noise)
        for i, b in enumerate(live):
            texts[b] += [token[k] for k in verdict.path[i]] + [verdict.next_token[i]]
    return [text[1 : 1 + LENGTH] for text in texts]


CHECKS = (chains, support, trees, ledger, ends, long_rows, decoding, independence, matching)

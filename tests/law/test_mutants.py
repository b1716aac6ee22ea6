"""EX-11 at the level of a rule: every planted mistake is killed by the law check that its row names, and honesty passes all.

A mutant is a textual patch of the sources, so the table can only be out of date loudly. The checks are the law suite's own
methods at a small size: exact enumeration (`lab`), coins at the ends of their range, and decoding with the engine's noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from outrider.types import Draft, Proposal
from outrider.verify import native
from outrider.verify.block import overlap_sums
from tests.law.lab import Shape, Siblings, chain, examine, random_world
from tests.law.subject import Patch, Subject, load

ALPHA = 1e-9
V, LENGTH = 3, 4


# ----------------------------------------------------------------- the checks: each raises for a subject that breaks a law
def chains(subject: Subject) -> None:
    """Output law of chains, by enumeration: laws, point masses, both."""
    rng = np.random.default_rng(1)
    shapes = [chain(1), chain(2), chain(3), Shape((-1, 0), (True, False)), chain(2, law=False)]
    found = examine(subject.rule, [random_world(rng, V, shape) for shape in shapes for _ in range(6)], rng)
    assert found.law.max() < 1e-12


def support(subject: Subject) -> None:
    """Output law and ledger of chains drawn from a draft vocabulary."""
    rng = np.random.default_rng(2)
    found = examine(subject.rule, [random_world(rng, 4, chain(2), np.array([2, 0, 3])) for _ in range(6)], rng)
    assert max(found.law.max(), found.ledger.max()) < 1e-12


def forest_worlds(rng: np.random.Generator, siblings: Siblings) -> list:
    two = Shape((-1, -1, 1), (True,) * 3, siblings)
    mixed = Shape((-1, -1, -1), (True, False, True), siblings)
    points = Shape((-1, -1, -1, 0), (False,) * 4, siblings)
    return [random_world(rng, V, shape, full=True) for shape in (two, mixed, points) for _ in range(6)]


def trees(subject: Subject) -> None:
    """Output law of forests, by enumeration: i.i.d. siblings, without replacement, point masses, mixtures."""
    rng = np.random.default_rng(3)
    for worlds in (forest_worlds(rng, "iid"), forest_worlds(rng, "without_replacement")):
        assert examine(subject.rule, worlds, rng).law.max() < 1e-12


def ledger(subject: Subject) -> None:
    """E[risk - rejections] = 0 and E[(risk - rejections)^2] = E[spread], by enumeration."""
    rng = np.random.default_rng(4)
    worlds = [random_world(rng, V, shape) for shape in (chain(2), chain(2, law=False)) for _ in range(6)]
    for batch in (worlds, forest_worlds(rng, "iid"), forest_worlds(rng, "without_replacement")):
        found = examine(subject.rule, batch, rng)
        assert max(found.ledger.max(), found.spread.max()) < 1e-12


def ends(subject: Subject) -> None:
    """Coins of exactly 0 and 1, and near them, never draw a column without weight."""
    for width in (5, 5000):
        rows = torch.zeros(1, width, dtype=torch.float64)
        rows[0, [2, width - 2]] = 0.5
        for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0):
            token, _ = subject.draw(subject.as_weights(rows), [u])
            assert rows[0, int(token)] > 0


def long_rows(subject: Subject) -> None:
    """A row of several blocks is drawn from by its inverse CDF."""
    p = np.random.default_rng(5).dirichlet(np.ones(5000))
    cells = np.arange(0, 5000, 97)
    middle = (np.cumsum(p) - p / 2)[cells]
    token, _ = subject.draw(subject.as_weights(torch.from_numpy(p)[None].repeat(len(cells), 1)), middle.tolist())
    assert token.tolist() == cells.tolist()


def decoding(subject: Subject) -> None:
    """Joint law of four tokens over several steps, with the engine's noise in every lane: chains, then i.i.d. siblings."""
    for width, sequences in ((1, 4000), (2, 700)):
        p, q = markov(6), markov(7)
        text = decode(subject, p, q, sequences, width)
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


def independence(subject: Subject) -> None:
    """Coins of two siblings are independent and uniform in every lane: chi-square of 1,500 pairs in 4 x 4 cells."""
    noise = subject.noise(tuple(range(1500)), (7,) * 1500)
    for lane in ("accept", "draft"):
        counts = np.zeros((4, 4))
        for b in range(1500):
            counts[int(4 * noise.uniform(b, 1, lane, 0)), int(4 * noise.uniform(b, 1, lane, 1))] += 1
        expected = 1500 / 16
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(ALPHA, 15)


def matching(subject: Subject) -> None:
    """Match: strings of plain decoding whatever is proposed, the law of its race, and the closed form of its ledger."""
    p = torch.from_numpy(markov(8, 0.4))
    strings = np.zeros((V, V))
    for seed in range(800):
        text, rng = [0], np.random.default_rng(seed)
        while len(text) < 3:
            last, at = text[-1], subject.noise((seed,), (len(text) - 1,))
            text.append(subject.match(p[[last]], Draft.empty(1), at).next_token[0])
        strings[text[1], text[2]] += 1
        token = rng.integers(V, size=3).tolist()
        laws, draft = p[[0, *token]], Draft(torch.tensor(token), (-1, -1, 0), (3,))
        verdict = subject.match(laws, draft, subject.noise((seed,), (0,)))
        emitted = [draft.tokens[k] for k in verdict.path[0]] + [verdict.next_token[0]]
        assert emitted[: len(text) - 1] == text[1 : 1 + len(emitted)]
    want = (p[0][:, None] * p).numpy() * 800
    assert ((strings - want) ** 2 / want).sum() < chi2.isf(ALPHA, V * V - 1)
    one_and_many = torch.tensor([[0.5] + [0.5 / 20] * 20], dtype=torch.float64)
    races = [subject.match(one_and_many, Draft.empty(1), subject.noise((s,), (3,))).next_token[0] for s in range(400)]
    assert abs(races.count(0) - 200) < norm.isf(ALPHA) * 10
    for a, b in ((p[0], p[1]), (p[1], p[2])):
        direct = sum(1 / sum(max(a[y] / a[x], b[y] / b[x]) for y in range(V)) for x in range(V))
        assert abs(subject.match_probability(a, b) - float(direct)) < 1e-12


def long_draws(subject: Subject) -> None:
    """A native draw from rows of several blocks is the inverse CDF of (w p - q)_+."""
    rng = np.random.default_rng(12)
    for size in (7, 1024, 5001):
        p, q = (torch.from_numpy(rng.dirichlet(np.full(size, 0.3))).unsqueeze(0) for _ in range(2))
        for w, law in ((1.0, None), (1.0, q), (0.7, q)):
            weight = (w * p[0] - (0 if law is None else law[0])).clamp(min=0).numpy()
            cdf = np.cumsum(weight)
            for u in (0.0, 0.1, 0.35, 0.999, 1.0, *rng.random(20)):
                found = native.draw(p, law, w, u)
                assert found is not None
                assert found[1] == pytest.approx(cdf[-1], rel=1e-12)
                assert weight[found[0]] > 0
                assert cdf[found[0]] - weight[found[0]] - 1e-12 <= u * cdf[-1] <= cdf[found[0]] + 1e-12


def long_overlaps(subject: Subject) -> None:
    """Native sums over rows with and without a rest behind the last vector are the twin's."""
    rng = np.random.default_rng(13)
    for size, dtype, close in ((3, torch.float64, 1e-13), (4100, torch.float64, 1e-13), (4100, torch.float32, 1e-6)):
        p, q = (torch.from_numpy(rng.dirichlet(np.full(size, 0.5))).to(dtype).unsqueeze(0) for _ in range(2))
        q[0, rng.integers(size)] = 0
        for w in (1.0, 0.4):
            found = native.overlap(p, q, w)
            assert found is not None
            assert found == pytest.approx(overlap_sums(p * w, q, None), rel=close)


CHECKS = (chains, support, trees, ledger, ends, long_rows, decoding, independence, matching)


def markov(seed: int, alpha: float = 1.0) -> np.ndarray:
    """A table of laws [previous token, V]; a smaller alpha makes them sharper."""
    return np.random.default_rng(seed).dirichlet(np.full(V, alpha), size=V)


def decode(subject: Subject, p: np.ndarray, q: np.ndarray, sequences: int, width: int) -> list[list[int]]:
    """LENGTH tokens after token 0 for each seed; each step proposes two nodes: a chain (width 1) or siblings (width 2)."""
    texts = [[0] for _ in range(sequences)]
    target, laws, cdf = torch.from_numpy(p), torch.from_numpy(q), q.cumsum(-1)
    while live := [b for b in range(sequences) if len(texts[b]) <= LENGTH]:
        noise = subject.noise(tuple(live), tuple(len(texts[b]) - 1 for b in live))
        token, row, parent = [], [], []
        for i, b in enumerate(live):
            last = texts[b][-1]
            for j in range(2):
                depth, sibling = (j + 1, 0) if width == 1 else (1, j)
                row.append(last)
                token.append(min(int((cdf[last] <= noise.uniform(i, depth, "draft", sibling)).sum()), V - 1))
                parent.append(-1 if j == 0 or width == 2 else len(token) - 2)
                last = token[-1] if width == 1 else last
        draft = Draft(torch.tensor(token), tuple(parent), (2,) * len(live), Proposal(laws, tuple(row)))
        verdict = subject.rule(target[[*(texts[b][-1] for b in live), *token]], draft, noise)
        for i, b in enumerate(live):
            texts[b] += [token[k] for k in verdict.path[i]] + [verdict.next_token[i]]
    return [text[1 : 1 + LENGTH] for text in texts]


# ----------------------------------------------------------------- the mistakes
SCALE = "(qx[k] if c.is_mass(qx[k]) else 1.0) < px[k]"
COIN = f'if not noise.uniform(b, d + 1, "accept") * {SCALE}:'
INTEGRATED = "len(before) == len(children) and len(rows) == 1 and"
ONE_HOT = "if top >= 1.0 and len(only := p.nonzero()) == 1:"
WRONG_COLUMNS = "weight.index_add_(1, support.sort()[0],"
CUT = "torch.searchsorted(cumulative, level * total, right=True)"
MUTANTS = [  # name, file, text, mistake, the check that kills it
    ("chain: accepts every draft", "chain", COIN, "if False:", chains),
    ("chain: inverted ratio", "chain", COIN, COIN.replace(SCALE, "px[k] < qx[k]"), chains),
    ("chain: compares with p only", "chain", SCALE, "1.0 < px[k]", chains),
    ("chain: acceptance coin picks the residual", "chain", 'accepted + 1, "final")', 'accepted + 1, "accept")', chains),
    ("chain: judged by its own row", "chain", "(p, draft.parent_rows,", "(p, [draft.row(0, k) for k in range(n)],", chains),
    ("chain: judged by the anchor", "chain", "(p, draft.parent_rows,", "(p, [draft.sequence_of_row[r] for r in draft.parent_rows],", chains),
    ("chain: bonus from the row before", "chain", "nodes[accepted - 1] if accepted else -1)", "nodes[accepted - 1] - 1 if accepted else -1)", chains),
    ("chain: residual of the refused row", "chain", "nodes[accepted - 1] if accepted else -1)", "nodes[accepted] if accepted < len(nodes) else nodes[-1])", chains),
    ("chain: residual with another node's law", "chain", "draft.q, draft.q.row[k], w", "draft.q, draft.q.row[nodes[0]], w", chains),
    ("chain: residual drawn from p", "chain", "    elif draft.q is not None and", "    elif False and", chains),
    ("chain: refused point mass stays in", "chain", "c.draw_without(here, draft.tokens[k], u)", "c.draw_one(here, u)", chains),
    ("chain: last token of a neighbour", "chain", "noise, b, accepted[b], 1.0, qx) for b in", "noise, 0, accepted[0], 1.0, qx) for b in", chains),
    ("chain: rejection not counted as judged", "chain", "judged = nodes[: n + 1]", "judged = nodes[:n]", ledger),
    ("chain: unjudged nodes in the ledger", "chain", "judged = nodes[: n + 1]", "judged = nodes", ledger),
    ("chain: risk from the next row", "chain", "p[row : row + 1], draft.q.probs", "p[row + 1 : row + 2], draft.q.probs", ledger),
    ("chain: risk with another law", "chain", "draft.q.probs[law : law + 1]", "draft.q.probs[:1]", ledger),
    ("residual |p - q|", "numerics", "weight.clamp_(min=0)", "weight.abs_()", chains),
    ("residual not normalised", "numerics", CUT, f"({CUT.replace(' * total', '')}).clamp(max=weight.shape[1] - 1)", chains),
    ("residual by argmax", "numerics", f"{CUT}.squeeze(1)", "weight.argmax(1)", chains),
    ("draw: coin 0 takes the first column", "numerics", CUT, CUT.replace("True", "False"), ends),
    ("draw: coin 1 runs past the last column", "numerics", "min(x, BELOW_ONE) for x in u", "x for x in u", ends),
    ("draw: long rows forget earlier blocks", "numerics", "- cumulative.gather(1, block) + mass.gather(1, block)", "", long_rows),
    ("draw: block number dropped", "numerics", "block * BLOCK + torch", "torch", long_rows),
    ("draft vocabulary ignored in the residual", "numerics", "weight.index_add_(1, support,", WRONG_COLUMNS, support),
    ("draft vocabulary lost in the overlap", "numerics", "else p.index_select(1, support)", "else p[:, : len(support)]", support),
    ("ledger: overlap is a maximum", "numerics", "torch.minimum(p if", "torch.maximum(p if", ledger),
    ("ledger: variance is the mean", "numerics", "r * (1.0 - r) for r", "r for r", ledger),
    ("tree: sibling order ignored", "tree", "for k in children:", "for k in reversed(children):", trees),
    ("tree: residual mass ignored", "tree", "mass = float(c.row_sums(weight))", "mass = 1.0", trees),
    ("tree: drawn sibling stays in its law", "tree", "law[0, column] = 0", "pass", trees),
    ("tree: law not normalised after a draw", "tree", "law / rest if rest > 0 else law", "law", trees),
    ("tree: i.i.d. read as without replacement", "tree", 'if self.siblings == "iid":', 'if self.siblings != "iid":', trees),
    ("tree: siblings share a coin", "tree", '"accept", j) * scale', '"accept", 0) * scale', trees),
    ("tree: stays at the anchor's row", "tree", "row = draft.row(b, taken)", "row = b", trees),
    ("tree: all refused, drawn from p", "tree", "rest = nodes.rest", "pass", trees),
    ("tree: refused point mass stays in", "tree", "weight[0, x] = 0", "pass", trees),
    ("tree: bonus from the parent's row", "tree", "rest = p[row : row + 1]\n    u =", "pass\n    u =", trees),
    ("tree: risk of the first sibling only", "tree", "math.prod(before if integrated else given)", "(before or given)[0]", ledger),
    ("tree: integrated risk without replacement", "tree", '(len(children) == 1 or laws.siblings == "iid")', "True", ledger),
    ("tree: point masses left out of the risk", "tree", INTEGRATED, "bool(before) and", ledger),
    ("noise: draft and accept share a lane", "noise", '"draft": 3', '"draft": 1', decoding),
    ("noise: accept and final share a lane", "noise", '"final": 2', '"final": 1', decoding),
    ("noise: depth ignored", "noise", "self.position[b], depth, index)", "self.position[b], 0, index)", decoding),
    ("noise: stale between steps", "noise", "self.position[b], depth, index)", "0, depth, index)", decoding),
    ("noise: siblings not separated", "noise", "depth, index)", "depth, 0)", independence),
    ("noise: one seed for all", "noise", "uniform(self.seed[b], LANES", "uniform(0, LANES", decoding),
    ("match: race turned round", "match", "score = p / noise", "score = p * noise", matching),
    ("match: greedy above one half", "match", ONE_HOT, "if top >= 0.5 and len(only := (p == top).nonzero()) == 1:", matching),
    ("match: accepts the first child", "match", "if draft.tokens[k] == x", "if k >= 0", matching),
    ("match: depth ignored", "match", "noise, b, len(path) + 1)", "noise, b, 1)", matching),
    ("match: noise of the anchor at every depth", "noise", "self.position[b] + depth)", "self.position[b])", matching),
    ("match: ratios the wrong way round", "match", "smaller * q + larger * p", "smaller * p + larger * q", matching),
]  # fmt: skip


# The same rules where a compiler is: the Python around the native passes, and the passes themselves.
NATIVE_MUTANTS = [
    ("native chain: acceptance coin picks the residual", "chain", 'accepted + 1, "final")', 'accepted + 1, "accept")', chains),
    ("native chain: residual drawn from p", "chain", "    elif draft.q is not None and", "    elif False and", chains),
    ("native chain: refused point mass stays in", "chain", "c.draw_without(here, draft.tokens[k], u)", "c.draw_one(here, u)", chains),
    ("native chain: last token from the anchor", "chain", "here, k = p[row : row + 1]", "here, k = p[b : b + 1]", chains),
    ("native chain: risk from the next row", "chain", "p[row : row + 1], draft.q.probs", "p[row + 1 : row + 2], draft.q.probs", ledger),
    ("native chain: risk with another law", "chain", "draft.q.probs[law : law + 1]", "draft.q.probs[:1]", ledger),
]  # fmt: skip
CXX_MUTANTS = [
    ("residual |p - q|", "return x > 0 ? x : 0.0;", "return x > 0 ? x : -x;", chains),
    ("residual not normalised", "double left = u * *total;", "double left = u;", chains),
    ("the residual's q is left out", "(q ? static_cast<double>(q[i]) : 0.0)", "0.0", chains),
    ("blocks before the last are forgotten", "at = static_cast<int64_t>(b) * BLOCK", "at = 0", long_draws),
    ("overlap is a maximum", "both = here < q[i] ? here : q[i];", "both = here < q[i] ? q[i] : here;", ledger),
    ("vector overlap is a maximum", "return a < b ? a : b;", "return a < b ? b : a;", long_overlaps),
]  # fmt: skip


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native passes: the twins that a GPU, or a machine without a compiler, runs."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")


@cache
def honest() -> Subject:
    return load()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_honest_rules_pass(check):
    check(honest())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_honest_rules_pass_on_torch_alone(check, torch_only):
    check(honest())


@pytest.mark.parametrize("check", [long_draws, long_overlaps])
def test_the_native_passes_are_honest(check):
    check(honest())


def test_the_table_is_large_and_uses_every_check():
    assert len(MUTANTS) >= 30
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS)
    assert {check for *_, check in MUTANTS} == set(CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_is_killed(mutant, torch_only):
    _, file, old, new, check = mutant
    subject = load(Patch(file, old, new))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(subject)


@pytest.mark.skipif(not native.serve(torch.zeros(1)), reason="needs a C++ compiler")
@pytest.mark.parametrize("mutant", NATIVE_MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_beside_native_passes_is_killed(mutant):
    _, file, old, new, check = mutant
    subject = load(Patch(file, old, new))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(subject)


@pytest.mark.skipif(not native.serve(torch.zeros(1)), reason="needs a C++ compiler")
@pytest.mark.parametrize("mutant", CXX_MUTANTS, ids=lambda mutant: mutant[0])
def test_mutant_of_the_native_passes_is_killed(mutant, tmp_path, monkeypatch):
    _, old, new, check = mutant
    source = (native.PASSES.folder / native.PASSES.sources[0]).read_text()
    assert source.count(old) == 1
    (tmp_path / "passes.cpp").write_text(source.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PASSES", replace(native.PASSES, folder=tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        with pytest.raises(AssertionError):
            check(honest())
    finally:
        native.library.cache_clear()

"""EX-4: what a draft model draws is distributed as the distributions it returns, and these are the request's own.

Draws through the public API, many sequences a call, V = 9; false-alarm probability 1e-9 per assertion. 25,600 draws
from one distribution for each of four sets of parameters (a total-variation error of 3% is seen with probability 0.999; nightly
102,400 draws and 1.5%), and 6,000 trees of two levels for every way to draw (6% in the joint distribution; coupled ones 300, with
102,400 races on their own). Besides, every token is recomputed from the returned row
and the noise: a row that is not the very tensor drawn from fails without any statistics (reliability bugs 2, 3, 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.tree import draws as tree_draws
from outrider.models.toy import TableTarget, TinyLM
from outrider.sampling.pipeline import LogitsPipeline
from outrider.transfer import fetch
from outrider.types import Draft, Evidence
from tests.drafters.drafting import evidence, view

ALPHA = 1e-9
V = 9
MODEL = TableTarget.random(V, seed=1, positions=4, sharp=1.5)
TEXT = [3, 5]
GRID = {
    "temperature 1": {},
    "cold, top-k": {"temperature": 0.7, "top_k": 4},
    "hot, min-p": {"temperature": 1.4, "min_p": 0.05},
    "top-p, penalties, bias": {
        "top_p": 0.9, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "logit_bias": {2: 1.0, 4: -100.0},
    },
}  # fmt: skip
CASES = {
    "chain": ({}, {"top_p": 0.9, "repetition_penalty": 1.5}),
    "coupled": ({"sample": "coupled"}, {"min_p": 0.03}),
    "iid tree": ({"branching": (2, 2)}, {"temperature": 1.2}),
    "tree without replacement": ({"branching": (3, 1), "siblings": "without_replacement"}, {"top_k": 5}),
    "coupled tree": ({"branching": (2, 1), "sample": "coupled"}, {}),
}


def distribution_of(path: tuple[int, ...], params: dict) -> np.ndarray:
    """The request's distribution after TEXT and `path`, straight from the table."""
    tokens = [*TEXT, *path]
    logits = MODEL.table[len(tokens) - 1, tokens[-1]][None]
    return LogitsPipeline(V)(logits, [view(TEXT, **params)], [path])[0].numpy()


def drawn_drafts(depth: int, how: dict, params: dict, calls: int, batch: int) -> Iterator[Draft]:
    """The drafts of `calls` calls, every sequence with its own seed."""
    drafter = ModelDrafter(MODEL, depth, **how)
    drafter.bind(batch, 8)
    one = view(TEXT, **params)
    for call in range(calls):
        views = [replace(one, slot=slot, seed=call * batch + slot) for slot in range(batch)]
        yield drafter.draft(evidence(views, V), [depth] * batch)
        drafter.release(range(batch))


def p_value(count: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square with cells pooled to an expectation of 5; zero cells must be empty."""
    assert count[expected == 0].sum() == 0
    order = np.argsort(expected[expected > 0])
    e, c = expected[expected > 0][order], count[expected > 0][order]
    pools = np.maximum.accumulate((np.cumsum(e) / 5).astype(int))
    e, c = np.bincount(pools, e), np.bincount(pools, c)
    e, c = e[e > 0], c[e > 0]
    if e[-1] < 5 and len(e) > 1:
        e, c = np.append(e[:-2], e[-2] + e[-1]), np.append(c[:-2], c[-2] + c[-1])
    return 1.0 if len(e) == 1 else float(chi2.sf(((c - e) ** 2 / e).sum(), len(e) - 1))


@pytest.mark.parametrize("batch", [400, pytest.param(1600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("params", list(GRID))
def test_many_draws_from_one_distribution(params: str, batch: int) -> None:
    """Sixteen siblings a sequence are sixteen draws from its distribution."""
    count, want = np.zeros(V), distribution_of((), GRID[params])
    for draft in drawn_drafts(1, {"branching": (16,)}, GRID[params], calls=4, batch=batch):
        assert draft.q is not None
        np.testing.assert_allclose(draft.q.probs.numpy(), np.tile(want, (batch, 1)), atol=1e-12)
        count += np.bincount(draft.tokens, minlength=V)
    assert count.sum() == 64 * batch
    assert p_value(count, want * count.sum()) > ALPHA
    cold = want**1.25  # control: a distribution 25% colder than declared
    assert p_value(count, cold / cold.sum() * count.sum()) < ALPHA


def test_a_hundred_thousand_races() -> None:
    """The first two arrivals of an exponential race are two draws without replacement."""
    q = distribution_of((), GRID["hot, min-p"])
    noise = torch.from_numpy(np.random.default_rng(0).exponential(size=(102_400, V)))
    count = np.zeros((V, V))
    for x, y in fetch(tree_draws.race(torch.from_numpy(q).expand(102_400, V), noise, 2))[0].tokens:
        count[x, y] += 1
    assert p_value(count, sibling_distribution(q, {"branching": (2,), "sample": "coupled"}) * count.sum()) > ALPHA
    assert p_value(count, sibling_distribution(q, {"branching": (2,)}) * count.sum() + 1e-300) < ALPHA  # control: iid


@pytest.mark.parametrize("case", list(CASES))
def test_trees_are_drawn_as_declared(case: str) -> None:
    """The first two siblings and the child of the first: their joint counts against the distributions the draft returned."""
    how, params = CASES[case]
    siblings, child = np.zeros((V, V)), np.zeros((V, V))
    distributions: dict[tuple[int, ...], np.ndarray] = {}
    for draft in drawn_drafts(2, how, params, calls=3, batch=100 if how.get("sample") == "coupled" else 2000):
        assert draft.q is not None
        probs = draft.q.probs.numpy()
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-12)
        for b in range(len(draft.counts)):
            top = draft.children(b, -1)
            x = [draft.tokens[k] for k in top]
            (y, *_) = draft.children(b, top[0])
            distributions[()], distributions[x[0],] = probs[draft.q.row[top[0]]], probs[draft.q.row[y]]
            assert len({draft.q.row[k] for k in top}) == 1  # siblings share their row
            siblings[x[0], x[-1] if len(x) == 1 else x[1]] += 1
            child[x[0], draft.tokens[y]] += 1
    for path, q in distributions.items():
        np.testing.assert_allclose(q, distribution_of(path, params), atol=1e-12)
    q, n = distributions[()], siblings.sum()
    assert p_value(siblings, sibling_distribution(q, how) * n) > ALPHA
    assert p_value(child, np.array([q[x] * distributions.get((x,), np.zeros(V)) for x in range(V)]) * n) > ALPHA


def sibling_distribution(q: np.ndarray, how: dict) -> np.ndarray:
    """Joint distribution [V, V] of the first two siblings; of a chain, a diagonal."""
    if "branching" not in how:
        return np.diag(q)
    if how.get("siblings") == "without_replacement" or how.get("sample") == "coupled":
        return np.array([q[x] * (left := q * (np.arange(V) != x)) / left.sum() for x in range(V)])
    return np.outer(q, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"branching": (2, 2), "siblings": "iid"}, {"sample": "coupled"}])
def test_every_token_comes_from_the_row_declared_for_it(how: dict, dtype: torch.dtype) -> None:
    """Seed-matched equality, in the draft's own precision: a bfloat16 model declares its own distribution, no finer one."""
    model = TinyLM(50, seed=3, sharp=2.0, dtype=dtype)
    drafter = ModelDrafter(model, depth=2, **how)
    drafter.bind(40, 16)
    views = [view([1, 2, slot], slot, seed=slot, temperature=0.8, top_k=20) for slot in range(40)]
    seen = evidence(views, 50)
    draft = drafter.draft(seen, [2] * 40)
    assert draft.q is not None
    assert draft.q.probs.dtype == torch.float32
    for b in range(40):
        at_depth = {1: 0, 2: 0}
        for k in range(draft.offsets[b], draft.offsets[b + 1]):
            depth = len(draft.path_to(k))
            assert draft.tokens[k] == redraw(seen, draft, b, k, depth, at_depth[depth], "sample" in how)
            at_depth[depth] += 1


def redraw(seen: Evidence, draft: Draft, b: int, k: int, depth: int, index: int, coupled: bool) -> int:
    assert draft.q is not None
    q = draft.q.probs[draft.q.row[k]].double().numpy()
    if coupled:
        return int(np.argmax(q / seen.noise.exponential(b, depth, len(q)).numpy()))
    total = np.cumsum(q)
    return int(np.searchsorted(total, seen.noise.uniform(b, depth, "draft", index) * total[-1], side="right"))


@pytest.mark.parametrize("u", [2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53])
def test_no_draw_without_mass(u: float) -> None:
    """Bug 8 on the draft side: zeros at both ends and in the middle, uniforms at the ends of the open interval."""
    distribution = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0]])
    (drawn,) = fetch(tree_draws.inverse_cdf(distribution, [[u, 1 - u]]))[0].tokens
    assert all(distribution[0, t] > 0 for t in drawn)
    (all_three,) = fetch(tree_draws.without_replacement(distribution, [[u] * 5]))[0].tokens
    assert sorted(all_three) == [1, 3, 4]
    (arrived,) = fetch(tree_draws.race(distribution, torch.ones(1, 7), 7))[0].tokens
    assert sorted(arrived) == [1, 3, 4]


def test_no_draw_from_what_is_no_distribution() -> None:
    rows = torch.tensor([[float("nan"), 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, float("inf"), 0.0], [0.0, 1.0, 0.0]])
    assert fetch(tree_draws.inverse_cdf(rows, [[0.5]] * 4))[0].tokens == [[], [], [], [1]]
    assert fetch(tree_draws.without_replacement(rows, [[0.5, 0.5]] * 4))[0].tokens == [[], [], [], [1]]
    assert fetch(tree_draws.top(torch.tensor([[float("nan"), 0.5]]), 1))[0].tokens == [[]]


def test_a_pick_on_a_zero_becomes_the_mode() -> None:
    """A parallel sum may decrease by a rounding; the token it then points at has no mass and is not returned."""
    distribution = torch.tensor([[0.0, 0.3, 0.7], [0.5, 0.0, 0.5], [float("nan"), 0.0, 0.0]])
    nothing = distribution.shape[1]  # what stands for no token
    found = tree_draws.with_mass(distribution, torch.tensor([[0, 1], [2, 0], [nothing, nothing]]))
    assert found.tolist() == [[2, 1], [2, 0], [nothing, nothing]]
    assert tree_draws.with_mass(distribution[:1], torch.empty(1, 0, dtype=torch.int64)).tolist() == [[]]

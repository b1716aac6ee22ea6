"""Learned drafters: what they compute is what was trained, from the cache as from scratch; trees and budgets."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import BestFirst, Levels
from outrider.drafters.tree.shapes import levels
from outrider.params import SamplingParams
from outrider.protocols import Controller
from outrider.train.features import hidden_of
from outrider.types import Draft, Evidence
from outrider.verify import load_rule
from tests.covering import covering, slow_beyond
from tests.drafters.drafting import Seen, check_parity, evidence, view
from tests.drafters.networks import TAPS, TARGET, H, V, feature_model, heads

GROWTHS = {
    "chain": lambda: Levels(levels((1,) * 3), V),
    "tree": lambda: Levels(levels((2, 2, 1)), V),
    "dynamic": lambda: BestFirst(6, 3, V, width=2),
}


def decode(
    drafter: MedusaDrafter | EagleDrafter, slots: int, temperature: float = 1.0, control: Controller | None = None
) -> None:
    """Sequences that join and leave, prompts in chunks of 5, several depths, rejections of every kind."""
    rule, control = load_rule("speculative_sampling"), control or Fixed(3)
    one = Engine(TARGET, drafter, rule, control, slots=slots, max_length=60, chunk=5)
    p = [SamplingParams(temperature=temperature, max_tokens=m, seed=i) for i, m in enumerate((14, 9, 21, 6))]
    one.generate([[3, 1, 4], [1] * 11, [5, 9, 2, 6, 5, 3, 5], [8]], p)
    assert one.counts.rejected > 5


@cache
def states(text: tuple[int, ...], taps: tuple[int, ...] = TAPS) -> torch.Tensor:
    return hidden_of(TARGET, torch.tensor([text]), taps).double()[0]  # float32 on the way


KINDS = list(product(GROWTHS, (1, 2), (False, True)))


@pytest.mark.parametrize(("how", "kv_heads", "residual"), slow_beyond(KINDS, covering(KINDS)))
def test_cached_logits_are_those_of_training(how: str, kv_heads: int, residual: bool) -> None:
    """After any history of partial acceptances every logit served equals the training-time unroll of the same tokens.

    That is cached against recomputed, and train-serve parity, in one equality.
    """
    model = feature_model(kv_heads, residual)
    seen = Seen(GROWTHS[how]())
    decode(EagleDrafter(model, seen), 3)
    assert len(seen.logits) > 60
    check_parity(model, seen, states)


@pytest.mark.parametrize("shared", [True, False])
def test_heads_serve_what_they_were_trained_as(shared: bool) -> None:
    model, seen = heads(shared), Seen(GROWTHS["tree"]())
    decode(MedusaDrafter(model, seen), 3)
    assert len(seen.logits) > 60
    for (history, path), row in seen.logits.items():
        last = states(history[:-1], (3,))[-1, 0]
        torch.testing.assert_close(row, model(last)[len(path)], rtol=0, atol=2e-4)


def by_hand(model: Eagle3Network, tokens: list[int], g: torch.Tensor, column: int, level: int) -> torch.Tensor:
    """Logits of one level at one column: rows of the context up to the column, then one row for each level, row by row."""
    c, layer = model.config, model.layers[0]
    attn = layer.self_attn

    def turned(y: torch.Tensor, at: int) -> torch.Tensor:
        cos, sin = model.rotation(torch.tensor([at]))
        half = c.head_dim // 2
        return y * cos[0] + torch.cat([-y[..., half:], y[..., :half]], -1) * sin[0]

    keys, values, states = [], [], list(g[: column + 1])
    for place in range(column + level + 1):
        residual, x = model.join(model.rows(torch.tensor(tokens[place + 1])), states[place])
        q = turned(attn.q_proj(x).view(c.heads, -1), place)  # type: ignore[operator, union-attr]
        keys.append(turned(attn.k_proj(x).view(c.kv_heads, -1), place))  # type: ignore[operator, union-attr]
        values.append(attn.v_proj(x).view(c.kv_heads, -1))  # type: ignore[operator, union-attr]
        share = torch.arange(c.heads) * c.kv_heads // c.heads
        k, v = torch.stack(keys)[:, share], torch.stack(values)[:, share]
        weight = torch.softmax((q * k).sum(-1) / c.head_dim**0.5, 0)
        state = model.leave(residual, (weight[..., None] * v).sum(0).flatten())
        if place >= column:
            states.append(state)
    return model.logits(states[-1])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_levels_are_rows_one_by_one(kv_heads: int, residual: bool) -> None:
    """The mask of the training-time test against brute force: every level of every column, computed alone."""
    model, g = feature_model(kv_heads, residual), torch.Generator().manual_seed(2)
    tokens, taps = torch.randint(V, (1, 9), generator=g), torch.randn(1, 6, 2, H, generator=g, dtype=torch.float64)
    found = model.unroll(tokens, taps, 3)
    for level in range(3):
        for column in range(6):
            want = by_hand(model, tokens[0].tolist(), model.read(taps)[0], column, level)
            torch.testing.assert_close(found[level][0, column], want, rtol=0, atol=1e-10)


def test_the_cache_holds_what_the_target_holds_after_every_round() -> None:
    """As many context rows as the target's cache, whatever was rejected; a slot that was left holds nothing."""
    drafter, rounds = EagleDrafter(feature_model(), GROWTHS["tree"]()), 0
    honest = drafter.draft

    def watched(seen: Evidence, budget):
        nonlocal rounds
        out = honest(seen, budget)
        for v in seen.sequences:
            read = drafter.cache.length[v.slot] + drafter.backlog.count(v.slot)
            assert read == drafter.context.next[v.slot] == v.cached
            rounds += 1
        return out

    drafter.draft = watched  # type: ignore[method-assign]
    decode(drafter, 2)
    assert rounds > 20
    assert drafter.cache.length == [0, 0]


def test_nothing_leaks_from_the_future() -> None:
    """Level s at column i changes with tokens up to i + s + 1 and hidden states up to i, and with nothing behind them."""
    model = feature_model()
    g = torch.Generator().manual_seed(0)
    tokens, taps = torch.randint(V, (1, 12), generator=g), torch.randn(1, 8, 2, H, generator=g, dtype=torch.float64)
    base = model.unroll(tokens, taps, 3)
    for t in range(12):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % V
        for s, (a, b) in enumerate(zip(base, model.unroll(other, taps, 3), strict=True)):
            changed = (a != b).any(-1)[0].tolist()
            assert not any(changed[: max(0, t - s - 1)]), (t, s)
            if 1 <= t <= 8 and t - s - 1 >= 0:
                assert changed[t - s - 1 : t - s] in ([True], []), "the newest token is read"
    for t in range(8):
        other = taps.clone()
        other[0, t] += 1.0
        for a, b in zip(base, model.unroll(tokens, other, 3), strict=True):
            changed = (a != b).any(-1)[0].tolist()
            assert changed == [False] * t + [True] * (8 - t)


def test_a_gap_in_what_was_seen_makes_a_draft_worse_never_wrong() -> None:
    """Rows that a drafter never saw (a prefix shared with somebody else's cache) start it over; it drafts all the same."""
    drafter = EagleDrafter(feature_model(), GROWTHS["chain"]())
    drafter.bind(1, 40)
    found = drafter.draft(evidence([view([1, 2, 3])], V), [3])  # no row of this sequence was in the forward
    assert found.counts == (0,)


def test_best_first_is_the_best_tree() -> None:
    """Against brute force: of all nodes of a full tree with known chances, the most valuable ones, whatever the order."""
    chance = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    growth, forest = BestFirst(7, 3, 4, width=4), Forest(1)
    growth.grow(
        evidence([view([1])], 4),
        [3],
        forest,
        chance.log()[None],
        lambda frontier: chance.log().expand(len(frontier), -1),
    )
    import itertools

    values = sorted(
        (float(chance[list(path)].prod()) for d in (1, 2, 3) for path in itertools.product(range(4), repeat=d)),
        reverse=True,
    )
    mine = sorted((float(chance[list(p)].prod()) for p in forest.paths[0]), reverse=True)
    assert mine == pytest.approx(values[:7])
    draft: Draft = forest.draft(torch.device("cpu"), "iid")
    assert draft.q is None
    assert all(p < k for k, p in enumerate(draft.parent))


def test_budgets_are_kept() -> None:
    for how in GROWTHS:
        growth = GROWTHS[how]()
        for d in (1, 2, 3):
            forest = Forest(1)
            flat = torch.linspace(0, 1, V, dtype=torch.float64)[None]
            growth.grow(
                evidence([view([1])], V), [d], forest, flat, lambda frontier, x=flat: x.expand(len(frontier), -1)
            )
            assert max(map(len, forest.paths[0])) <= d
            assert growth.max_expanded_nodes > growth.nodes or max(map(len, forest.paths[0])) == d
            assert len(forest.paths[0]) <= growth.nodes

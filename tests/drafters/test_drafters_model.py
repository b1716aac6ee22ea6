"""The model drafter: after any history its state is that of a fresh one over the same tokens (EX-8, contract 6)."""

from __future__ import annotations

import random

import pytest
import torch
from jaxtyping import TypeCheckError

from outrider.drafters.model.drafter import CHUNK, ModelDrafter
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TinyLM
from outrider.protocols import KVCache
from outrider.types import Draft, Rows, Scores, SequenceView
from tests.drafters.drafting import chain, evidence, view

V = 31
MODEL = TinyLM(V, seed=2, sharp=2.5)
HOWS = {
    "chain": {},
    "greedy": {"sample": "greedy"},
    "coupled": {"sample": "coupled"},
    "tree": {"branching": (2, 1, 2, 1)},
    "tree without replacement": {"branching": (3, 2, 1, 1), "siblings": "without_replacement"},
}


class Counting:
    """A target that counts its forwards and their rows."""

    def __init__(self, model: TinyLM) -> None:
        self.model = model
        self.rows: list[int] = []
        self.deepest = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        kv.reserve(rows)
        self.rows.append(rows.count)
        self.deepest = max(self.deepest, int(rows.position.max()))
        return self.model.forward(rows, kv, layers=layers)


def build(model: object = MODEL, slots: int = 4, length: int = 128, depth: int = 4, **how) -> ModelDrafter:
    drafter = ModelDrafter(model, depth, **how)  # type: ignore[arg-type]
    drafter.bind(slots, length)
    return drafter


def same(a: Draft, i: int, b: Draft, j: int) -> None:
    """Sequence i of draft a is sequence j of draft b, distributions included."""
    one, two = a.take([i]), b.take([j])
    assert one.tokens == two.tokens
    assert one.parent == two.parent
    rows = [d.q.row if d.q is not None else (-1,) * len(d.parent) for d in (one, two)]
    for x, y in zip(*rows, strict=True):
        assert (x < 0) == (y < 0)
        if one.q is not None and two.q is not None and x >= 0:
            torch.testing.assert_close(one.q.probs[x], two.q.probs[y], rtol=0, atol=1e-9)


def fresh(how: dict, v: SequenceView, budget: int) -> tuple[ModelDrafter, Draft]:
    drafter = build(slots=v.slot + 1, **how)
    return drafter, drafter.draft(evidence([v], V), [budget])


def accepted(draft: Draft, i: int, rng: random.Random) -> list[int]:
    """A random path down the tree of sequence i: what a rule might accept."""
    path: list[int] = []
    while children := draft.children(i, path[-1] if path else -1):
        if rng.random() < 0.25:
            break
        path.append(rng.choice(children))
    return [draft.tokens[k] for k in path]


@pytest.mark.parametrize("how", list(HOWS))
def test_after_any_history_as_if_fresh(how: str) -> None:
    """Random acceptance (none, some, all), random budgets with 0, sequences that skip steps: bugs 10 and 25."""
    rng = random.Random(1)
    drafter = build(**HOWS[how])
    texts = [[rng.randrange(V) for _ in range(n)] for n in (1, 7, 3, 12)]
    for step in range(14):
        present = [s for s in range(4) if rng.random() < 0.8] or [0]
        views = [view(texts[s], s, seed=100 + s, temperature=float(s != 2)) for s in present]
        budget = [rng.choice((0, 1, 3, 4)) for _ in present]
        draft = drafter.draft(evidence(views, V), budget)
        for i, (v, b) in enumerate(zip(views, budget, strict=True)):
            assert max((len(draft.path_to(k)) for k in range(draft.offsets[i], draft.offsets[i + 1])), default=0) == b
            if b and step % 3 == 0:
                other, alone = fresh(HOWS[how], v, b)
                same(draft, i, alone, 0)
                mine, its, n = drafter.cache.kv, other.cache.kv, len(v.tokens)
                torch.testing.assert_close(mine.entries(v.slot, n), its.entries(v.slot, n), rtol=0, atol=1e-9)
        for i, s in enumerate(present):
            texts[s] += [*accepted(draft, i, rng), rng.randrange(V)]


def test_an_anchor_that_was_drafted_is_fed_again() -> None:
    """The engine may cut a draft short; the bonus token can then be the very token drafted there."""
    drafter, text = build(), [5, 6]
    draft = drafter.draft(evidence([view(text)], V), [4])
    text += chain(draft)[:2]
    again = drafter.draft(evidence([view(text)], V), [4])
    same(again, 0, fresh({}, view(text), 4)[1], 0)
    same(drafter.draft(evidence([view(text)], V), [4]), 0, again, 0)  # the same evidence twice


@pytest.mark.parametrize("how", list(HOWS))
def test_replay(how: str) -> None:
    """Contract 6: release, feed again, same draft; in another slot and company too."""
    drafter, text = build(**HOWS[how]), list(range(9))
    first = drafter.draft(evidence([view(text, 1, seed=4)], V), [3])
    drafter.release([1])
    assert drafter.cache.kv.length == [0] * 4
    others = [view([3] * n, s, seed=s) for s, n in ((0, 4), (3, 20))]
    again = drafter.draft(evidence([others[0], view(text, 2, seed=4), others[1]], V), [2, 3, 0])
    same(first, 0, again, 1)


def test_a_slot_with_another_sequence_starts_over() -> None:
    drafter = build()
    drafter.draft(evidence([view([1, 2, 3, 4, 5, 6])], V), [4])
    drafter.draft(evidence([view([1, 2, 3, 4, 5, 6])], V), [4])
    text = [9, 8, 7]
    same(drafter.draft(evidence([view(text)], V), [4]), 0, fresh({}, view(text), 4)[1], 0)


def test_one_forward_per_level() -> None:
    """No forward is spent on catching up: what was accepted and the anchor ride with the first level."""
    model = Counting(MODEL)
    drafter, text = build(model), [1, 2, 3]
    rng = random.Random(3)
    for take in (0, 4, 2, 4, 3, 1):
        model.rows.clear()
        draft = drafter.draft(evidence([view(text, seed=7)], V), [4])
        assert len(model.rows) == 4
        assert model.rows[0] <= 3
        assert model.rows[1:] == [1, 1, 1]
        text += [*chain(draft)[:take], rng.randrange(V)]


def test_prompts_are_fed_in_chunks_and_budget_zero_is_lazy() -> None:
    model = Counting(MODEL)
    drafter = build(model, length=2000)
    text = [i % V for i in range(3 * CHUNK)]
    for cached in (100, CHUNK, CHUNK + 200, 2 * CHUNK + 1):
        drafter.draft(evidence([view(text, prompt=len(text), cached=cached)], V), [0])
        held = drafter.cache.kv.length[0]
        assert cached - CHUNK <= held <= cached
    assert max(model.rows) <= CHUNK
    assert sum(model.rows) == 2 * CHUNK
    draft = drafter.draft(evidence([view(text)], V), [4])
    assert max(model.rows) <= CHUNK
    same(draft, 0, fresh_long(text), 0)


def fresh_long(text: list[int]) -> Draft:
    return build(length=2000).draft(evidence([view(text)], V), [4])


@pytest.mark.parametrize("how", ["chain", "tree"])
@pytest.mark.parametrize("shorter", ["max_length", "engine"])
def test_a_short_draft_context_only_ends_drafting(how: str, shorter: str) -> None:
    """Bug 19: every length around the limit, never an exception, and full depth as long as there is room."""
    limit = 12
    kind = HOWS[how] | ({"max_length": limit} if shorter == "max_length" else {})
    model = Counting(MODEL)
    drafter = build(model, length=limit if shorter == "engine" else 64, **kind)
    text = [3, 4, 5]
    while len(text) < limit + 4:
        draft = drafter.draft(evidence([view(text, seed=1)], V), [4])
        depth = max(0, min(4, limit - len(text) + 1))
        assert max((len(draft.path_to(k)) for k in range(len(draft.parent))), default=0) == depth
        if depth:
            same(draft, 0, fresh(HOWS[how], view(text, seed=1), depth)[1], 0)
        drafter.draft(evidence([view(text, seed=1)], V), [0])
        text.append(len(text))
    assert model.deepest == limit - 1


@pytest.mark.parametrize("more", [-3, 5])
@pytest.mark.parametrize("how", ["chain", "greedy", "tree"])
def test_draft_vocabularies_that_differ_by_padding(how: str, more: int) -> None:
    model = TinyLM(V + more, seed=2)
    drafter = build(model, vocab_size=V, **HOWS[how])
    draft = drafter.draft(evidence([view([1, 2], s, seed=s) for s in range(4)], V), [4] * 4)
    assert max(draft.tokens) < min(V, V + more)
    if draft.q is not None:
        assert draft.q.probs.shape[1] == V
        torch.testing.assert_close(draft.q.probs.sum(-1), torch.ones(len(draft.q.probs), dtype=torch.float64))
        assert float(draft.q.probs[:, V + more :].sum()) == 0.0


def test_temperature_zero_is_the_argmax_and_needs_no_distribution() -> None:
    def no_distribution(*_: object) -> torch.Tensor:
        raise AssertionError("no law is needed")

    greedy = view([1, 2], temperature=0.0)
    draft = build().draft(evidence([greedy], V, no_distribution), [4])
    assert draft.q is None
    expected = build(sample="greedy").draft(evidence([greedy], V, no_distribution), [4])
    assert draft.tokens == expected.tokens
    tree = build(branching=(3, 2), depth=2).draft(evidence([greedy], V, no_distribution), [2])
    assert len(set(tree.tokens[:3])) == 3
    assert tree.tokens[0] == draft.tokens[0]


def test_a_mixed_batch_has_distributions_for_the_sampled_ones_only() -> None:
    views = [view([1, s], s, seed=s, temperature=float(s % 2)) for s in range(4)]
    draft = build().draft(evidence(views, V), [3, 2, 1, 4])
    assert draft.q is not None
    assert draft.counts == (3, 2, 1, 4)
    rows = [draft.q.row[draft.offsets[b] : draft.offsets[b + 1]] for b in range(4)]
    assert set(rows[0] + rows[2]) == {-1}
    assert all(r >= 0 for r in rows[1] + rows[3])
    for b in range(4):
        same(draft, b, fresh({}, views[b], len(rows[b]))[1], 0)


def test_bans_reach_greedy_drafts() -> None:
    """An edit of the logits changes what the target will choose, so it changes what is proposed."""
    free = chain(build().draft(evidence([view([1, 2], temperature=0.0)], V), [1]))
    banned = view([1, 2], temperature=0.0, logit_bias={free[0]: -100.0})
    draft = build().draft(evidence([banned], V), [1])
    assert draft.q is None
    assert chain(draft) != free


def test_a_broken_model_proposes_nothing() -> None:
    class Broken(Counting):
        def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
            scores = super().forward(rows, kv, layers=layers)
            return Scores(torch.full_like(scores.logits, torch.nan))

    for temperature in (0.0, 1.0):
        draft = build(Broken(MODEL)).draft(evidence([view([1, 2], temperature=temperature)], V), [4])
        assert draft.counts == (0,)


def test_without_replacement_stops_when_nothing_is_left() -> None:
    drafter = build(branching=(4, 1), depth=2, siblings="without_replacement")
    draft = drafter.draft(evidence([view([1, 2], top_k=2)], V), [2])
    assert len(draft.children(0, -1)) == 2


def test_the_two_draws_of_a_position_use_the_shared_noise() -> None:
    """Coupling: a draft model that is the target proposes exactly what the rule `match` will draw."""
    from outrider.noise import Noise
    from outrider.verify.match import target_token

    v = view([4, 2], seed=11)
    draft = build(sample="coupled").draft(evidence([v], V), [4])
    assert draft.q is not None
    for depth, token in enumerate(chain(draft), start=1):
        assert target_token(draft.q.probs[draft.q.row[depth - 1]], Noise((11,), (1,)), 0, depth) == token


def test_options_are_checked() -> None:
    for siblings, sample in (("iid", "lawful"), ("both", "sampled")):
        with pytest.raises((ConfigError, TypeCheckError)):  # run-time type checks, where they are on, speak first
            build(siblings=siblings, sample=sample)
    with pytest.raises(ConfigError, match="branching needs 4 numbers"):
        build(branching=(2,))
    with pytest.raises(ConfigError, match="numbers >= 1"):
        build(branching=(2, 0, 1, 1))
    with pytest.raises(ConfigError, match="length >= 1"):
        build(depth=0)
    with pytest.raises(ConfigError, match="at most 4096"):
        build(branching=(40, 40, 40, 1))
    with pytest.raises(ConfigError, match="bind"):
        ModelDrafter(MODEL, 2).draft(evidence([view([1])], V), [1])
    recurrent = Counting(MODEL)
    recurrent.rewinds = False
    with pytest.raises(CapabilityError, match="recurrent"):
        build(recurrent)
    flat = Counting(MODEL)
    flat.trees = False
    assert build(flat).max_nodes == 4
    with pytest.raises(CapabilityError, match="trees"):
        build(flat, branching=(2, 1, 1, 1))

"""Chains that grow in one call of compiled code, against the levels that are drawn one by one: the same drafts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from outrider.assets import shipped
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.tree import chain
from outrider.drafters.tree.chances import Belief
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.gain import ByGain
from outrider.drafters.tree.growth import LevelLogits, Levels
from outrider.drafters.tree.shapes import levels
from outrider.models.load import load_target
from outrider.nn import picks
from outrider.noise import Noise
from outrider.sampling.pipeline import LogitsPipeline
from outrider.types import Draft, Evidence, Rows, Scores, SequenceView, Verdict
from tests.drafters.drafting import evidence, view
from tests.drafters.test_native_drafts import LIBRARY, WIDE, V, eagle
from tests.drafters.test_sequential import wide

pytestmark = pytest.mark.skipif(
    LIBRARY is None or picks.best(torch.ones(1, 1), 1) is None, reason="compiled code needs a C++ compiler"
)
REQUESTS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.3}]
DEPTHS = [(4, 4, 4), (1, 4, 2), (0, 3, 0), (1, 0, 1)]
BELIEVED = {0.05: ((0.9, 2.0), (0.2, -1.0), (0.5, 5.0)), 0.3: ((0.6, 2.0), (0.95, 6.0), (0.7, 4.0))}
"""Thresholds, and what is believed of each slot."""


def views(sizes: Sequence[int], vocab: int) -> list[SequenceView]:
    """A sequence of each size, with a request of another kind each, in slots that are not in order."""
    tokens = torch.randint(vocab, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(4)).tolist()
    return [
        view(own[:n], slot, seed=seed, **params)
        for own, n, slot, seed, params in zip(tokens, sizes, (2, 0, 1), (7, -3, 1 << 62), REQUESTS, strict=True)
    ]


def after_a_prompt(these: list[SequenceView], width: int, taps: int, vocab: int) -> Evidence:
    """Evidence of a step that has read all but the last token of these sequences."""
    prompts = [v.tokens[:-1] for v in these]
    rows = Rows.assemble([v.slot for v in these], prompts, [0] * len(these), Draft.empty(len(these)))
    noise = torch.Generator().manual_seed(8)
    hidden = tuple(torch.randn(rows.count, width, generator=noise) for _ in range(taps))
    nothing = (0.0,) * len(these)
    verdict = Verdict(((),) * len(these), (0,) * len(these), (0,) * len(these), nothing, nothing, nothing)
    each = tuple(range(len(these)))
    places = Noise(tuple(v.seed for v in these), tuple(len(v.tokens) - 1 for v in these))
    scores = Scores(torch.zeros(len(these), vocab), hidden)
    return Evidence(
        rows, scores, Draft.empty(len(these)), verdict, tuple(these), each, each, places, LogitsPipeline(vocab)
    )


Grown = Levels | ByGain
GrowthOf = Callable[[int], Grown]
"""From the size of a vocabulary to a growth of chains of at most four tokens."""


def whole(vocab: int) -> Grown:
    return Levels(levels((1,) * 4), vocab)


def eagles(kind: str, growth: GrowthOf = whole) -> Callable[[Sequence[int]], Draft]:
    network = eagle(kind)

    def draft(depths: Sequence[int]) -> Draft:
        drafter = EagleDrafter(network, growth(V))
        drafter.bind(3, 40)
        width = getattr(network.config, "target_hidden", None) or network.config.hidden
        return drafter.draft(after_a_prompt(views((5, 9, 3), V), width, len(drafter.layers), V), depths)

    return draft


def sequences(growth: GrowthOf = whole) -> Callable[[Sequence[int]], Draft]:
    network = wide()

    def draft(depths: Sequence[int]) -> Draft:
        drafter = SequentialDrafter(network, growth(V))
        drafter.bind(3, 40)
        return drafter.draft(after_a_prompt(views((5, 9, 3), V), WIDE, 2, V), depths)

    return draft


def models(growth: GrowthOf = whole) -> Callable[[Sequence[int]], Draft]:
    model = load_target(str(shipped("draft")))
    vocab = model.vocab_size

    def draft(depths: Sequence[int]) -> Draft:
        drafter = ModelDrafter(model, 4, growth=growth(vocab), vocab_size=vocab)
        drafter.bind(3, 40)
        these = views((5, 9, 3), vocab)
        made = drafter.draft(evidence(these, vocab), depths)
        for i, v in enumerate(these):
            held = drafter.cache.held[v.slot]
            fed = max(0, made.counts[i] - 1)
            assert held == ([*v.tokens, *made.tree(i)[0][:fed]] if depths[i] else held)
            assert drafter.cache.kv.length[v.slot] == len(held)
        return made

    return draft


def heads(growth: GrowthOf = whole) -> Callable[[Sequence[int]], Draft]:
    noise = torch.Generator().manual_seed(2)

    def draft(depths: Sequence[int]) -> Draft:
        noise.manual_seed(2)
        forest, live = Forest(3), sum(d > 0 for d in depths)
        logits = 3.0 * torch.randn(4, live, V, generator=noise)
        step = evidence(views((5, 9, 3), V), V)
        growth(V).grow(step, depths, forest, logits[0], LevelLogits(logits, depths, forest))
        return forest.draft(torch.device("cpu"), "iid")

    return draft


MAKERS: dict[str, Callable[..., Callable[[Sequence[int]], Draft]]] = {
    "EAGLE-3": lambda *growth: eagles("eagle3", *growth),
    "EAGLE-3 of few tokens": lambda *growth: eagles("few tokens", *growth),
    "EAGLE-1": lambda *growth: eagles("eagle1", *growth),
    "sequential heads": sequences,
    "draft model": models,
    "heads": heads,
}


def both_ways(draft: Callable[[], Draft], monkeypatch: pytest.MonkeyPatch) -> tuple[Draft, Draft]:
    """The draft of the compiled call, which must apply, and that of the levels one by one."""
    real, used = chain.grow, list[bool]()

    def watched(*given: object) -> bool:
        used.append(real(*given))  # type: ignore[arg-type]
        return used[-1]

    with monkeypatch.context() as patched:
        patched.setattr(chain, "grow", watched)
        together = draft()
        patched.setattr(chain, "grow", lambda *given: False)
        one_by_one = draft()
    assert used == [True]
    return together, one_by_one


def check_same(together: Draft, one_by_one: Draft) -> None:
    """The same tokens, from the same distributions, bit for bit."""
    assert together.counts == one_by_one.counts
    assert together.tokens == one_by_one.tokens and together.parent == one_by_one.parent
    assert (together.q is None) == (one_by_one.q is None)
    if together.q is not None and one_by_one.q is not None:
        drawn = [k for k, row in enumerate(together.q.row) if row >= 0]
        assert drawn == [k for k, row in enumerate(one_by_one.q.row) if row >= 0] and drawn
        rows, twins = ([q.row[k] for k in drawn] for q in (together.q, one_by_one.q))
        assert torch.equal(together.q.probs[rows], one_by_one.q.probs[twins])
        assert together.q.sound is together.q.probs


@pytest.mark.parametrize("name", MAKERS)
def test_a_chain_is_its_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = MAKERS[name]()
    for depths in DEPTHS:
        together, one_by_one = both_ways(lambda depths=depths: draft(depths), monkeypatch)
        assert together.counts == tuple(depths)
        check_same(together, one_by_one)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sample", ["sampled", "greedy"])
def test_a_chain_that_stops_is_its_levels(name: str, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at the same place, promises the same, and some chains end early and some do not."""
    made: list[ByGain] = []

    def growth(vocab: int, least: float, believed: Sequence[tuple[float, float]]) -> ByGain:
        made.append(ByGain(4, 4, vocab, least=least, sample=sample))
        for slot, belief in enumerate(believed):
            made[-1].beliefs[slot] = Belief(*belief)
        return made[-1]

    lengths = set[int]()
    for least, believed in BELIEVED.items():
        draft = MAKERS[name](partial(growth, least=least, believed=believed))
        for depths in DEPTHS:
            made.clear()
            together, one_by_one = both_ways(lambda depths=depths, draft=draft: draft(depths), monkeypatch)
            check_same(together, one_by_one)
            assert made[0].beliefs == made[1].beliefs
            assert any(b.promised for b in made[0].beliefs.values())
            lengths |= {n - depth for n, depth in zip(together.counts, depths, strict=True) if depth}
    assert 0 in lengths and min(lengths) < 0


def test_a_row_without_a_distribution_ends_its_own_chain_only() -> None:
    logits = torch.randn(4, 3, V, generator=torch.Generator().manual_seed(2))
    logits[1, 1], logits[2, 0] = torch.nan, -torch.inf
    forest = Forest(3)
    step = evidence(views((5, 9, 3), V), V)
    Levels(levels((1,) * 4), V).grow(step, (4, 4, 4), forest, logits[0], LevelLogits(logits, (4, 4, 4), forest))
    assert [len(own) for own in forest.tokens] == [2, 1, 4]
    assert all(0 <= t < V for own in forest.tokens for t in own)


def test_filters_and_edits_are_drawn_level_by_level() -> None:
    logits = torch.randn(2, 1, V)
    filtered: list[dict[str, Any]] = [
        {"top_k": 3},
        {"repetition_penalty": 1.2},
        {"temperature": 0.0, "logit_bias": {1: 2.0}},
    ]
    for params in filtered:
        step, forest = evidence([view([1, 2, 3], **params)], V), Forest(1)
        assert not chain.grow(step, (2,), forest, logits[0], LevelLogits(logits, (2,), forest), True)
        assert not forest.tokens[0]


def test_noise_of_another_kind_is_asked_for_its_numbers() -> None:
    class Low(Noise):
        def uniform(self, b: int, depth: int, lane: str, index: int = 0) -> float:
            return 1e-9

    step, forest = evidence([view([1, 2, 3], temperature=1.0)], V), Forest(1)
    step, logits = replace(step, noise=Low(step.noise.seed, step.noise.position)), torch.zeros(3, 1, V)
    Levels(levels((1,) * 3), V).grow(step, (3,), forest, logits[0], LevelLogits(logits, (3,), forest))
    assert forest.tokens[0] == [0, 0, 0]

"""Several drafters as one: per sequence the first that proposes something, of those that the request allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.contained import Contained
from outrider.errors import ConfigError
from outrider.protocols import Borrower, Drafter, Keeper, KVCache
from outrider.records import CacheNeed
from outrider.types import POINT_MASS, Draft, Evidence, Proposal, Scores, Siblings


def lend(kv: KVCache, *drafters: Drafter) -> None:
    """Lend the target's cache to those drafters that look into it (`protocols.Borrower`)."""
    for drafter in drafters:
        if isinstance(drafter, Borrower):
            drafter.borrow(kv)


def need_of(slots: int, length: int, *drafters: Drafter) -> CacheNeed:
    """What the caches of drafters take together (`protocols.Keeper`)."""
    needs = [d.cache_need(slots, length) for d in drafters if isinstance(d, Keeper)]
    return CacheNeed(sum(n.fixed for n in needs), sum(n.token for n in needs))


def keep_within(tokens: int, *drafters: Drafter) -> None:
    """Limit the pages of those drafters that have a cache of their own."""
    for drafter in drafters:
        if isinstance(drafter, Keeper):
            drafter.keep_within(tokens)


class FirstOf:
    """Per sequence the first non-empty draft of `parts`, in their order.

    A later part gets budget 0 for a sequence that already has a draft; it still catches up. Which part proposes depends on the
    text and on earlier parts proposing nothing, never on drawn tokens, so the declared distributions stay exact. A part that
    fails proposes nothing, and a part that fails repeatedly is switched off (`contained`).
    """

    def __init__(self, parts: Sequence[Drafter]) -> None:
        if not parts:
            raise ConfigError("first_of needs at least one drafter")
        self.parts = tuple(parts)
        self._contained = tuple(Contained(p) for p in parts)
        self.name = "+".join(p.name for p in parts)
        self.layers = tuple(sorted({layer for p in parts for layer in p.layers}))
        self.max_nodes = max(p.max_nodes for p in parts)
        self.max_depth = max(p.max_depth for p in parts)
        self.trees = any(p.trees for p in parts)
        self.keyed = any(getattr(p, "keyed", False) for p in parts)

    def bind(self, slots: int, length: int) -> None:
        """Bind every part."""
        for part in self.parts:
            part.bind(slots, length)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """Of all parts."""
        return need_of(slots, length, *self.parts)

    def keep_within(self, tokens: int) -> None:
        """Limit every part's pages."""
        keep_within(tokens, *self.parts)

    def borrow(self, kv: KVCache) -> None:
        """Lend the target's cache to the parts that look into it."""
        lend(kv, *self.parts)

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots in every part."""
        for part in self._contained:
            part.release(slots)

    @property
    def faults(self) -> int:
        """Faults of all parts so far."""
        return sum(part.faults for part in self._contained)

    @property
    def notices(self) -> list[str]:
        """One sentence for each part that was switched off."""
        return [notice for part in self._contained for notice in part.notices]

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Call the parts in order and merge their drafts."""
        left = list(budget)
        drafts: list[Draft] = []
        chosen = [-1] * len(left)
        for n, part in enumerate(self._contained):
            draft = part.draft(self._seen_by(part.drafter, evidence), left)
            drafts.append(draft)
            for i, count in enumerate(draft.counts):
                if count:
                    chosen[i], left[i] = n, 0
        proposing = {n for n in chosen if n >= 0}
        if len(proposing) < 2:
            return drafts[max(proposing, default=0)]
        return merge(drafts, chosen, evidence.scores.logits.shape[-1])

    def _seen_by(self, part: Drafter, evidence: Evidence) -> Evidence:
        """The evidence with only the hidden states this part asked for, in its order."""
        if part.layers == self.layers:
            return evidence
        hidden = tuple(evidence.scores.hidden[self.layers.index(layer)] for layer in part.layers)
        return replace(evidence, scores=Scores(evidence.scores.logits, hidden))


def first_of(*parts: Drafter) -> Drafter:
    """Per sequence the first non-empty draft of `parts` (at least one)."""
    return parts[0] if len(parts) == 1 else FirstOf(parts)


def merge(drafts: Sequence[Draft], chosen: Sequence[int], vocab_size: int) -> Draft:
    """One draft with the tree of sequence i taken from `drafts[chosen[i]]` (-1: none).

    Nodes without a distribution stay point masses. Distributions over different supports become distributions over the vocabulary.
    A proposal has one way of drawing siblings: if the siblings of a draft were drawn in another way than the first one's, its
    distributions are dropped, which is always lossless (contract 1).
    """
    places = [(n, i) for i, n in enumerate(chosen) if n >= 0]
    used = sorted({n for n in chosen if n >= 0})
    q = _merge_distributions({n: drafts[n] for n in used}, places, vocab_size)
    trees = [drafts[n].tree(i) if n >= 0 else ((), ()) for i, n in enumerate(chosen)]
    return Draft.join(trees, q, drafts[used[0]].token.device)


def _merge_distributions(drafts: dict[int, Draft], places: list[tuple[int, int]], vocab_size: int) -> Proposal | None:
    """places: for every sequence with a draft, which of `drafts` it comes from, and the sequence's number."""
    proposals = {n: d.q for n, d in drafts.items() if d.q is not None}
    trees_with_distributions = [n for n in proposals if not drafts[n].is_chain]  # a chain was drawn either way
    way: Siblings = proposals[trees_with_distributions[0]].siblings if trees_with_distributions else "iid"
    proposals = {n: q for n, q in proposals.items() if n not in trees_with_distributions or q.siblings == way}
    if not proposals:
        return None
    supports = [q.support for q in proposals.values()]
    same = all(_equal(s, supports[0]) for s in supports[1:])
    support = supports[0] if same else None
    tables: list[Float[Tensor, "r S"]] = []
    first: dict[int, int] = {}
    for n, q in proposals.items():
        first[n] = sum(len(t) for t in tables)
        tables.append(q.probs if same else q.dense(list(range(len(q.probs))), vocab_size))
    row: list[int] = []
    for n, i in places:
        own = (
            [proposals[n].row[k] for k in drafts[n].nodes(i)] if n in proposals else [POINT_MASS] * drafts[n].counts[i]
        )
        row += [r + first[n] if r >= 0 else POINT_MASS for r in own]
    probs = torch.cat(tables)
    return Proposal(
        probs, tuple(row), support, way, probs if all(q.sound is q.probs for q in proposals.values()) else None
    )


def _equal(a: Int[Tensor, "S"] | None, b: Int[Tensor, "S2"] | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def shortened(draft: Draft, most: Sequence[int]) -> Draft:
    """The first `most[i]` tokens of each chain: fewer were asked for, whatever was drawn."""
    if all(count <= n for count, n in zip(draft.counts, most, strict=True)):
        return draft
    kept = [list(draft.nodes(i))[:n] for i, n in enumerate(most)]
    trees = [([draft.tokens[k] for k in nodes], list(range(-1, len(nodes) - 1))) for nodes in kept]
    q: Proposal | None = draft.q and replace(draft.q, row=tuple(draft.q.row[k] for nodes in kept for k in nodes))
    return Draft.join(trees, q, draft.token.device)


class SelectableDrafter:
    """The drafter `inner` as part number `number`: it drafts nothing for a sequence whose `params.drafters` does not name it.

    Its budget is then 0, as if another part had proposed: it still catches up. The choice is made before anything is drawn, so the
    declared distributions stay exact. Requests without `drafters` use all of them.
    """

    def __init__(self, inner: Drafter, number: int) -> None:
        self.inner, self.number = inner, number
        self.name, self.layers, self.trees = inner.name, inner.layers, inner.trees
        self.keyed = getattr(inner, "keyed", False)
        self.max_nodes, self.max_depth = inner.max_nodes, inner.max_depth

    def bind(self, slots: int, length: int) -> None:
        """Bind the drafter."""
        self.inner.bind(slots, length)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """Of the drafter."""
        return need_of(slots, length, self.inner)

    def keep_within(self, tokens: int) -> None:
        """Limit the drafter's pages."""
        keep_within(tokens, self.inner)

    def borrow(self, kv: KVCache) -> None:
        """Lend the target's cache to the drafter, if it looks into it."""
        lend(kv, self.inner)

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        self.inner.release(slots)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The drafter's proposals for the sequences that chose it."""
        chosen = [getattr(v.params, "drafters", None) for v in evidence.sequences]
        left = [b if c is None or self.number in c else 0 for b, c in zip(budget, chosen, strict=True)]
        return self.inner.draft(evidence, left)


def gated(drafter: Drafter) -> Drafter:
    """The same parts in the same order, each a `SelectableDrafter`; the parts of a bound drafter stay bound."""
    parts = drafter.parts if isinstance(drafter, FirstOf) else (drafter,)
    return first_of(*(SelectableDrafter(part, number) for number, part in enumerate(parts)))

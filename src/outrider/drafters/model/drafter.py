"""Drafting with a separate language model: chains token by token, trees level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.model.token_cache import CHUNK, TokenCache
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, Levels, Sample, Siblings
from outrider.drafters.tree.shapes import Shape, levels
from outrider.errors import CapabilityError, CapacityError, ConfigError
from outrider.nn.ahead import Ahead
from outrider.nn.kv import PAGE
from outrider.protocols import Target
from outrider.records import CacheNeed
from outrider.types import Draft, Evidence, Rows, SequenceView


class ModelDrafter:
    """Drafts with a language model `target` (any `Target`: it is the *draft* model here) and its own KV cache.

    depth:      levels of a draft, >= 1.
    branching:  children of each node of levels 1 .. depth; None is a chain. (2, 2, 1) has 2 + 4 + 4 nodes.
    shape:      any tree of `shapes` instead; its depth counts, not `depth`.
    siblings:   how several children of a node are drawn: "iid", or "without_replacement".
    sample:     "sampled", "greedy" or "coupled", see `growth.Levels`.
    growth:     another way to grow, such as `growth.BestFirst`, instead of depth, branching, shape, siblings and sample.
    vocab_size: of the target; the draft model's extra tokens are masked, its missing ones have no mass, and where the text has one
                of them the draft model reads another token (`TokenCache`). None: the draft model's own.
    max_length: most tokens the draft model reads; beyond it nothing is drafted for a sequence. None: the model's own.
    """

    layers: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        depth: int,
        *,
        branching: Sequence[int] | None = None,
        shape: Shape | None = None,
        siblings: Siblings = "iid",
        sample: Sample = "sampled",
        growth: Growth | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
        name: str = "model",
    ) -> None:
        _check(target, depth if shape is None else shape.depth, branching)
        self.name, self.model = name, target
        self.vocab_size = target.vocab_size if vocab_size is None else vocab_size
        self.max_length = target.max_length if max_length is None else min(max_length, target.max_length)
        if growth is None:
            growth = Levels(
                shape or levels(branching or (1,) * depth), self.vocab_size, sample=sample, siblings=siblings
            )
        self.growth, self.trees = growth, growth.trees
        _check_trees(target, self.trees)
        self.max_depth, self.max_nodes = growth.depth, growth.nodes
        self._follower = _Regrowing if self.trees else _Appending
        self._made: TokenCache | None = None
        self._within: int | None = None

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """By token; nothing is known of a draft model whose cache is not in our pages."""
        return CacheNeed(token=getattr(self.model, "token_bytes", 0))

    def keep_within(self, tokens: int) -> None:
        """Limit the pages. A sequence for which there are none is not drafted for."""
        self._within = tokens

    def bind(self, slots: int, length: int) -> None:
        """Allocate the draft model's KV cache."""
        limit = min(length, self.max_length)
        capacity, token = limit + self._slack, self.cache_need(slots, length).token
        # one whole sequence has to fit, with the nodes of a tree that the target does not score
        memory = None if self._within is None or not token else token * max(self._within, capacity + PAGE)
        try:
            self._made = self._new_cache(slots, capacity, limit, memory)
        except CapacityError as error:
            raise CapacityError(f"the draft model {self.name!r}: {error}") from None

    @property
    def _slack(self) -> int:
        """Rows of a draft that are in the cache at once."""
        return self.growth.max_expanded_nodes if self.trees else 0

    def _new_cache(self, slots: int, capacity: int, limit: int, memory: int | None) -> TokenCache:
        return TokenCache(self.model, slots, capacity, limit, memory)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.cache.release(slots)
        self.growth.forget(slots)

    @property
    def cache(self) -> TokenCache:
        """The draft model's tokens, keys and values."""
        if self._made is None:
            raise ConfigError("the model drafter has no cache yet: call bind(slots, length) before drafting")
        return self._made

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Catch up with every sequence, then propose `budget[i]` levels for sequence i, fewer where the context ends.

        A sequence with budget 0 catches up lazily, in full chunks of its committed tokens.
        """
        cache, views = self.cache, evidence.sequences
        depths = [self._room(v, b) for v, b in zip(views, budget, strict=True)]
        for view in views:
            cache.rewind(view)
        room = cache.affordable(views, depths, self._slack or self.max_depth)
        fed = [(v, d) for v, d in zip(views, room, strict=True) if d is not None]
        cache.ingest([v for v, _ in fed], [len(v.tokens) if d else v.cached for v, d in fed], CHUNK)
        forest, depths = Forest(len(views)), [d or 0 for d in room]
        live = [i for i, d in enumerate(depths) if d]
        if live:
            self._propose(cache, evidence, depths, live, forest)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _room(self, view: SequenceView, budget: int) -> int:
        """Levels to draft: the deepest node that is fed to the model stands at position len + levels - 2."""
        return max(0, min(budget, self.max_depth, self.cache.limit - len(view.tokens) + 1))

    def _propose(
        self, cache: TokenCache, evidence: Evidence, depths: list[int], live: list[int], forest: Forest
    ) -> None:
        views = evidence.sequences
        slots = [views[i].slot for i in live]
        # one forward over the tokens missing in the cache and the anchor: its last rows give the first level
        logits = cache.append(slots, [views[i].tokens[len(cache.held[s]) :] for i, s in zip(live, slots, strict=True)])
        self.growth.grow(evidence, depths, forest, logits, self._follower(cache, views, forest))


class _Appending:
    """The next level of chains: each node's keys and values are kept, and later truncated to the accepted ones."""

    def __init__(self, cache: TokenCache, views: Sequence[SequenceView], forest: Forest) -> None:
        self._cache, self._slots, self._forest = cache, [v.slot for v in views], forest

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        tokens = self._forest.tokens
        return self._cache.append([self._slots[i] for i, _ in frontier], [[tokens[i][k]] for i, k in frontier])

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """Every level takes a forward."""

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """See `tree.chain.Foreseeing`."""
        return self._cache.ahead([self._slots[i] for i in live], [d - 1 for d in depth])


class _Regrowing:
    """The next level of trees: the anchor and all nodes so far are scored again as one forest."""

    def __init__(self, cache: TokenCache, views: Sequence[SequenceView], forest: Forest) -> None:
        self._cache, self._views, self._forest = cache, views, forest

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        cache, live = self._cache, list(dict.fromkeys(i for i, _ in frontier))
        views = [self._views[i] for i in live]
        nodes = self._forest.nodes(live, cache.model.device)
        rows = Rows.assemble(
            [v.slot for v in views],
            [cache.known(v.tokens[-1:]) for v in views],
            [len(v.tokens) - 1 for v in views],
            nodes,
        )
        number = {i: b for b, i in enumerate(live)}
        scored = [nodes.row(number[i], nodes.nodes(number[i])[k]) for i, k in frontier]
        return cache.score(replace(rows, scored=rows.scored[scored]))


def _check(target: Target, depth: int, branching: Sequence[int] | None) -> None:
    if depth < 1:
        raise ConfigError(f"a draft model needs a length >= 1, got {depth}; use the drafter 'none' to draft nothing")
    if branching is not None and len(branching) != depth:
        raise ConfigError(
            f"branching needs {depth} numbers >= 1, one for each level of the draft, got {tuple(branching)}"
        )
    if not target.rewinds:
        raise CapabilityError(
            "this draft model cannot forget rejected tokens (recurrent state): choose an attention model"
        )


def _check_trees(target: Target, trees: bool) -> None:
    if trees and not target.trees:
        raise CapabilityError("this draft model cannot score trees: use a chain (branching 1 at every level)")

"""Serving a block drafter: it injects keys and values of every accepted row, and makes one bidirectional pass per block.

The model is `network.DFlashNetwork`. Accepted rows are injected once and kept; the rows of a block are written after them for one
pass only and then dropped, so that nothing rejected is ever visible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.context import Backlog, Context
from outrider.drafters.dflash.forward import Forward, forward_of, shape_of
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, LevelLogits
from outrider.errors import ConfigError
from outrider.nn.drafts import Rows
from outrider.nn.row_cache import RowCache
from outrider.protocols import Drafter, Target
from outrider.records import CacheNeed
from outrider.types import Draft, Evidence, SequenceView


class DFlashDrafter:
    """Drafts a whole block at once with a model that has its own cache of injected keys and values.

    growth: how drafts are made from the slots' distributions: a chain, sampled or greedy, or the best nodes of their lattice. A
    block has growth.depth + 1 slots, so drafts may be shorter than the training blocks, never longer. forward: makes the forward of
    the model for slots of so many rows.

    Every accepted row of the target is injected, even if nothing is drafted, because hidden states are available only once; while
    nothing is drafted for a sequence they are put aside, and injected together later. A sequence with missed rows starts over with
    the rows it has: its drafts are then less accurate, but still exact.
    """

    def __init__(
        self,
        model: DFlashNetwork,
        growth: Growth,
        *,
        name: str = "dflash",
        forward: Callable[[DFlashNetwork, int], Forward] = forward_of,
    ) -> None:
        c = model.config
        if growth.depth >= c.block:
            raise ConfigError(
                f"a draft of {growth.depth} tokens needs blocks of {growth.depth + 1} slots, this drafter was trained "
                f"with {c.block}: shorten the draft"
            )
        self.name, self.model, self.growth, self._forward_of = name, model, growth, forward
        self.layers: tuple[int, ...] = tuple(sorted(set(c.taps)))
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._order = [self.layers.index(t) for t in c.taps]
        self._size = growth.depth + 1
        self.context = Context(0)
        self.backlog = Backlog(self.context)
        self._run: Forward | None = None

    def bind(self, slots: int, length: int) -> None:
        """Allocate the drafter's KV cache: per layer keys and values of `length` rows and one block for every slot."""
        c = self.model.config
        room = length + self._size
        self._run, device = self._forward_of(self.model, room), self.model.fc.weight.device
        self.cache = RowCache(c.layers, slots, c.kv_heads, room, c.head_dim, self._run.dtype, device)
        self.context = Context(slots)
        self.backlog = Backlog(self.context)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """What `bind` allocates, and rows that are put aside."""
        c, dtype = self.model.config, self.model.fc.weight.dtype
        size = RowCache.size(c.layers, slots, c.kv_heads, length + self._size, c.head_dim, dtype)
        return CacheNeed(fixed=size + Backlog.size(slots, len(self._order), c.hidden, dtype))

    def keep_within(self, tokens: int) -> None:
        """Nothing: it has no pages."""

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.cache.release(slots)
        self.context.release(slots)
        self.backlog.release(slots)
        self.growth.forget(slots)

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Inject every kept row, then propose up to `budget[i]` tokens behind the anchor of sequence i."""
        if self._run is None:
            raise ConfigError("the block drafter has no cache yet: call bind(slots, length) before drafting")
        wanted = {view.slot for view, depth in zip(evidence.sequences, budget, strict=True) if depth > 0}
        self._catch_up(self._run, evidence, wanted)
        if not wanted:
            return Draft.empty(len(budget), evidence.scores.logits.device)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        live: list[SequenceView] = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self.context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                live.append(view)
        if live:
            logits = self._block(self._run, live)
            self.growth.grow(evidence, depths, forest, logits[0], LevelLogits(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, run: Forward, evidence: Evidence, wanted: set[int]) -> None:
        """Keys and values of every kept row, all sequences in one pass; the slots `wanted` at least."""
        work, taps = self.backlog.due(evidence, self._order, wanted)
        if not work:
            return
        self.cache.release([new.view.slot for new in work if new.gap])
        rows = Rows()
        for new in work:
            count, held = len(new.rows), self.cache.length[new.view.slot]
            rows.add(new.view.slot, held, [0] * count, range(new.start, new.start + count))
        run.inject(rows, self.cache, taps, [r for new in work for r in new.rows])
        for new in work:
            self.cache.length[new.view.slot] += len(new.rows)
            self.context.next[new.view.slot] += len(new.rows)

    def _block(self, run: Forward, views: list[SequenceView]) -> Float[Tensor, "levels n V"]:
        """Logits of every slot after the anchor, for all sequences in one pass."""
        size, mask = self._size, self.model.config.mask
        rows = Rows(mutual=True)
        for v in views:
            at = len(v.tokens) - 1
            rows.add(v.slot, self.cache.length[v.slot], [v.tokens[-1], *(mask,) * (size - 1)], range(at, at + size))
        rows.scored = [n * size + level for level in range(1, size) for n in range(len(views))]
        return run.block(rows, self.cache).view(size - 1, len(views), -1)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    model = DFlashNetwork.load(folder, target, target_path).to(target.device)
    forward = partial(forward_of, rounding=spec.rounding_for(model.fc.weight, fits=shape_of(model).fits))
    return DFlashDrafter(model, spec.at_most(model.config.block - 1).growth(target.vocab_size), forward=forward)

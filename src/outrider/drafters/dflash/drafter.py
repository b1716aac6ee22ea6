"""Serving a block drafter: it injects keys and values of every accepted row, and makes one bidirectional pass per block.

The model is `network.DFlashNetwork`. Accepted rows are injected once and kept; the rows of a block are written after them for one
pass only and then dropped, so that nothing rejected is ever visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.context import Context, new_rows, taps_of
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, LevelLogits
from outrider.errors import ConfigError
from outrider.nn.attention import attend
from outrider.nn.kv import RowCache
from outrider.nn.layers import FusedLayer
from outrider.nn.linear import draft_linear, with_fast_linears
from outrider.nn.rope import turn
from outrider.protocols import Drafter, Target
from outrider.types import Draft, Evidence, SequenceView


class DFlashDrafter:
    """Drafts a whole block at once with a model that has its own cache of injected keys and values.

    growth: how drafts are made from the slots' distributions: a chain, sampled or greedy, or the best nodes of their lattice. A
    block has growth.depth + 1 slots, so drafts may be shorter than the training blocks, never longer.

    After a step every accepted row of the target is injected, even if nothing is drafted, because hidden states are available only
    once. A sequence with missed rows starts over with the rows it has: its drafts are then less accurate, but still exact.
    """

    def __init__(self, model: DFlashNetwork, growth: Growth, *, name: str = "dflash") -> None:
        c = model.config
        if growth.depth >= c.block:
            raise ConfigError(
                f"a draft of {growth.depth} tokens needs blocks of {growth.depth + 1} slots, this drafter was trained "
                f"with {c.block}: shorten the draft"
            )
        self.name, self.model, self.growth = name, model, growth
        self.layers: tuple[int, ...] = tuple(sorted(set(c.taps)))
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._order = [self.layers.index(t) for t in c.taps]
        self._size = growth.depth + 1
        attention: list[Any] = [layer.self_attn for layer in model.layers]
        self._run = [FusedLayer.of(layer) for layer in model.layers]
        self._net = with_fast_linears(model)
        self._k_norms = [a.k_norm for a in attention]
        self._inject = draft_linear(torch.cat([w for a in attention for w in (a.k_proj.weight, a.v_proj.weight)]))
        self._dtype, self._device = model.fc.weight.dtype, model.fc.weight.device
        self.context = Context(0)

    def bind(self, slots: int, length: int) -> None:
        """Allocate the drafter's KV cache: per layer keys and values of `length` rows and one block for every slot."""
        c = self.model.config
        room = length + self._size
        self.cache = RowCache(c.layers, slots, c.kv_heads, room, c.head_dim, self._dtype, self._device)
        self._angles = self.model.rotation(torch.arange(room, device=self._device))
        self.context = Context(slots)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.cache.release(slots)
        self.context.release(slots)
        self.growth.forget(slots)

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Inject every kept row, then propose up to `budget[i]` tokens behind the anchor of sequence i."""
        if not self.context.next:
            raise ConfigError("the block drafter has no cache yet: call bind(slots, length) before drafting")
        self._catch_up(evidence)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        live: list[SequenceView] = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self.context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                live.append(view)
        if live:
            logits = self._block(live)
            self.growth.grow(evidence, depths, forest, logits[0], LevelLogits(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, evidence: Evidence) -> None:
        """Keys and values of every kept row, all sequences in one pass."""
        work = new_rows(evidence, self.context)
        if not work:
            return
        self.cache.release([new.view.slot for new in work if new.gap])
        rows = [r for new in work for r in new.rows]
        position = [p for new in work for p in range(new.start, new.start + len(new.rows))]
        c, taps = self.model.config, taps_of(evidence, self._order, rows).flatten(1)
        context = self._net.hidden_norm(self._net.fc(taps.to(self._dtype)))
        kv = self._inject(context).view(len(rows), c.layers, 2, c.kv_heads, c.head_dim)
        turns = self._turns(position)
        for n, norm in enumerate(self._k_norms):
            kv[:, n, 0] = turn(norm(kv[:, n, 0]), *turns)
        first = 0
        for new in work:
            slot, count = new.view.slot, len(new.rows)
            self.cache.append(slot, *kv[first : first + count].unbind(2))
            self.context.next[slot] += count
            first += count

    def _block(self, views: list[SequenceView]) -> Float[Tensor, "levels n V"]:
        """Logits of every slot after the anchor, for all sequences in one pass."""
        c, size = self.model.config, self._size
        token = [t for v in views for t in (v.tokens[-1], *(c.mask,) * (size - 1))]
        turns = self._turns([p for v in views for p in range(len(v.tokens) - 1, len(v.tokens) - 1 + size)])
        x = self.model.embed_tokens(self._long(token))
        for n, layer in enumerate(self._run):
            x = self._layer(n, layer, x, turns, views)
        x = x.view(len(views), size, -1)[:, 1:].transpose(0, 1)
        return self._net.lm_head(self._net.norm(x))

    def _layer(
        self,
        n: int,
        layer: FusedLayer,
        x: Float[Tensor, "m H"],
        turns: tuple[Tensor, Tensor],
        views: list[SequenceView],
    ) -> Float[Tensor, "m H"]:
        c = self.model.config
        qkv = layer.qkv(layer.norm1(x)).view(len(x), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = qkv.split((c.heads + c.kv_heads, c.kv_heads), 1)
        qk = qk if layer.qk_norm is None else layer.qk_norm(qk)
        q, k = turn(qk, *turns).split((c.heads, c.kv_heads), 1)
        seen = []
        for view, mine in zip(views, range(0, len(x), self._size), strict=True):
            own, held = slice(mine, mine + self._size), self.cache.length[view.slot]
            keys, values = self.cache.write(n, view.slot, held, k[own], v[own])
            out = attend(q[own].transpose(0, 1), keys, values)
            seen.append(out.transpose(0, 1).reshape(self._size, -1))
        return layer.leave(seen[0] if len(seen) == 1 else torch.cat(seen), x)

    def _turns(self, position: list[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions."""
        at = self._long(position)
        cos, sin = self._angles
        return cos[at], sin[at]

    def _long(self, x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=self._device)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    model = DFlashNetwork.load(folder, target, target_path).to(target.device)
    return DFlashDrafter(model, spec.at_most(model.config.block - 1).growth(target.vocab_size))

"""Serving a block drafter: injected keys and values of every accepted row, and one bidirectional pass per block.

The model is `block.BlockModel`. What the target has accepted is injected once and kept; the rows of a block are written behind
it for the length of a pass and forgotten, so that nothing rejected is ever visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from outrider.drafters._layers import turn
from outrider.drafters._serving import product, served
from outrider.drafters.dflash.network import BlockModel
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, lattice
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView


class _Layer:
    """A layer's weights as serving wants them: projections side by side, the feed-forward part fused."""

    def __init__(self, layer: Any) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.kv = attn.k_proj.weight, attn.v_proj.weight
        self.qkv = product(torch.cat([attn.q_proj.weight, *self.kv]))
        self.o, self.down = product(attn.o_proj.weight), product(mlp.down_proj.weight)
        self.gate_up = product(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.enter, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm


class BlockDrafter:
    """Drafts a whole block at once with a model that has its own cache of injected keys and values.

    growth: what is made of the slots' laws: a chain, sampled or of the most likely tokens, or the best nodes of their
    lattice. A block has growth.depth + 1 slots, so drafts may be shorter than the blocks of the training, never longer.

    After a step every kept row of the target is injected, also when nothing is to be drafted: hidden states are seen once. A
    sequence whose rows were not all seen starts over with those that were: its draft is worse then, never wrong.
    """

    def __init__(self, model: BlockModel, growth: Growth, *, name: str = "dflash") -> None:
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
        self._run = [_Layer(layer) for layer in model.layers]
        self._net = served(model)
        self._inject = product(torch.cat([w for layer in self._run for w in layer.kv]))
        self._dtype, self._device = model.fc.weight.dtype, model.fc.weight.device
        self._held: list[int] = []
        self._next: list[int] = []

    def bind(self, slots: int, length: int) -> None:
        """Make the drafter's own cache: per layer keys and values of `length` rows and a block for every slot."""
        c = self.model.config
        shape = (c.layers, 2, slots, c.kv_heads, length + self._size, c.head_dim)
        self._kv = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._angles = self.model.rotation(torch.arange(length + self._size, device=self._device))
        self._held, self._next = [0] * slots, [0] * slots

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._held[slot] = self._next[slot] = 0

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Inject every kept row, then propose up to `budget[i]` tokens behind the anchor of sequence i."""
        if not self._held:
            raise ConfigError("the block drafter has no cache yet: call bind(slots, length) before drafting")
        self._catch_up(evidence)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        live: list[SequenceView] = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self._held[view.slot] and self._next[view.slot] == len(view.tokens) - 1:
                depths[i] = min(depth, self.max_depth)
                live.append(view)
        if live:
            logits = self._block(live)
            self.growth.grow(evidence, depths, forest, logits[0], lattice(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, evidence: Evidence) -> None:
        """Keys and values of every kept row, all sequences in one pass."""
        work: list[tuple[int, int]] = []  # slot, rows
        rows: list[int] = []
        position: list[int] = []
        for i, view in enumerate(evidence.sequences):
            kept = evidence.kept_rows(i)
            if not kept:
                continue
            start = view.cached - len(kept)
            if self._next[view.slot] != start:
                self._held[view.slot], self._next[view.slot] = 0, start
            work.append((view.slot, len(kept)))
            rows += kept
            position += range(start, start + len(kept))
        if not work:
            return
        c, hidden = self.model.config, evidence.scores.hidden
        taps = torch.cat([hidden[n] for n in self._order], -1) if len(self._order) > 1 else hidden[0]
        if rows != list(range(len(taps))):
            taps = taps[rows]
        context = self._net.hidden_norm(self._net.fc(taps.to(self._dtype)))
        kv = self._inject(context).view(len(rows), c.layers, 2, c.kv_heads, c.head_dim)
        for n, layer in enumerate(self._run):
            kv[:, n, 0] = self._turn(layer.k_norm(kv[:, n, 0]), self._long(position))
        first = 0
        for slot, count in work:
            held = self._held[slot]
            self._kv[:, :, slot, :, held : held + count] = kv[first : first + count].permute(1, 2, 3, 0, 4)
            self._held[slot], self._next[slot] = held + count, self._next[slot] + count
            first += count

    def _block(self, views: list[SequenceView]) -> Float[Tensor, "levels n V"]:
        """Logits of every slot behind the anchor, for all sequences in one pass."""
        c, size = self.model.config, self._size
        token = [t for v in views for t in (v.tokens[-1], *(c.mask,) * (size - 1))]
        position = self._long([p for v in views for p in range(self._next[v.slot], self._next[v.slot] + size)])
        x = self.model.embed_tokens(self._long(token))
        for n, layer in enumerate(self._run):
            x = self._layer(n, layer, x, position, views)
        x = x.view(len(views), size, -1)[:, 1:].transpose(0, 1)
        return self._net.lm_head(self._net.norm(x))

    def _layer(
        self, n: int, layer: _Layer, x: Float[Tensor, "m H"], position: Tensor, views: list[SequenceView]
    ) -> Float[Tensor, "m H"]:
        c = self.model.config
        qkv = layer.qkv(layer.enter(x)).view(len(x), c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), 1)
        q, k = self._turn(layer.q_norm(q), position), self._turn(layer.k_norm(k), position)
        seen = []
        for view, mine in zip(views, range(0, len(x), self._size), strict=True):
            own, start = slice(mine, mine + self._size), self._held[view.slot]
            kv = self._kv[n, :, view.slot, :, : start + self._size]
            kv[0, :, start:] = k[own].transpose(0, 1)
            kv[1, :, start:] = v[own].transpose(0, 1)
            out = F.scaled_dot_product_attention(
                q[own].transpose(0, 1)[None], kv[0][None], kv[1][None], enable_gqa=c.heads != c.kv_heads
            )
            seen.append(out[0].transpose(0, 1).reshape(self._size, -1))
        x = layer.o.add(seen[0] if len(seen) == 1 else torch.cat(seen), x)
        gate, up = layer.gate_up(layer.between(x)).chunk(2, -1)
        return layer.down.add(F.silu(gate).mul_(up), x)

    def _turn(self, x: Float[Tensor, "m h d"], position: Tensor) -> Float[Tensor, "m h d"]:
        cos, sin = (t[position] for t in self._angles)
        return turn(x, cos, sin)

    def _long(self, x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=self._device)

"""Serving a feature drafter: its own keys and values, catching up on what was accepted, growing chains and trees.

The model is a `_features.FeatureNetwork`: EAGLE-3's or EAGLE-1's. Rows of several sequences go through the matrix products
together; attention runs per sequence, over its own context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from outrider.drafters._serving import product, served
from outrider.drafters.eagle.network import FeatureNetwork
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView

CHUNK = 256
"""Most rows of one sequence in one pass."""


class _Served:
    """The weights as serving wants them: fused, positions in a table. rows -> (residual, q, k, v) -> state."""

    def __init__(self, model: FeatureNetwork, length: int) -> None:
        c, layer = model.config, model.layers[0]
        attn, mlp = layer.self_attn, layer.mlp
        self.config, self.model = c, served(model)
        self.dtype = model.fc.weight.dtype
        self._qkv = product(torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]))  # type: ignore[union-attr]
        self._gate_up = product(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))  # type: ignore[union-attr]
        self._tokens = model.rows(torch.arange(c.vocab_size, device=model.fc.weight.device))
        self._o, self._down = product(attn.o_proj.weight), product(mlp.down_proj.weight)  # type: ignore[union-attr]
        self._norm = layer.post_attention_layernorm
        cos, sin = model.rotation(torch.arange(length, device=model.fc.weight.device))
        half = c.head_dim // 2
        self._turns = torch.cat([cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)], -2)  # [L, 2, d]

    def enter(self, token: Tensor, g: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`FeatureNetwork.enter` for flat rows."""
        c, half = self.config, self.config.head_dim // 2
        residual, x = self.model.join(self._tokens[token], g)
        x = self._qkv(x).view(len(token), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = x.split((c.heads + c.kv_heads, c.kv_heads), 1)
        cos, sin = self._turns[position].split(1, 1)
        qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
        q, k = qk.split((c.heads, c.kv_heads), 1)
        return residual, q, k, v

    def leave(self, residual: Tensor, seen: Tensor) -> Tensor:
        """`FeatureNetwork.leave` for flat rows."""
        x = self._o.add(seen, residual)
        gate, up = self._gate_up(self._norm(x)).chunk(2, -1)  # type: ignore[operator]
        return self._down.add(F.silu(gate).mul_(up), x)


class _Place:
    """What a slot holds: `held` context rows, the last of them of position `next - 1`, its state, and the draft's rows."""

    __slots__ = ("held", "next", "nodes", "state")

    def __init__(self) -> None:
        self.held = self.next = 0
        self.state: Tensor | None = None
        self.nodes: dict[int, tuple[Tensor, list[int]]] = {-1: (torch.empty(0), [])}


class Eagle:
    """Drafts with a feature model that has its own cache of one layer.

    growth: how drafts grow: chains and trees of a fixed shape, sampled or not, or the best nodes first (EAGLE-2).

    After a step every kept row of the target is a new context row, also when nothing is to be drafted: hidden states are seen
    once. A sequence whose rows were not all seen starts over with those that were: its draft is worse then, never wrong.
    """

    def __init__(self, model: FeatureNetwork, growth: Growth, *, name: str = "eagle") -> None:
        self.name, self.model, self.growth = name, model, growth
        self.layers: tuple[int, ...] = tuple(sorted(set(model.config.taps)))
        self._order = [self.layers.index(t) for t in model.config.taps]
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._places: list[_Place] = []
        self._run: _Served | None = None

    def bind(self, slots: int, length: int) -> None:
        """Make the drafter's own cache."""
        c, capacity = self.model.config, length + self.growth.looked_at
        self._run = _Served(self.model, capacity)
        shape = (2, slots, c.kv_heads, capacity, c.head_dim)
        self._kv = torch.zeros(shape, dtype=self._run.dtype, device=self.model.fc.weight.device)
        self._places = [_Place() for _ in range(slots)]

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._places[slot] = _Place()

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Catch up with every kept row, then propose `budget[i]` levels for sequence i."""
        if self._run is None:
            raise ConfigError("the feature drafter has no cache yet: call bind(slots, length) before drafting")
        self._catch_up(self._run, evidence)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        states = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            place = self._places[view.slot]
            if depth > 0 and place.state is not None and place.next == len(view.tokens) - 1:
                depths[i] = min(depth, self.max_depth)
                place.nodes = {-1: (place.state, [])}
                states.append(place.state)
        if states:
            follow = self._follower(self._run, evidence.sequences, forest)
            self.growth.grow(evidence, depths, forest, self._run.model.logits(torch.stack(states)), follow)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, run: _Served, evidence: Evidence) -> None:
        """Feed the pairs (hidden states of a kept row, the token behind it), all sequences in one pass where chunks allow."""
        work: list[tuple[SequenceView, list[int]]] = []
        for i, view in enumerate(evidence.sequences):
            kept = evidence.kept_rows(i)
            if not kept:
                continue
            place = self._places[view.slot]
            if place.next != view.cached - len(kept):
                self._places[view.slot] = place = _Place()
                place.next = view.cached - len(kept)
            work.append((view, kept))
        while work:
            self._feed(run, evidence, [(v, kept[:CHUNK]) for v, kept in work])
            work = [(v, kept[CHUNK:]) for v, kept in work if len(kept) > CHUNK]

    def _feed(self, run: _Served, evidence: Evidence, work: list[tuple[SequenceView, list[int]]]) -> None:
        rows = [r for _, kept in work for r in kept]
        hidden = evidence.scores.hidden
        taps = torch.stack([hidden[n] for n in self._order], 1) if len(self._order) > 1 else hidden[0][:, None]
        if rows != list(range(len(taps))):
            taps = taps[rows]
        g = run.model.read(taps.to(run.dtype))
        token, position = [], []
        for view, kept in work:
            at = self._places[view.slot].next
            token += view.tokens[at + 1 : at + 1 + len(kept)]
            position += range(at, at + len(kept))
        residual, q, k, v = run.enter(self._long(token), g, self._long(position))
        seen, first = [], 0
        for view, kept in work:
            place, n = self._places[view.slot], len(kept)
            mine = slice(first, first + n)
            self._kv[0, view.slot, :, place.held : place.held + n] = k[mine].transpose(0, 1)
            self._kv[1, view.slot, :, place.held : place.held + n] = v[mine].transpose(0, 1)
            see = None
            if n > 1:
                see = torch.ones(n, place.held + n, dtype=torch.bool, device=g.device).tril(place.held)
            seen.append(self._attend(view.slot, q[mine], place.held + n, see))
            place.held, place.next = place.held + n, place.next + n
            first += n
        state = run.leave(residual, seen[0] if len(seen) == 1 else torch.cat(seen))
        first = 0
        for view, kept in work:
            first += len(kept)
            self._places[view.slot].state = state[first - 1]

    def _follower(
        self, run: _Served, views: Sequence[SequenceView], forest: Forest
    ) -> Callable[[list[tuple[int, int]]], Float[Tensor, "n V"]]:
        """Feeds draft nodes: each sees the context, its ancestors and itself; its hidden state is its parent's output."""

        def follow(ends: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
            depth = len(forest.path(*ends[0]))
            places = [self._places[views[i].slot] for i, _ in ends]
            above = [p.nodes[forest.parent[i][k]] for p, (i, k) in zip(places, ends, strict=True)]
            g = torch.stack([state for state, _ in above])
            token = self._long([forest.tokens[i][k] for i, k in ends])
            position = self._long([p.next + depth - 1 for p in places])
            residual, q, k, v = run.enter(token, g, position)
            seen, first = [], 0
            while first < len(ends):
                last = first
                while last < len(ends) and ends[last][0] == ends[first][0]:
                    last += 1
                place, slot, mine = places[first], views[ends[first][0]].slot, slice(first, last)
                fed = len(place.nodes) - 1
                start, stop = place.held + fed, place.held + fed + last - first
                self._kv[0, slot, :, start:stop] = k[mine].transpose(0, 1)
                self._kv[1, slot, :, start:stop] = v[mine].transpose(0, 1)
                lines = [[*line, fed + n] for n, (_, line) in enumerate(above[mine])]
                see = None if len(lines[0]) == fed + 1 == stop - place.held else self._mask(place.held, stop, lines)
                seen.append(self._attend(slot, q[mine], stop, see))
                for (_, node), line in zip(ends[mine], lines, strict=True):
                    place.nodes[node] = (g[0], line)  # its state comes below
                first = last
            state = run.leave(residual, seen[0] if len(seen) == 1 else torch.cat(seen))
            for n, (place, (_, node)) in enumerate(zip(places, ends, strict=True)):
                place.nodes[node] = (state[n], place.nodes[node][1])
            return run.model.logits(state)

        return follow

    def _mask(self, held: int, stop: int, lines: list[list[int]]) -> Tensor:
        """Which places each row sees: the context, and among the draft's rows those of its line."""
        rows = []
        for line in lines:
            row = bytearray(b"\1" * held + b"\0" * (stop - held))
            for n in line:
                row[held + n] = 1
            rows.append(row)
        see = torch.frombuffer(bytearray().join(rows), dtype=torch.bool)
        return see.view(len(lines), stop).to(self._kv.device)

    def _attend(self, slot: int, q: Float[Tensor, "n h d"], stop: int, see: Tensor | None) -> Float[Tensor, "n A"]:
        c = self.model.config
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            self._kv[0, slot, :, :stop][None],
            self._kv[1, slot, :, :stop][None],
            attn_mask=see,
            enable_gqa=c.heads != c.kv_heads,
        )
        return out[0].transpose(0, 1).reshape(len(q), -1)

    def _long(self, x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=self._kv.device)

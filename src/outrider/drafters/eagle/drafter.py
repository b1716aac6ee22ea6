"""Serving an EAGLE drafter: its own KV cache, catching up with accepted tokens, growing chains and trees.

The model is a `network.EagleNetwork`: EAGLE-3's or EAGLE-1's. Rows of several sequences go through the matrix products
together; attention runs per sequence, over its own context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.checkpoint import read_config
from outrider.drafters.context import Context, new_rows, taps_of
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.errors import ConfigError
from outrider.nn import rope
from outrider.nn.attention import attend
from outrider.nn.kv import RowCache
from outrider.nn.layers import FusedLayer
from outrider.nn.linear import with_fast_linears
from outrider.nn.masks import ancestor_mask
from outrider.protocols import Drafter, Target
from outrider.types import Draft, Evidence, SequenceView

CHUNK = 256
"""Most rows of one sequence in one pass."""


class FusedNetwork:
    """The weights fused for serving, positions in a table. rows -> (residual, q, k, v); `layer.leave` -> state."""

    def __init__(self, model: EagleNetwork, length: int) -> None:
        c, device = model.config, model.fc.weight.device
        self.config, self.model, self.layer = c, with_fast_linears(model), FusedLayer.of(model.layers[0])
        self.dtype = model.fc.weight.dtype
        self._tokens = model.rows(torch.arange(c.vocab_size, device=device))
        self._turns = rope.table(rope.frequencies(c.head_dim, c.rope_theta, device), length).to(self.dtype)

    def enter(self, token: Tensor, g: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`EagleNetwork.enter` for flat rows."""
        c = self.config
        residual, x = self.model.join(self._tokens[token], g)
        x = self.layer.qkv(x).view(len(token), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = x.split((c.heads + c.kv_heads, c.kv_heads), 1)
        q, k = rope.rotate(qk, *rope.angles(self._turns, position)).split((c.heads, c.kv_heads), 1)
        return residual, q, k, v


class SlotState:
    """What is known of a slot beside its context rows: the state of the last of them, the draft's rows.

    parents: of each row of the draft, its parent's number among them, -1 for the context. nodes: state and row of each node.
    """

    __slots__ = ("nodes", "parents", "state")

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.nodes: dict[int, tuple[Tensor, int]] = {}
        self.parents: list[int] = []


class EagleDrafter:
    """Drafts with a feature model that has its own KV cache of one layer.

    growth: how drafts grow: chains and trees of a fixed shape, sampled or greedy, or best-first trees (EAGLE-2).

    After a step every accepted row of the target is a new context row, even if nothing is drafted, because hidden states are
    available only once. A sequence with missed rows starts over with the rows it has: its drafts are then less accurate, but still
    exact.
    """

    def __init__(self, model: EagleNetwork, growth: Growth, *, name: str = "eagle") -> None:
        self.name, self.model, self.growth = name, model, growth
        self.layers: tuple[int, ...] = tuple(sorted(set(model.config.taps)))
        self._order = [self.layers.index(t) for t in model.config.taps]
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self.context = Context(0)
        self._states: list[SlotState] = []
        self._run: FusedNetwork | None = None

    def bind(self, slots: int, length: int) -> None:
        """Allocate the drafter's KV cache."""
        c, capacity = self.model.config, length + self.growth.max_expanded_nodes
        self._run = FusedNetwork(self.model, capacity)
        self.cache = RowCache(1, slots, c.kv_heads, capacity, c.head_dim, self._run.dtype, self.model.fc.weight.device)
        self.context = Context(slots)
        self._states = [SlotState() for _ in range(slots)]

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.cache.release(slots)
        self.context.release(slots)
        self.growth.forget(slots)
        for slot in slots:
            self._states[slot] = SlotState()

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Catch up with every accepted row, then propose `budget[i]` levels for sequence i."""
        if self._run is None:
            raise ConfigError("the feature drafter has no cache yet: call bind(slots, length) before drafting")
        self._catch_up(self._run, evidence)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        states = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            place = self._states[view.slot]
            if depth > 0 and place.state is not None and self.context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                place.nodes, place.parents = {-1: (place.state, -1)}, []
                states.append(place.state)
        if states:
            follow = self._follower(self._run, evidence.sequences, forest)
            self.growth.grow(evidence, depths, forest, self._run.model.logits(torch.stack(states)), follow)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, run: FusedNetwork, evidence: Evidence) -> None:
        """Feed the pairs (hidden states of a kept row, the token behind it), all sequences in one pass where chunks allow."""
        found = new_rows(evidence, self.context)
        self.cache.release([new.view.slot for new in found if new.gap])
        work = [(new.view, new.rows) for new in found]
        while work:
            self._feed(run, evidence, [(v, kept[:CHUNK]) for v, kept in work])
            work = [(v, kept[CHUNK:]) for v, kept in work if len(kept) > CHUNK]

    def _feed(self, run: FusedNetwork, evidence: Evidence, work: list[tuple[SequenceView, list[int]]]) -> None:
        rows = [r for _, kept in work for r in kept]
        g = run.model.read(taps_of(evidence, self._order, rows).to(run.dtype))
        token, position = [], []
        for view, kept in work:
            at = self.context.next[view.slot]
            token += view.tokens[at + 1 : at + 1 + len(kept)]
            position += range(at, at + len(kept))
        residual, q, k, v = run.enter(self._long(token), g, self._long(position))
        seen, first = [], 0
        for view, kept in work:
            n, held = len(kept), self.cache.length[view.slot]
            mine = slice(first, first + n)
            self.cache.append(view.slot, k[mine, None], v[mine, None])
            see = ancestor_mask(n, (), held).to(g.device) if n > 1 else None
            seen.append(_attend(q[mine], *self.cache.read(0, view.slot, held + n), see))
            self.context.next[view.slot] += n
            first += n
        state = run.layer.leave(seen[0] if len(seen) == 1 else torch.cat(seen), residual)
        first = 0
        for view, kept in work:
            first += len(kept)
            self._states[view.slot].state = state[first - 1]

    def _follower(
        self, run: FusedNetwork, views: Sequence[SequenceView], forest: Forest
    ) -> Callable[[list[tuple[int, int]]], Float[Tensor, "n V"]]:
        """Returns a function that feeds draft nodes: each sees the context, its ancestors and itself; its feature is its parent's
        output."""

        def follow(frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
            depth = len(forest.path(*frontier[0]))
            places = [self._states[views[i].slot] for i, _ in frontier]
            above = [p.nodes[forest.parent[i][k]] for p, (i, k) in zip(places, frontier, strict=True)]
            g = torch.stack([state for state, _ in above])
            token = self._long([forest.tokens[i][k] for i, k in frontier])
            position = self._long([self.context.next[views[i].slot] + depth - 1 for i, _ in frontier])
            residual, q, k, v = run.enter(token, g, position)
            seen, first = [], 0
            while first < len(frontier):
                last = first
                while last < len(frontier) and frontier[last][0] == frontier[first][0]:
                    last += 1
                place, slot, mine = places[first], views[frontier[first][0]].slot, slice(first, last)
                held, fed = self.cache.length[slot], len(place.parents)
                place.parents += [row for _, row in above[mine]]
                keys, values = self.cache.write(0, slot, held + fed, k[mine], v[mine])
                chain = place.parents == list(range(-1, len(place.parents) - 1))
                see = None if chain else ancestor_mask(0, place.parents, held, last=last - first).to(g.device)
                seen.append(_attend(q[mine], keys, values, see))
                for row, (_, node) in enumerate(frontier[mine], fed):
                    place.nodes[node] = (g[0], row)  # its state is set below
                first = last
            state = run.layer.leave(seen[0] if len(seen) == 1 else torch.cat(seen), residual)
            for n, (place, (_, node)) in enumerate(zip(places, frontier, strict=True)):
                place.nodes[node] = (state[n], place.nodes[node][1])
            return run.model.logits(state)

        return follow

    def _long(self, x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=self.cache.k.device)


def _attend(
    q: Float[Tensor, "n h d"], keys: Float[Tensor, "g m d"], values: Float[Tensor, "g m d"], see: Tensor | None
) -> Float[Tensor, "n A"]:
    return attend(q.transpose(0, 1), keys, values, see).transpose(0, 1).reshape(len(q), -1)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    network = Eagle1Network if read_config(folder)[1] in ("eagle", "llama") else Eagle3Network
    return EagleDrafter(network.load(folder, target).to(target.device), spec.growth(target.vocab_size))

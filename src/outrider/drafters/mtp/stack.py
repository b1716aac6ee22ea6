"""Several MTP heads, one for each depth: DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 24).

S_1 of a token is the first head's output on it and the target's hidden state at the token before it; S_k of a token is head k's
output on it and S_(k-1) of the token before it. The logits behind the k-th token after the last one that the target has read come
from S_k, and beyond the last head from that one, which then reads its own output. So every head reads every token, and its cache
holds the same rows as the first one's, without the k - 1 tokens at the beginning of a text that it has no input for.

Within a draft a head is run only when its level is reached: it then reads all nodes of the draft so far, because the nodes above
are its context. That is one row more per level; heads are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.eagle.drafter import EagleDrafter, Follower, ForwardOf
from outrider.drafters.eagle.forward import Forward
from outrider.drafters.eagle.network import EagleNetwork
from outrider.drafters.mtp.network import MtpHead
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.nn.drafts import Rows
from outrider.nn.row_cache import RowCache
from outrider.records import CacheNeed


class _Later:
    """A head behind the first. model, run, cache: its own. newest: its output on a slot's newest token, where it has one."""

    def __init__(self, model: MtpHead, forward_of: ForwardOf) -> None:
        self.model, self._forward_of = model, forward_of
        self.newest: dict[int, Tensor] = {}

    def bind(self, slots: int, capacity: int) -> None:
        self.run: Forward = self._forward_of(self.model, capacity)
        c, device = self.model.config, self.model.fc.weight.device
        self.cache = RowCache(1, slots, c.kv_heads, capacity, c.head_dim, self.run.dtype, device)

    def release(self, slots: Sequence[int]) -> None:
        self.cache.release(slots)
        for slot in slots:
            self.newest.pop(slot, None)


@dataclass(slots=True)
class _Part:
    """Neighbouring tokens of a slot that every head reads. before: what the head before gave on the token before them, if it had
    that; state: what it gave on each of them, without those at the beginning of a text that it has no input for."""

    slot: int
    token: list[int]
    position: list[int]
    before: Tensor | None
    state: Float[Tensor, "n D"]


class HeadStack(EagleDrafter):
    """Drafts with a head for each depth. heads: two at least, each with what makes its forward, see `EagleDrafter`."""

    def __init__(self, heads: Sequence[tuple[MtpHead, ForwardOf]], growth: Growth) -> None:
        (first, forward), *later = heads
        super().__init__(first, growth, name="mtp", forward=forward)
        self.later = [_Later(model, forward_of) for model, forward_of in later]

    def bind(self, slots: int, length: int) -> None:
        """Allocate a cache for each head."""
        super().bind(slots, length)
        for head in self.later:
            head.bind(slots, self.cache.capacity)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """What `bind` allocates: heads of a checkpoint are of one shape; and rows that are put aside, for the first alone."""
        first = super().cache_need(slots, length)
        return CacheNeed(fixed=first.fixed + len(self.later) * self.cache_size(slots, length))

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        super().release(slots)
        for head in self.later:
            head.release(slots)

    def read_further(self, rows: Rows, state: Float[Tensor, "n D"]) -> None:
        """The other heads read the tokens that the first has read."""
        parts, at = list[_Part](), 0
        for slot, cached, count, *_ in rows.segments:
            own = slice(at, at + count)
            if not cached:  # the text begins here, or begins anew
                for head in self.later:
                    head.release([slot])
            before = self._states[slot].state if cached else None
            parts.append(_Part(slot, rows.token[own], rows.position[own], before, state[own]))
            at += count
        model = self.model
        for head in self.later:
            parts, model = self._read(head, model, parts), head.model

    @staticmethod
    def _read(head: _Later, above: EagleNetwork, parts: list[_Part]) -> list[_Part]:
        """One more head reads these tokens; the parts for the next one."""
        rows, features, given = Rows(), list[Tensor](), list[int]()
        for part in parts:
            feature = part.state[:-1] if part.before is None else torch.cat([part.before[None], part.state[:-1]])
            count = len(feature)
            given.append(count)
            if count:
                features.append(feature)
                rows.add(part.slot, head.cache.length[part.slot], part.token[-count:], part.position[-count:])
        if not features:
            return [replace(part, before=None, state=part.state[:0]) for part in parts]
        state, _ = head.run.forward(rows, head.cache, feature=above.feed(torch.cat(features)))
        out = list[_Part]()
        for part, own in zip(parts, state.split(given), strict=True):
            out.append(replace(part, before=head.newest.get(part.slot), state=own))
            if len(own):
                head.cache.length[part.slot] += len(own)
                head.newest[part.slot] = own[-1].clone()
        return out

    def follower(self, run: Forward, slots: list[int], starts: list[int], forest: Forest) -> HeadFollower:
        places = [self._states[slot] for slot in slots]
        return HeadFollower(run, self.model, self.cache, slots, places, starts, forest, self.later)


class HeadFollower(Follower):
    """Feeds draft nodes to the head of their level: first all nodes above, which are its context, then the nodes themselves."""

    def __init__(self, *given: Any) -> None:
        *first, self._later = given
        super().__init__(*first)
        self._fed: list[list[tuple[int, list[int]]]] = []
        """Of each level the nodes that were expanded: of each sequence with any."""
        self._given: dict[tuple[int, int], Tensor] = {}
        """The latest head's output on each node (sequence, node), -1 for the newest token of the text."""

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        self._fed.append([(i, [k for _, k in own]) for i, own in groupby(frontier, key=lambda pair: pair[0])])
        level = len(self._fed)
        head = self._later[min(level, len(self._later)) - 1]
        if level <= len(self._later):  # a head that has read nothing of this draft
            above = self._later[level - 2] if level > 1 else None
            return self._enter(head, above, frontier)
        return self._feed(head, head.model, self._fed[-1:], frontier, self._given)

    def _enter(self, head: _Later, above: _Later | None, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        known = dict(self._given)
        for i, slot in enumerate(self._slots):
            newest = self._places[i].state if above is None else above.newest.get(slot)
            if newest is not None:
                known[i, -1] = newest
        self._given = {}
        for place in self._places:
            place.parents = []
        self._row: dict[tuple[int, int], int] = {}
        return self._feed(head, self._model if above is None else above.model, self._fed, frontier, known)

    def _feed(
        self,
        head: _Later,
        above: EagleNetwork,
        levels: list[list[tuple[int, list[int]]]],
        frontier: list[tuple[int, int]],
        known: dict[tuple[int, int], Tensor],
    ) -> Float[Tensor, "n V"]:
        """The nodes of these levels in one forward, each with what `above` gave on its parent; logits after the frontier."""
        rows, order, features, forest = Rows(), list[tuple[int, int]](), list[Tensor](), self._forest
        nothing = self._model.fc.weight.new_zeros(self._model.config.hidden)  # the text is too short for the head above
        for i, slot in enumerate(self._slots):
            nodes = [k for level in levels for j, own in level if j == i for k in own]
            if not nodes:
                continue
            place, position = self._places[i], list[int]()
            for k in nodes:
                parent = forest.parent[i][k]
                self._row[i, k] = len(place.parents)
                place.parents.append(self._row.get((i, parent), -1))
                position.append(self._starts[i] + len(forest.path(i, k)) - 1)
                features.append(known.get((i, parent), nothing))
                order.append((i, k))
            rows.add(slot, head.cache.length[slot], [forest.tokens[i][k] for k in nodes], position, list(place.parents))
        where = {pair: row for row, pair in enumerate(order)}
        rows.scored = [where[pair] for pair in frontier]
        state, logits = head.run.forward(rows, head.cache, feature=above.feed(torch.stack(features)))
        self._given |= {pair: state[row] for pair, row in where.items()}
        return logits

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> None:
        """Heads differ by level: none is run ahead."""

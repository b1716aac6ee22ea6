"""Paths for Hugging Face models without the attention interface: one call per sequence, chains only.

`CachePath` keeps transformers' own cache for every slot and crops rejected tokens. `RecurrentPath` is for states that cannot
be cropped (Mamba and its hybrids): it decodes, and refuses drafts. `RecomputePath` keeps no state and feeds the whole
sequence every time, for models without a growing cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from outrider.errors import CapabilityError
from outrider.models.hf.hooks import HiddenStateHooks, RecordedStates
from outrider.models.hf.state import Handover, keeping
from outrider.nn.kv import check_kept, check_room
from outrider.protocols import KVCache
from outrider.types import Rows, Segment


class SlotCaches:
    """One state of the model per slot (usually a cache of transformers), or its tokens if there is none.

    length: committed tokens of every slot. fed: tokens its state has seen; the next forward crops rejected ones.
    """

    def __init__(self, slots: int, capacity: int, rewinds: bool) -> None:
        self.slots, self.capacity, self.rewinds = slots, capacity, rewinds
        self.length: list[int] = [0] * slots
        self.fed: list[int] = [0] * slots
        self.state: list[Any] = [None] * slots
        self.tokens: list[list[int]] = [[] for _ in range(slots)]

    def reserve(self, rows: Rows) -> None:
        """Raise CapacityError unless every segment continues its slot and fits."""
        check_room(rows, self.length, self.capacity)

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and the first nodes of each chain."""
        for s, path in zip(rows.segments, paths, strict=True):
            kept = s.fed + len(path)
            if list(path) != list(range(len(path))) or (not self.rewinds and kept != s.count):
                raise CapabilityError(
                    "this model's cache keeps chains from their first node only: use a drafter of chains"
                )
            self.length[s.slot] = s.cached + kept

    def truncate(self, slot: int, length: int) -> None:
        check_kept(slot, length, self.length)
        if not self.rewinds and 0 < length < self.length[slot]:
            raise CapabilityError("a recurrent state cannot be rewound: release the slot and feed the sequence again")
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.length[slot] = self.fed[slot] = 0
            self.state[slot] = None
            self.tokens[slot] = []

    def erase(self, slot: int) -> None:
        """Slots share nothing here: dropping the state is enough."""
        self.release([slot])


def _caches(kv: KVCache) -> SlotCaches:
    assert isinstance(kv, SlotCaches)
    return kv


class _Scored:
    """Collects the logits of a step's scored rows call by call, in the step's order."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.wanted = rows, sorted(rows.scored.tolist())
        self.parts: list[Tensor] = []

    def within(self, first: int, end: int, shift: int = 0) -> Tensor:
        """Scored rows among `first` .. `end`, counted from `first - shift`."""
        mine = self.wanted[bisect_left(self.wanted, first) : bisect_left(self.wanted, end)]
        return torch.tensor([row - first + shift for row in mine], dtype=torch.int64, device=self.rows.token.device)

    def logits(self) -> Float[Tensor, "M V"]:
        """Segments come in the order of their rows, so the collected logits are sorted by row."""
        return torch.cat(self.parts)[torch.argsort(torch.argsort(self.rows.scored))]


class CachePath:
    """One call per sequence with transformers' growing cache; rejected tokens are cropped away."""

    name = "cache"
    trees: bool = False
    rewinds: bool = True

    def __init__(self, model: PreTrainedModel, handover: Handover) -> None:
        self.model, self.handover = model, handover

    def new_kv(self, slots: int, length: int) -> SlotCaches:
        return SlotCaches(slots, length, self.rewinds)

    def run(
        self, rows: Rows, kv: KVCache, taps: HiddenStateHooks
    ) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        held, out = _caches(kv), _Scored(rows)
        with taps.listen() as heard:
            for s in rows.segments:
                if not s.is_chain:
                    raise CapabilityError("this model runs on chains only: use a drafter that proposes one")
                for piece in self.pieces(s):
                    self._feed(held, s, piece, out, heard)
        return out.logits(), heard.states()

    def pieces(self, s: Segment) -> list[slice]:
        """Rows of each call of the model."""
        return [slice(s.first, s.first + s.count)]

    def _feed(self, held: SlotCaches, s: Segment, piece: slice, out: _Scored, heard: RecordedStates) -> None:
        """One call: rows of `piece`, which continue the slot's text."""
        at = s.cached + piece.start - s.first
        state = self._at(held, s.slot, at)
        scored = out.within(piece.start, piece.stop)
        logits, state = self.handover.call(self.model, out.rows.token[piece], state, scored, at)
        out.parts.append(logits)
        held.state[s.slot], held.fed[s.slot] = state, s.cached + piece.stop - s.first

    def _at(self, held: SlotCaches, slot: int, length: int) -> Any:
        """The slot's state, of exactly its first `length` tokens."""
        if held.state[slot] is None or not length:
            held.state[slot] = None  # nothing of an abandoned text stays if the model raises
            return self.handover.fresh()
        if held.fed[slot] != length:
            held.state[slot].crop(length - held.fed[slot])
            held.fed[slot] = length
        return held.state[slot]


class BentPath(CachePath):
    """A cache whose keys must all be rotated again when the text grows beyond `limit` tokens (long-range rotary scaling).

    Rows of a text up to the limit differ from rows of a longer text: a cache holds one of the two kinds, and is rebuilt from
    the text when a step, or a rejection, crosses the limit.
    """

    def __init__(self, model: PreTrainedModel, handover: Handover, limit: int) -> None:
        super().__init__(model, handover)
        self.limit = limit

    def pieces(self, s: Segment) -> list[slice]:
        middle, end = s.first + self.limit - s.cached, s.first + s.count
        if not s.first < middle < end:
            return [slice(s.first, end)]
        return [slice(s.first, middle), slice(middle, end)]

    def _feed(self, held: SlotCaches, s: Segment, piece: slice, out: _Scored, heard: RecordedStates) -> None:
        known, new = held.tokens[s.slot], out.rows.token[piece]
        at = s.cached + piece.start - s.first
        same_side = (held.fed[s.slot] > self.limit) == (at + len(new) > self.limit)
        held.tokens[s.slot] = [*known[:at], *new.tolist()]
        if not at or (held.state[s.slot] is not None and same_side):
            return super()._feed(held, s, piece, out, heard)
        whole = torch.tensor(held.tokens[s.slot], device=new.device)
        logits, state = self.handover.call(
            self.model, whole, self.handover.fresh(), out.within(piece.start, piece.stop, at)
        )
        out.parts.append(logits)
        heard.keep(len(new))
        held.state[s.slot], held.fed[s.slot] = state, len(whole)


class RecurrentPath(CachePath):
    """States that cannot be cropped: plain decoding only. Later pieces go token by token if the model needs it."""

    name, trees, rewinds = "recurrent", False, False

    def __init__(self, model: PreTrainedModel, handover: Handover, by_token: bool) -> None:
        super().__init__(model, handover)
        self.by_token = by_token

    def pieces(self, s: Segment) -> list[slice]:
        if not s.cached or not self.by_token:
            return super().pieces(s)
        return [slice(i, i + 1) for i in range(s.first, s.first + s.count)]

    def _feed(self, held: SlotCaches, s: Segment, piece: slice, out: _Scored, heard: RecordedStates) -> None:
        if s.parent:
            raise CapabilityError(
                "this model has a recurrent state that cannot be rewound: decode it without a drafter"
            )
        at = s.cached + piece.start - s.first
        if at and held.fed[s.slot] != at:
            raise CapabilityError("this model's recurrent state has seen tokens that were not kept: release the slot")
        super()._feed(held, s, piece, out, heard)


class RecomputePath:
    """No state: every call sees the whole sequence again. Slow, but correct for any model from tokens to logits."""

    name, trees, rewinds = "recompute", False, True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.extra = model, keeping(model, False)

    def new_kv(self, slots: int, length: int) -> SlotCaches:
        return SlotCaches(slots, length, self.rewinds)

    def run(
        self, rows: Rows, kv: KVCache, taps: HiddenStateHooks
    ) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        held, out, states = _caches(kv), _Scored(rows), []
        token = rows.token.tolist()
        for s in rows.segments:
            if not s.is_chain:
                raise CapabilityError("this model runs on chains only: use a drafter that proposes one")
            whole = held.tokens[s.slot][: s.cached] + token[s.first : s.first + s.count]
            held.tokens[s.slot] = whole
            with taps.listen() as heard:
                logits = self.model(input_ids=torch.tensor([whole], device=rows.token.device), **self.extra).logits[0]
            out.parts.append(logits[out.within(s.first, s.first + s.count, s.cached)])
            states.append([h[s.cached :] for h in heard.states()])
        return out.logits(), tuple(torch.cat(parts) for parts in zip(*states, strict=True))

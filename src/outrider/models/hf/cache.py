"""Paths for Hugging Face models without the attention interface: one call per sequence, chains only.

`CachePath` keeps transformers' own cache for every slot and crops rejected tokens. `SnapshotPath` is for states that cannot be
cropped (Mamba and its hybrids): it goes back to a snapshot, and reads what was accepted again with the next rows.
`RecurrentPath` is for states that can neither be cropped nor copied: it decodes, and refuses drafts. `RecomputePath` keeps no
state and feeds the whole sequence every time, for models without a growing cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from outrider.errors import CapabilityError
from outrider.models.hf.hooks import HiddenStateHooks, RecordedStates
from outrider.models.hf.state import Choice, Handover, chosen, keeping
from outrider.models.states import Path, SlotCaches, StateCaches, growing_by_token, tensors_of
from outrider.nn.row_parts import last_scored
from outrider.protocols import KVCache
from outrider.types import Rows, Segment


def _caches(kv: KVCache) -> SlotCaches:
    assert isinstance(kv, SlotCaches)
    return kv


class _Scored:
    """Collects the logits of a step's scored rows call by call, in the step's order."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.last = last_scored(rows)
        self.wanted = sorted(rows.scored.tolist()) if self.last is None else range(rows.count - self.last, rows.count)
        self.parts: list[Tensor] = []

    def within(self, first: int, end: int, shift: int = 0) -> Choice:
        """Scored rows among `first` .. `end`, counted from `first - shift`."""
        mine = self.wanted[bisect_left(self.wanted, first) : bisect_left(self.wanted, end)]
        if mine and mine[0] == end - len(mine):
            return len(mine)
        return torch.tensor([row - first + shift for row in mine], dtype=torch.int64, device=self.rows.token.device)

    def logits(self) -> Float[Tensor, "M V"]:
        """Segments come in the order of their rows, so the collected logits are sorted by row."""
        if self.last is not None or len(self.rows.segments) == 1:  # so are the scored rows
            return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
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
                self._segment(held, s, out, heard)
        return out.logits(), heard.states()

    def _segment(self, held: SlotCaches, s: Segment, out: _Scored, heard: RecordedStates) -> None:
        for piece in self.pieces(s):
            self._feed(held, s, piece, out, heard)

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


class SnapshotPath(CachePath):
    """States that cannot be cropped: a snapshot before a draft, and after a rejection the accepted rows once more.

    by_token: the model continues a state by one token a call only. Then every row has a state of its own, so a rejection chooses
    one and nothing is read again; but a draft of n tokens costs n calls. growing: see `StateCaches`.
    """

    name, trees, rewinds = "snapshots", False, True

    def __init__(self, model: PreTrainedModel, handover: Handover, by_token: bool, growing: Mapping[Path, int]) -> None:
        super().__init__(model, handover)
        self.by_token, self.growing = by_token, growing

    def new_kv(self, slots: int, length: int) -> StateCaches:
        return StateCaches(slots, length, self.growing, OPAQUE)

    def run(
        self, rows: Rows, kv: KVCache, taps: HiddenStateHooks
    ) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        _caches(kv).replayed = 0
        return super().run(rows, kv, taps)

    def _segment(self, held: SlotCaches, s: Segment, out: _Scored, heard: RecordedStates) -> None:
        assert isinstance(held, StateCaches)
        token = out.rows.token[s.first : s.first + s.count]
        for behind, piece in held.calls(s, token.tolist(), self.by_token):
            rows = token[piece]
            given = torch.cat([torch.tensor(behind, device=token.device), rows]) if behind else rows
            scored = out.within(s.first + piece.start, s.first + piece.stop, len(behind))
            logits = self._call(held, s.slot, given, scored if len(rows) else 1)
            out.parts.append(logits if len(rows) else logits[:0])
            heard.keep(len(rows))

    def _call(self, held: StateCaches, slot: int, token: Tensor, scored: Choice) -> Float[Tensor, "s V"]:
        at, logits = held.fed[slot], list[Tensor]()

        def read(state: Any) -> Any:
            found, after = self.handover.call(self.model, token, state if at else self.handover.fresh(), scored, at)
            logits.append(found)
            return after

        held.advance(slot, read, len(token))
        return logits[0]


OPAQUE = (PreTrainedConfig,)
"""What a state of transformers may refer to and never changes."""


@torch.no_grad()
def find_growing(model: PreTrainedModel, way: Handover, token: Tensor) -> dict[Path, int]:
    """The tensors of the model's state with one entry per token, by reading `token` (6 at least): see `StateCaches`."""
    last, seen, state = torch.zeros(1, dtype=torch.int64, device=token.device), [], way.fresh()
    for at, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        _, state = way.call(model, token[at:end], state, last, at)
        seen.append((end, {path: t.clone() for path, t in tensors_of(state, OPAQUE).items()}))
    return growing_by_token(seen)


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
            out.parts.append(chosen(logits, out.within(s.first, s.first + s.count, s.cached)))
            states.append([h[s.cached :] for h in heard.states()])
        return out.logits(), tuple(torch.cat(parts) for parts in zip(*states, strict=True))

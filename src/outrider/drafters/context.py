"""Catching up: rows of the target that were kept, each seen once by a drafter that reads hidden states.

Hidden states are given once, in the step that computes them. Reading them may wait (`Backlog`): while nothing is drafted for a
sequence its rows are only put aside, and one pass reads many of them later.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.types import Evidence, SequenceView


class Context:
    """How far each of `slots` slots was seen. next: per slot the position behind its last row seen, 0 if there is none."""

    def __init__(self, slots: int) -> None:
        self.next = [0] * slots

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self.next[slot] = 0

    def reaches(self, view: SequenceView) -> bool:
        """Whether the last row seen is the one before the anchor, so that something can be drafted behind it."""
        return 0 < self.next[view.slot] == len(view.tokens) - 1


@dataclass(frozen=True, slots=True)
class NewRows:
    """Kept rows of one sequence that were not seen before.

    rows: at least one row of the forward; they stand at positions start, start + 1, ... of the sequence. gap: whether rows before
    them were missed (a prefix that came from somebody else's cache): what was known of the slot is of no use any more.
    """

    view: SequenceView
    rows: list[int]
    start: int
    gap: bool


def new_rows(evidence: Evidence, context: Context) -> list[NewRows]:
    """The kept rows of every sequence that has any. Behind a gap the slot's context starts over at the first of them.

    The caller adds to `context.next[slot]` what it has read: a drafter that fails on the way is found to have a gap afterwards.
    """
    found = []
    for i, view in enumerate(evidence.sequences):
        if rows := evidence.accepted_rows(i):
            start = view.cached - len(rows)
            gap = context.next[view.slot] != start
            context.next[view.slot] = start
            found.append(NewRows(view, rows, start, gap))
    return found


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows of one slot that were put aside, from position `start` on. gap: as in `NewRows`. taps: their hidden states, a step after
    the other."""

    start: int
    count: int
    gap: bool
    taps: tuple[list[Tensor], ...]


MOST_HELD = 64
"""Rows of a slot that are put aside at most: as many take one pass about as long as a few do."""


class Backlog:
    """Kept rows of sequences that nothing is drafted for at present. context: is told of rows as if they had been read."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._held: dict[int, _Held] = {}

    @staticmethod
    def size(slots: int, places: int, width: int, dtype: torch.dtype) -> int:
        """Bytes of rows that wait for `slots` sequences at most, with hidden states of `places` layers, `width` numbers each."""
        return slots * MOST_HELD * places * width * dtype.itemsize

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._held.pop(slot, None)

    def count(self, slot: int) -> int:
        """Rows of a slot that wait."""
        held = self._held.get(slot)
        return held.count if held else 0

    @property
    def bytes(self) -> int:
        """Bytes of all rows that wait."""
        kept = (tensor for held in self._held.values() for taps in held.taps for tensor in taps)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def due(
        self, evidence: Evidence, order: Sequence[int], wanted: Container[int]
    ) -> tuple[list[NewRows], list[Float[Tensor, "n H"]]]:
        """What is to be read now: all rows of the slots `wanted`, and of those where more than MOST_HELD would wait.

        order: the places of the hidden states that are read. Returns the rows, as `new_rows` does, and these hidden states, behind
        which those put aside before stand.
        """
        new = {found.view.slot: found for found in new_rows(evidence, self._context)}
        if not new and not self._held:
            return [], []
        hidden = [evidence.scores.hidden[n] for n in order]
        self.release([slot for slot, found in new.items() if found.gap])
        due, behind, end = list[NewRows](), list[_Held](), hidden[0].shape[0]
        for view in evidence.sequences:
            found, held = new.get(view.slot), self._held.get(view.slot)
            waiting = (len(found.rows) if found else 0) + self.count(view.slot)
            if view.slot not in wanted and waiting <= MOST_HELD:
                if found:
                    self._hold(found, held, hidden)
                continue
            if held is not None:
                del self._held[view.slot]
                behind.append(held)
                rows = [*range(end, end + held.count), *(found.rows if found else ())]
                end += held.count
                self._context.next[view.slot] = held.start
                found = NewRows(view, rows, held.start, held.gap)
            if found:
                due.append(found)
        if behind:
            hidden = [torch.cat([now, *(t for h in behind for t in h.taps[k])]) for k, now in enumerate(hidden)]
        return due, hidden

    def _hold(self, found: NewRows, held: _Held | None, hidden: list[Float[Tensor, "n H"]]) -> None:
        """Put the rows aside, behind those of the slot that are there already."""
        slot, count = found.view.slot, len(found.rows)
        if held is None:
            held = _Held(found.start, 0, found.gap, tuple(list[Tensor]() for _ in hidden))
        for kept, now in zip(held.taps, hidden, strict=True):
            kept.append(now if count == len(now) else now[found.rows])  # a copy: a view would keep all rows of the step
        self._held[slot] = replace(held, count=held.count + count)
        self._context.next[slot] += count

"""Catching up: rows of the target that were kept, each seen once by a drafter that reads hidden states.

Hidden states are given once, in the step that computes them, so every kept row is read then, also when nothing is to be drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def taps_of(evidence: Evidence, order: Sequence[int], rows: list[int]) -> Float[Tensor, "n K H"]:
    """Hidden states of `rows`: K of the forward's, by their places in `order`."""
    hidden = evidence.scores.hidden
    taps = torch.stack([hidden[n] for n in order], 1) if len(order) > 1 else hidden[order[0]][:, None]
    return taps if rows == list(range(len(taps))) else taps[rows]

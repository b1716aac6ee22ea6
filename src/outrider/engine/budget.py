"""The draft length of each sequence."""

from __future__ import annotations

from outrider.engine.sequence import Sequence
from outrider.engine.state import StepState


def draft_budget(state: StepState, live: list[Sequence]) -> list[int]:
    """Draft length for each live sequence: the controller's, limited by its request's own and by the tokens it may still emit.

    0 (the drafter only catches up) during prefill, and where checking drafts has used up a grammar's time budget.
    """
    depths = state.watchers.depths([s.view() for s in live])
    return [_within(state, s, depth) for s, depth in zip(live, depths, strict=True)]


def _within(state: StepState, sequence: Sequence, depth: int) -> int:
    ready = len(sequence.tokens) - sequence.cached == 1 and not state.parts.pipeline.exhausted_on_draft(sequence.slot)
    if not ready:
        return 0
    own = sequence.params.draft_length
    return max(0, min(depth if own is None else min(depth, own), sequence.room - 1, state.parts.drafter.max_depth))

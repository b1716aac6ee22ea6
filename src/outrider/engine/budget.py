"""How deep each sequence may draft."""

from __future__ import annotations

from outrider.engine.sequence import Sequence
from outrider.engine.state import StepState


def draft_budget(state: StepState, live: list[Sequence]) -> list[int]:
    """Depth for each live sequence: the controller's, within its request's own and what may still be emitted.

    0, only to catch up, while a prompt is not read whole and where drafts cost a grammar more than its text may.
    """
    depths = state.watchers.depths([s.view() for s in live])
    return [_within(state, s, depth) for s, depth in zip(live, depths, strict=True)]


def _within(state: StepState, sequence: Sequence, depth: int) -> int:
    ready = len(sequence.tokens) - sequence.cached == 1 and not state.parts.pipeline.weary(sequence.slot)
    if not ready:
        return 0
    own = sequence.params.draft_length
    return max(0, min(depth if own is None else min(depth, own), sequence.room - 1, state.parts.drafter.max_depth))

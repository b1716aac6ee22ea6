"""The step, on one screen. Verify first, draft last; plain decoding has an empty draft, and prefill a long prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from outrider.contained import strange_verdict
from outrider.engine.budget import draft_budget
from outrider.engine.clock import PhaseClock
from outrider.engine.emit import emit
from outrider.engine.parts import Parts
from outrider.engine.rows import VerifiedStep, allowances, assemble, evidence_of, kept_paths, noise_of, row_contexts
from outrider.engine.sanitize import blank_nonfinite_rows, judge, sanitize_draft
from outrider.engine.scheduler import StepWork
from outrider.engine.sequence import Event
from outrider.engine.state import PendingDraft, StepState
from outrider.errors import CapabilityError
from outrider.threads import serially
from outrider.types import Draft, Rows, Scores


def step(state: StepState, deliver: Callable[[list[Event]], None] | None = None) -> list[Event]:
    """Advance every running sequence once; returns the events. With nothing to do the list is empty."""
    parts, clock = state.parts, PhaseClock()
    works = state.plan()
    if not works:
        return []
    draft, defects = sanitize_draft(state.take_pending(works), parts.target.vocab_size)
    rows = assemble(works, draft)
    with torch.inference_mode():
        parts.kv.reserve(rows)
        with clock("target"):
            scores = parts.target.forward(rows, parts.kv, layers=parts.drafter.layers)
        with clock("rule"):
            verified = verify(parts, works, rows, scores, draft)
        parts.kv.commit(rows, kept_paths(works, verified))
    emission = emit(parts, works, verified)
    state.room.publish(works)
    state.settle(emission, defects)  # ended sequences are dropped before observers see the step
    if deliver is not None:
        deliver([event for event in emission.events if event.finish_reason is None])  # may abort
    with clock("draft"):
        state.pending = propose(state, works, verified)
    state.record(verified, emission, clock.seconds())
    return emission.events


def verify(parts: Parts, works: list[StepWork], rows: Rows, scores: Scores, draft: Draft) -> VerifiedStep:
    """The target distributions of the scored rows, and the rule's verdict on the draft."""
    views = [work.sequence.view() for work in works if work.scored]
    with serially(scores.logits.numel()):
        bad = blank_nonfinite_rows(scores.logits)
        p = parts.pipeline(scores.logits, *row_contexts(draft, views))
        verdict, unusable = judge(parts.rule, p, draft, noise_of(views), allowances(parts.rule, works), bad)
    if problem := strange_verdict(verdict, draft, parts.target.vocab_size):
        raise CapabilityError(
            f"the rule {type(parts.rule).__name__} {problem} (outrider.testing.check_rule tries its contracts)"
        )
    return VerifiedStep(rows, scores, draft, verdict, unusable)


def propose(state: StepState, works: list[StepWork], verified: VerifiedStep) -> PendingDraft:
    """The next draft, one tree for each sequence that continues. The drafter reads the step first."""
    live = list(state.scheduler.running)
    if not live:
        return state.pending
    budget = draft_budget(state, live)  # outside of inference mode: a controller may learn
    with torch.inference_mode():
        draft = state.drafter.draft(evidence_of(state.parts, works, verified, live), budget)
    return PendingDraft(draft, live)

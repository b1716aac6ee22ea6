"""From a verdict to events: tokens are appended where a sequence goes on, cut where it ends, and counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from outrider.engine.parts import Parts
from outrider.engine.rows import VerifiedStep
from outrider.engine.scheduler import StepWork
from outrider.engine.sequence import Event, Sequence, TokenLogprob
from outrider.records import Counts, SequenceStep
from outrider.sampling.pipeline import logprobs_of

logger = logging.getLogger(__name__)
UNUSABLE = "the target returned NaN or empty logits: check the checkpoint and the dtype"


@dataclass(slots=True)
class Emission:
    """What a step produced: events in the order of its works, the sequences that ended, and the sums.

    engine_seeded: the sums of sequences whose seed the engine chose. each: the counts of every sequence with a verdict.
    """

    events: list[Event] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    engine_seeded: Counts = field(default_factory=Counts)
    each: list[SequenceStep] = field(default_factory=list)


def emit(parts: Parts, works: list[StepWork], verified: VerifiedStep) -> Emission:
    """Append the verdict's tokens to their sequences. A sequence that cannot continue fails alone; its slot is not freed here."""
    out, b = Emission(), -1
    for work in works:
        sequence = work.sequence
        sequence.cached = parts.kv.length[sequence.slot]
        if not work.scored:
            continue
        b += 1
        event = _trouble(parts, sequence, b, verified) or _append(sequence, verified, b, out)
        out.events.append(event)
        if sequence.finish_reason is not None:
            out.ended.append(sequence)
    return out


def _trouble(parts: Parts, sequence: Sequence, b: int, verified: VerifiedStep) -> Event | None:
    """The final error event of a sequence whose tokens of this step are unusable; None for all others."""
    if b in verified.unusable:
        parts.kv.erase(sequence.slot)
        return sequence.fail(UNUSABLE)
    automaton = None if sequence.params.grammar is None else parts.pipeline.automaton(sequence.slot)
    why = "" if automaton is None else automaton.trouble([verified.draft.tokens[k] for k in verified.verdict.path[b]])
    return sequence.fail(why, "request") if why else None


def _append(sequence: Sequence, verified: VerifiedStep, b: int, out: Emission) -> Event:
    """Append the tokens of a verdict up to the end of the text, and count them."""
    verdict, draft = verified.verdict, verified.draft
    path, accepted = verdict.path[b], len(verdict.path[b])
    tokens = [draft.tokens[k] for k in path] + [verdict.next_token[b]]
    last = "corrected" if verdict.judged[b] > accepted else "bonus" if accepted else "sampled"
    before, size = sequence.counts.emitted, len(sequence.tokens)
    try:
        event = sequence.emit(tokens, ["accepted"] * accepted + [last], _logprobs(sequence, verified, b))
    except Exception as error:  # a tokenizer that cannot decode its own tokens fails this request alone
        logger.warning("the text of %r failed", sequence.request, exc_info=True)
        del sequence.tokens[size:]
        event = sequence.fail(f"the tokenizer failed on the text ({type(error).__name__}): check the tokenizer's files")
    kept = sequence.counts.emitted - before
    ledger = (verdict.risk[b], verdict.spread[b], verdict.bias[b])
    for sums in (sequence.counts, out.counts, *([out.engine_seeded] if sequence.params.seed is None else [])):
        sums.add(draft.counts[b], accepted, verdict.judged[b], *ledger, kept)
    out.counts.emitted += kept
    out.each.append(SequenceStep(sequence.slot, draft.counts[b], verdict.judged[b], accepted))
    return event


def _logprobs(sequence: Sequence, verified: VerifiedStep, b: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens of a verdict, from the rows that verified them."""
    top = sequence.params.logprobs
    if top is None:
        return []
    path = verified.verdict.path[b]
    rows = [verified.draft.row(b, k) for k in (-1, *path)]
    tokens = [*(verified.draft.tokens[k] for k in path), verified.verdict.next_token[b]]
    values, best = logprobs_of(verified.scores.logits[rows], tokens, top)
    return [TokenLogprob(t, v, tuple(alt)) for t, v, alt in zip(tokens, values, best, strict=True)]

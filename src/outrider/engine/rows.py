"""From sequences and their drafts to the rows of a step, and from a verdict back to the accepted nodes."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.engine.parts import Parts
from outrider.engine.scheduler import StepWork
from outrider.engine.sequence import Sequence
from outrider.noise import Noise
from outrider.pictured_rows import with_images
from outrider.protocols import Rule
from outrider.types import Draft, Evidence, Rows, Scores, SequenceView, Verdict


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """The scored rows and the verdict. unusable: sequences whose rows the target could not score."""

    rows: Rows
    scores: Scores
    draft: Draft
    verdict: Verdict
    unusable: set[int]


def assemble(works: list[StepWork], draft: Draft) -> Rows:
    """The rows of a step: the tokens each sequence feeds, followed by the drafts of the scored ones."""
    sequences = [work.sequence for work in works]
    rows = Rows.assemble(
        [s.slot for s in sequences],
        [s.tokens[s.cached : s.cached + w.fed] for s, w in zip(sequences, works, strict=True)],
        [s.cached for s in sequences],
        draft,
        [work.scored for work in works],
    )
    return with_images(rows, [s.pictured for s in sequences])


def row_contexts(draft: Draft, views: list[SequenceView]) -> tuple[list[SequenceView], tuple[tuple[int, ...], ...]]:
    """For each scored row, its sequence and the draft tokens on its path: logits processors need both to be exact on trees."""
    return [views[b] for b in draft.sequence_of_row], draft.path_tokens


def noise_of(views: list[SequenceView] | tuple[SequenceView, ...]) -> Noise:
    """The noise of the position behind each sequence's last token."""
    return Noise(tuple(v.seed for v in views), tuple(len(v.tokens) - 1 for v in views))


def allowances(rule: Rule, works: list[StepWork]) -> list[float]:
    """Total variation each scored sequence may still spend: the lower of the rule's and the request's limit, minus its bias."""
    return [_left(rule.tv_limit, w.sequence.params.tv_budget, w.sequence.counts.bias) for w in works if w.scored]


def _left(limit: float, own: float | None, spent: float) -> float:
    return max(0.0, (limit if own is None else min(limit, own)) - spent)


def kept_paths(works: list[StepWork], verified: VerifiedStep) -> list[list[int]]:
    """Per segment, the accepted nodes as offsets into the segment's nodes: what `KVCache.commit` takes."""
    paths: list[list[int]] = []
    b = 0
    for work in works:
        if not work.scored:
            paths.append([])
            continue
        paths.append([verified.draft.local(b, k) for k in verified.verdict.path[b]])
        b += 1
    return paths


def evidence_of(parts: Parts, works: list[StepWork], verified: VerifiedStep, live: list[Sequence]) -> Evidence:
    """What a drafter may read: the step, and the sequences that continue."""
    segment = {w.sequence.key: i for i, w in enumerate(works)}
    number: dict[tuple[str, int], int] = {}
    for w in works:
        if w.scored:
            number[w.sequence.key] = len(number)
    views = tuple(s.view() for s in live)
    return Evidence(
        rows=verified.rows,
        scores=verified.scores,
        draft=verified.draft,
        verdict=verified.verdict,
        sequences=views,
        segment_index=tuple(segment.get(s.key, -1) for s in live),
        verdict_index=tuple(number.get(s.key, -1) for s in live),
        noise=noise_of(views),
        pipeline=parts.pipeline,
    )

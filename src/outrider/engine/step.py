"""The step: one function, one screen. Verify first, draft last; plain decoding is the empty draft, a prompt a long prefix."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from outrider.drafters.contained import Contained
from outrider.engine.sanitize import judge, silence
from outrider.engine.scheduler import Work
from outrider.engine.sequence import Sequence
from outrider.noise import Noise
from outrider.protocols import Drafter, KVCache, Rule, Target
from outrider.sampling.pipeline import Law
from outrider.threads import serially
from outrider.types import Draft, Evidence, Rows, Scores, SequenceView, Verdict


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of: values that compose."""

    target: Target
    kv: KVCache
    law: Law
    rule: Rule
    drafter: Drafter


@dataclass(frozen=True, slots=True)
class Judged:
    """A verified step: what was scored, what was decided, and what it cost."""

    rows: Rows
    scores: Scores
    draft: Draft
    verdict: Verdict
    unusable: set[int]
    seconds: dict[str, float]


def row_laws(draft: Draft, views: list[SequenceView]) -> tuple[list[SequenceView], tuple[tuple[int, ...], ...]]:
    """For each scored row its sequence and the drafted tokens on its own path: what a law needs to be exact on trees."""
    return [views[b] for b in draft.sequence_of_row], draft.path_tokens


@torch.inference_mode()
def verify(parts: Parts, works: list[Work], draft: Draft) -> Judged:
    """Score the works' prefixes and the pending draft in one forward, decide, and commit what was kept."""
    start = perf_counter()
    sequences = [w.sequence for w in works]
    rows = Rows.assemble(
        [s.slot for s in sequences],
        [s.tokens[s.cached : s.cached + w.prefix] for s, w in zip(sequences, works, strict=True)],
        [s.cached for s in sequences],
        draft,
        [w.scored for w in works],
    )
    parts.kv.reserve(rows)
    assembled = perf_counter()
    scores = parts.target.forward(rows, parts.kv, layers=parts.drafter.layers)
    scored_at = perf_counter()
    views = [w.sequence.view() for w in works if w.scored]
    noise = Noise(tuple(v.seed for v in views), tuple(len(v.tokens) - 1 for v in views))
    limit = parts.rule.limit
    allowance = [left(limit, w.sequence.params.tv_budget, w.sequence.counts.bias) for w in works if w.scored]
    with serially(scores.logits.numel()):
        bad = silence(scores.logits)
        p = parts.law(scores.logits, *row_laws(draft, views))
        verdict, broken = judge(parts.rule, p, draft, noise, allowance, bad)
    judged_at = perf_counter()
    parts.kv.commit(rows, kept_paths(works, draft, verdict))
    end = perf_counter()
    seconds = {
        "target": scored_at - assembled,
        "rule": judged_at - scored_at,
        "host": (assembled - start) + (end - judged_at),
        "draft": 0.0,
    }
    return Judged(rows, scores, draft, verdict, broken, seconds)


def left(limit: float, wish: float | None, spent: float) -> float:
    """Total variation a sequence may still spend: the rule's limit, tightened by the request's own, less what it has spent."""
    return max(0.0, (limit if wish is None else min(limit, wish)) - spent)


def kept_paths(works: list[Work], draft: Draft, verdict: Verdict) -> list[list[int]]:
    """Per segment, the accepted nodes as offsets into the segment's nodes: what `KVCache.commit` takes."""
    paths: list[list[int]] = []
    b = 0
    for work in works:
        if not work.scored:
            paths.append([])
            continue
        paths.append([draft.local(b, k) for k in verdict.path[b]])
        b += 1
    return paths


@torch.inference_mode()
def propose(
    parts: Parts, judged: Judged, works: list[Work], live: list[Sequence], budget: list[int], drafter: Contained
) -> Draft:
    """Let the drafter look at the step and make the next draft, one tree for each of the `live` sequences."""
    segment = {w.sequence.key: i for i, w in enumerate(works)}
    number: dict[tuple[str, int], int] = {}
    for w in works:
        if w.scored:
            number[w.sequence.key] = len(number)
    views = tuple(s.view() for s in live)
    evidence = Evidence(
        rows=judged.rows,
        scores=judged.scores,
        draft=judged.draft,
        verdict=judged.verdict,
        sequences=views,
        source=tuple(segment.get(s.key, -1) for s in live),
        judged=tuple(number.get(s.key, -1) for s in live),
        noise=Noise(tuple(v.seed for v in views), tuple(len(v.tokens) - 1 for v in views)),
        law=parts.law,
    )
    return drafter.draft(evidence, budget)

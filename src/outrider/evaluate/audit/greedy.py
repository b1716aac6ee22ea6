"""Greedy text is audited by margins, not by equality: where it leaves the target's most likely token, was it a tie?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from outrider.engine.prompts import as_ids
from outrider.evaluate.audit.sources import Emission, Source
from outrider.evaluate.scoring.divergence import score_last
from outrider.evaluate.scoring.score import Clock, logits_along
from outrider.protocols import Target


@dataclass(frozen=True, slots=True)
class Departure:
    """The first token of a text that is not the target's most likely one. gap: by how much it loses, in logits.

    delta: how far batching alone moves logits at this position; a gap of at most 2 delta is a tie that rounding decides.
    """

    prompt: int
    position: int
    token: int
    best: int
    gap: float
    delta: float

    @property
    def tie(self) -> bool:
        return self.gap <= 2 * self.delta


@dataclass(frozen=True, slots=True)
class GreedyAuditResult:
    """texts and tokens judged (each text up to its first departure), failed texts, and every departure."""

    texts: int
    tokens: int
    failed: int
    departures: tuple[Departure, ...]

    @property
    def wrong(self) -> tuple[Departure, ...]:
        return tuple(d for d in self.departures if not d.tie)

    @property
    def outcome(self) -> str:
        return "not the target's choice" if self.wrong else "exact so far" if self.texts else "inconclusive"


@torch.inference_mode()
def audit_greedy(
    source: Source, prompts: Iterable[Sequence[int]], target: Target, *, width: int = 5, group: int = 8
) -> GreedyAuditResult:
    """One continuation of every prompt; the source runs at temperature 0 without other parameters.

    width: rows of a verification, for the rounding by batching. Only the first departure of a text is judged: behind a tie the
    two texts are of different prefixes, and either is correct.
    """
    texts = tokens = failed = 0
    found: list[Departure] = []
    asked = as_ids(prompts)
    for low in range(0, len(asked), group):
        some = asked[low : low + group]
        for i, (prompt, emission) in enumerate(
            zip(some, source(some, [low + j for j in range(len(some))]), strict=True)
        ):
            if emission.error is not None or not emission.tokens:
                failed += 1
                continue
            departure = first_departure(target, prompt, emission, low + i, width)
            texts += 1
            tokens += len(emission.tokens) if departure is None else departure.position
            if departure is not None:
                found.append(departure)
    return GreedyAuditResult(texts, tokens, failed, tuple(found))


def first_departure(target: Target, prompt: list[int], emission: Emission, number: int, width: int) -> Departure | None:
    """Where a greedy text leaves the argmax of the teacher-forced logits, with its margin; None if nowhere."""
    whole = [*prompt, *emission.tokens]
    logits = torch.cat(list(logits_along(target, whole, len(prompt) - 1, Clock())))
    best = logits.argmax(1).tolist()
    at = next((i for i, (b, t) in enumerate(zip(best, emission.tokens, strict=True)) if b != t), None)
    if at is None:
        return None
    text, token = whole[: len(prompt) + at], int(emission.tokens[at])
    views = [logits[at], score_last(target, text, 1), score_last(target, text, min(width, len(text)))]
    stacked = torch.stack([v.double().cpu() for v in views])
    delta = float((stacked - stacked[0]).abs().max())
    gap = float(min(v[best[at]] - v[token] for v in stacked))
    return Departure(number, at, token, best[at], gap, delta)

"""What is asked of an audit, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from outrider.errors import ConfigError
from outrider.evaluate.audit.alternatives import WORDS
from outrider.params import SamplingParams

EXACT, NOT_THE_TARGET, INCONCLUSIVE = "exact so far", "not the target's law", "inconclusive"
"""Outcomes, as documents have always spelled them; a sentence begins with its outcome."""


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What is asked of an audit.

    params: how the text should have been sampled; temperature above 0 (for 0 see `greedy`).
    level: probability that a generator of the target distribution is accused, however often one looks. tolerance: total variation
    per token that numerics alone may cause; distributions that close count as the target's. detect: total variation per token that
    must be detectable (80% power, every alternative) for "exact so far"; with less data the answer is "inconclusive".
    """

    params: SamplingParams
    level: float = 0.01
    tolerance: float = 0.0
    detect: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or not 0 <= self.tolerance < 1 or not 0 < self.detect < 1:
            raise ConfigError("level and detect lie between 0 and 1, tolerance from 0 to below 1")
        if self.params.greedy:
            raise ConfigError(
                "at temperature 0 there is no distribution to test: use the greedy audit (--temperature 0)"
            )
        if self.tolerance >= self.detect:
            raise ConfigError("the tolerance must be smaller than the bias to detect")


@dataclass(frozen=True, slots=True)
class Detectable:
    """What a bias of one alternative would have to be: tv per token (None: not even the strongest), full: its tv at strength 1."""

    family: str
    label: str
    tv: float | None
    full: float


@dataclass(frozen=True, slots=True)
class AuditResult:
    """The answer. log10_evidence: now and at its highest; alarm_at: tokens seen when it passed 1 / level.

    cause, label, strength, bias: the alternative with the most evidence, its strength and its total variation per token;
    odds: log10 of its evidence over the next family's. families: log10 evidence of each. control_*: see the module.
    """

    outcome: str
    tokens: int
    texts: int
    failed: int
    level: float
    tolerance: float
    detect: float
    log10_evidence: float
    log10_highest: float
    alarm_at: int | None
    cause: str | None
    label: str | None
    strength: float | None
    bias: float | None
    odds: float | None
    families: dict[str, float]
    detectable: list[Detectable]
    resolution: float | None
    control_honest: float
    control_planted: float
    violations: list[str] = field(default_factory=list)
    law_gap: float | None = None

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self.outcome == NOT_THE_TARGET:
            if self.violations:
                return f"not the target's distribution: {self.violations[0]}"
            return f"not the target's distribution: {WORDS[self.cause or 'unexplained']} ({self.label})"
        if self.outcome == EXACT:
            return f"exact so far: a bias of {self.resolution:.3g} total variation per token would have been seen"
        if self.control_honest >= math.log10(1 / self.level):
            return (
                "inconclusive: the audit accuses tokens drawn from the target's own distribution; check the tolerance"
            )
        return (
            f"inconclusive: {self.tokens} tokens cannot show every bias of {self.detect:g}; use more prompts or samples"
        )


def as_document(v: AuditResult) -> dict[str, Any]:
    """An answer as plain data."""
    return {**asdict(v), "sentence": v.sentence}


def worst(details: Iterable[Detectable], count: int = 5) -> list[Detectable]:
    """The alternatives that are hardest to see: for a table."""
    return sorted(details, key=lambda d: (d.tv is not None, -(d.tv or 0)))[:count]

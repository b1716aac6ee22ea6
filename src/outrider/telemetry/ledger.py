"""The ledger: predicted and observed rejections, and whether they agree.

Before each coin a rule knows the probability r that it will reject. With R the number of rejections, sum(r) - R is a
martingale with steps in [-1, 1] whose predictable variance is sum(r (1 - r)): the base paper's Theorem 1 (Yin et al., NeurIPS
2024), kept as running sums. Freedman's inequality bounds how far the two may differ by chance, for any drafts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.records import Counts

LEVEL = 0.01
"""Two-sided probability with which an exact engine's observed rejections fall outside the interval."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Predicted and observed rejections; an exact engine's `observed` lies in [low, high] with probability 1 - LEVEL."""

    predicted: float
    observed: int
    low: float
    high: float
    judged: int

    @property
    def agrees(self) -> bool:
        return self.low <= self.observed <= self.high


def ledger(counts: Counts, level: float = LEVEL) -> Ledger:
    """The ledger of a run. Freedman (1975): P(|S| >= x) <= 2 exp(-x^2 / (2 (V + x / 3))) with V = counts.spread."""
    log = math.log(2 / level)
    margin = log / 3 + math.sqrt((log / 3) ** 2 + 2 * counts.spread * log) if counts.judged else 0.0
    low, high = max(0.0, counts.risk - margin), min(float(counts.judged), counts.risk + margin)
    # a certain rejection differs from its predicted probability only by the rounding of float32 distributions
    slack = 1e-5 * counts.judged
    return Ledger(counts.risk, counts.rejected, low - slack if low > slack else 0.0, high + slack, counts.judged)


def standing(agrees: bool, bias: float, tokens: int, *, lossless: bool = True) -> str:
    """The verdict of a ledger as every output words it; for a lossy rule always with the total variation it has spent.

    bias: total variation spent. tokens: emitted meanwhile. A rule that spent any counts as lossy, whatever its `lossless`.
    """
    word = "agree" if agrees else "DISAGREE"
    return word if lossless and not bias else f"{word}; {spent(bias, tokens)}"


def spent(bias: float, tokens: int) -> str:
    """States that a rule is lossy, and what it has spent."""
    each = f", {bias / tokens:.2g} per token" if tokens else ""
    return f"LOSSY: total variation {bias:.3g} spent{each}"


def ratio(numerator: float, denominator: float) -> float | None:
    """A ratio of sums, or None when nothing was counted."""
    return numerator / denominator if denominator else None


def acceptance_length(counts: Counts) -> float | None:
    """Tokens per step, bonus or correction included: (accepted + steps) / steps."""
    return ratio(counts.tokens, counts.steps)


def draft_acceptance_rate(counts: Counts) -> float | None:
    """accepted / proposed: what vLLM and SGLang call the acceptance rate."""
    return ratio(counts.accepted, counts.proposed)


def rejection_probability(counts: Counts) -> float | None:
    """rejections / judged: the rejection probability of the theory."""
    return ratio(counts.rejected, counts.judged)


def acceptance_at(counts: Counts) -> list[float]:
    """Conditional acceptance by depth: accepted / judged at depth 1, 2, ..."""
    return [a / j for a, j in zip(counts.accepted_at, counts.judged_at, strict=True) if j]


def expected_length(counts: Counts) -> float:
    """Tokens per step that acceptance by depth implies: 1 + sum over depths of (reach of the depth) * (its acceptance).

    Reach is judged_at / steps, so that drafts shorter than the longest one (budgets, missing proposals) are counted as such.
    """
    if not counts.steps:
        return 1.0
    reach = (j / counts.steps for j in counts.judged_at)
    return 1.0 + sum(r * a for r, a in zip(reach, acceptance_at(counts), strict=False))


def predicted_speedup(
    counts: Counts, seconds: dict[str, float], plain: Counts, plain_seconds: dict[str, float]
) -> float | None:
    """Speed-up predicted from acceptance by position and measured times: tokens per step times plain step time over step time.

    `seconds`: wall-clock seconds by phase of runs whose sums are `counts`; sequence-steps are the unit on both sides.
    """
    if not counts.steps or not plain.steps:
        return None
    step = sum(seconds.values()) / counts.steps
    plain_step = sum(plain_seconds.values()) / plain.steps
    return expected_length(counts) * plain_step / step if step else None


def summary(counts: Counts) -> dict[str, object]:
    """Raw counts, named ratios, and the ledger: the part that all JSON outputs share."""
    book = ledger(counts)
    return {
        "counts": {name: getattr(counts, name) for name in Counts.__dataclass_fields__},
        "acceptance_length": acceptance_length(counts),
        "draft_acceptance_rate": draft_acceptance_rate(counts),
        "rejection_probability": rejection_probability(counts),
        "acceptance_by_position": acceptance_at(counts),
        "total_variation_per_token": ratio(counts.bias, counts.emitted),
        "ledger": {
            "predicted": book.predicted,
            "observed": book.observed,
            "low": book.low,
            "high": book.high,
            "agrees": book.agrees,
        },
    }

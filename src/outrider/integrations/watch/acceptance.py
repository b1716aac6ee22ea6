"""Acceptance of single requests, as engines report it with a reply, and what it predicts for every draft length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST = 64
"""Positions of a draft that are read."""
MOST = 1_000_000
BEYOND = 2
"""Lengths beyond the served one that are predicted, with the acceptance of its last position."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One request. drafts: passes with a draft. judged_at, accepted_at: by position, from the first; empty where the engine does
    not tell them."""

    drafts: int | None
    proposed: int
    accepted: int
    judged_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()


def of_reply(document: Any) -> Acceptance | None:
    """What a reply of any of the engines says of its own speculation; None where it says nothing, or nothing that can be true."""
    if not isinstance(document, dict):
        return None
    metrics, timings, more = (document.get(k) for k in ("metrics", "timings", "sglext"))
    if isinstance(metrics, dict) and isinstance(metrics.get("speculative_decoding"), dict):
        return _of_vllm(metrics["speculative_decoding"], metrics.get("outrider"))
    if isinstance(more, dict) and isinstance(more.get("spec_tokens_details"), dict):
        return _of_sglang(more["spec_tokens_details"])
    if isinstance(timings, dict) and "draft_n" in timings:
        proposed, accepted = _whole(timings.get("draft_n")), _whole(timings.get("draft_n_accepted"))
        return (
            None
            if proposed is None or accepted is None or accepted > proposed
            else Acceptance(None, proposed, accepted)
        )
    return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST else None


def _wholes(value: Any) -> list[int] | None:
    if not isinstance(value, list) or len(value) > MOST or any(_whole(v) is None for v in value):
        return None
    return value


def _of_vllm(found: dict[str, Any], ours: Any = None) -> Acceptance | None:
    """vLLM's form, which our server has too, with the positions under a key of its own."""
    names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    drafts, proposed, accepted = (_whole(found.get(k)) for k in names)
    if drafts is None or proposed is None or accepted is None or accepted > proposed:
        return None
    each, drafted = _wholes(found.get("per_step_accepted")), _wholes(found.get("per_step_drafted"))
    if each is not None and drafted is not None and len(each) == len(drafted) and each:
        return _of_steps(each, drafted)
    one = ours[0] if isinstance(ours, list) and len(ours) == 1 and isinstance(ours[0], dict) else {}
    judged, kept = (_wholes(one.get(f"{name}_by_position")) for name in ("judged", "accepted"))
    if judged and kept is not None and len(judged) == len(kept) <= LONGEST and _falls(judged, kept):
        return Acceptance(drafts, proposed, accepted, tuple(judged), tuple(kept))
    return _of_histogram(drafts, proposed, accepted, _wholes(found.get("acceptance_histogram")))


def _falls(judged: list[int], kept: list[int]) -> bool:
    """Whether every position was judged at most as often as the one before it was accepted."""
    return all(a <= j for a, j in zip(kept, judged, strict=True)) and all(
        j <= a for j, a in zip(judged[1:], kept, strict=False)
    )


def _of_sglang(found: dict[str, Any]) -> Acceptance | None:
    names = ("spec_verify_ct", "spec_num_proposed_drafts", "spec_num_correct_drafts")
    drafts, proposed, accepted = (_whole(found.get(k)) for k in names)
    if drafts is None or proposed is None or accepted is None or accepted > proposed:
        return None
    return _of_histogram(drafts, proposed, accepted, _wholes(found.get("spec_correct_drafts_histogram")))


def _of_steps(each: list[int], drafted: list[int]) -> Acceptance | None:
    """From the drafted and accepted tokens of every step. A step without a draft counts nowhere."""
    steps = [(a, k) for a, k in zip(each, drafted, strict=True) if k]
    if any(a > k or k > LONGEST for a, k in steps):
        return None
    deepest = max((k for _, k in steps), default=0)
    judged = tuple(sum(min(a + 1, k) > d for a, k in steps) for d in range(deepest))
    kept = tuple(sum(a > d for a, _ in steps) for d in range(deepest))
    return Acceptance(len(steps), sum(k for _, k in steps), sum(a for a, _ in steps), judged, kept)


def _of_histogram(drafts: int, proposed: int, accepted: int, histogram: list[int] | None) -> Acceptance:
    """From how many steps accepted how many: positions are known where all drafts had the same length."""
    plain = Acceptance(drafts, proposed, accepted)
    if histogram is None or not 1 < len(histogram) <= LONGEST + 1 or sum(histogram) != drafts:
        return plain
    longest = len(histogram) - 1
    if proposed != drafts * longest or sum(j * n for j, n in enumerate(histogram)) != accepted:
        return plain
    kept = tuple(sum(histogram[d + 1 :]) for d in range(longest))
    return Acceptance(drafts, proposed, accepted, (drafts, *kept[:-1]), kept)


# ------------------------------------------------------------------ what it predicts
@dataclass(frozen=True, slots=True)
class Length:
    """Predicted tokens per drafted pass at one draft length, with a 95% interval over requests (None for fewer than two).

    beyond: it is longer than what was served, so that the acceptance of the last position is assumed.
    """

    length: int
    value: float
    low: float | None
    high: float | None
    beyond: bool


def predict(requests: Sequence[Acceptance]) -> list[Length]:
    """Tokens per drafted pass at every length up to the served one and a little beyond, 1 + sum over positions of the product of
    their conditional acceptances (accepted / judged). Requests are the units: the interval is the delete-one jackknife's. Empty
    where no request says which positions were judged."""
    told = [r for r in requests if r.judged_at]
    if not told:
        return []
    deepest = max(len(r.judged_at) for r in told)
    judged, kept = (_table([getattr(r, name) for r in told], deepest) for name in ("judged_at", "accepted_at"))
    whole = _lengths(judged.sum(0), kept.sum(0))
    n, margins = len(told), list[float | None]([None] * len(whole))
    if n > 1:
        from scipy.special import stdtrit

        without = np.array([_lengths(judged.sum(0) - j, kept.sum(0) - a) for j, a in zip(judged, kept, strict=True)])
        errors = np.sqrt((n - 1) / n * ((without - without.mean(0)) ** 2).sum(0))
        margins = (errors * float(stdtrit(n - 1, 0.975))).tolist()
    ends = [(None, None) if m is None else (float(v) - m, float(v) + m) for v, m in zip(whole, margins, strict=True)]
    return [Length(i + 1, float(v), *ends[i], i >= deepest) for i, v in enumerate(whole)]


def _table(rows: list[tuple[int, ...]], width: int) -> NDArray[np.float64]:
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=float)


def _lengths(judged: NDArray[np.float64], kept: NDArray[np.float64]) -> NDArray[np.float64]:
    by = np.divide(kept, judged, out=np.zeros_like(kept), where=judged > 0)
    further: NDArray[np.float64] = np.append(by, np.repeat(by[-1], BEYOND))
    return np.asarray(1.0 + np.cumsum(np.cumprod(further)), dtype=np.float64)

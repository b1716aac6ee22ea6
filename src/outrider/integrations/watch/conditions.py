"""The alerts of a watched server: those of our own server that its sums allow, and those that only somebody outside can raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from outrider.integrations.watch.sums import Span, Sums
from outrider.telemetry.alerts import CONDITIONS, Condition, WindowSample
from outrider.telemetry.detect import LIFE_LEVEL, STEPS_BETWEEN_FALSE_ALARMS


@dataclass(frozen=True, slots=True)
class Look(WindowSample):
    """A window of a watched server. rejected, judged: the least, where they are not known; most: the most. lives: times it began
    anew in the window. accused: whether the audit says that its text is not the target's."""

    most: int = 0
    lives: int = 0
    answers: bool = True
    accused: bool = False


def doubted(gauges: dict[str, float]) -> bool:
    """Whether the server's own evidence against exactness is enough for an alarm."""
    return gauges.get("evidence", 0.0) >= math.log(1 / LIFE_LEVEL)


def look(span: Span, gauges: dict[str, float], *, answers: bool, lives: int, accused: bool) -> Look:
    """The window as the conditions read it."""
    counted: Callable[[str], int] = lambda name: round(span.get(name) or 0)  # noqa: E731
    low, high = span.rejections() or (0.0, 0.0)
    told = span.get("judged")
    known = span.rejections() is not None
    return Look(
        judged=round(told) if told is not None else counted("accepted") + round(low) if known else 0,
        rejected=round(low),
        most=round(high),
        accepted=counted("accepted"),
        steps=counted("passes"),
        drafts=counted("drafts"),
        emitted=counted("emitted"),
        bias=span.get("bias") or 0.0,
        overloaded=counted("overloaded"),
        failed=counted("failed"),
        speedup=gauges.get("speedup"),
        break_even=gauges.get("break_even"),
        alive=gauges.get("alive", 1.0) >= 1.0,
        doubted=doubted(gauges),
        changed=gauges.get("detector", 0.0) >= math.log(STEPS_BETWEEN_FALSE_ALARMS),
        lives=lives,
        answers=answers,
        accused=accused,
    )


def _too_good(r: WindowSample) -> float | None:
    """The largest share of judged tokens that may have been rejected."""
    most = r.most if isinstance(r, Look) else r.rejected
    return most / (r.accepted + most) if r.accepted + most >= 1000 else None


NEEDS: dict[str, tuple[str, ...]] = {
    "rejections_above_break_even": ("drafts", "proposed"),
    "acceptance_suspicious": ("drafts", "proposed"),
    "speculation_loses": ("drafts", "proposed"),
    "not_exact": ("evidence",),
    "residuals_changed": ("detector",),
    "quality_spent": ("bias",),
    "queue_full": ("overloaded",),
    "few_drafts": ("drafts", "passes"),
    "engine_silent": ("alive",),
    "requests_fail": ("failed",),
}
"""Which sums or values each condition of our server reads."""
OUTSIDE: tuple[Condition, ...] = (
    Condition(
        "server_silent",
        "critical",
        "the server does not answer, or not with metrics that can be read",
        lambda r: float(isinstance(r, Look) and not r.answers),
        0.5,
        0.5,
        hold=5.0,
    ),
    Condition(
        "server_restarted",
        "info",
        "the server has begun anew within the last minute",
        lambda r: float(r.lives) if isinstance(r, Look) else None,
        0.5,
        0.5,
        hold=0.0,
    ),
)
AUDITED = Condition(
    "audit_alarm",
    "critical",
    "the audit says that its text is not distributed as the target's",
    lambda r: float(isinstance(r, Look) and r.accused),
    0.5,
    0.5,
    hold=0.0,
)


def conditions_for(sums: Sums, gauges: dict[str, float], *, audited: bool) -> tuple[Condition, ...]:
    """The conditions that can be judged on a server that tells these: one that cannot is left out, not called fine."""
    told = {*sums, *gauges}
    ours = tuple(c for c in CONDITIONS if all(need in told for need in NEEDS[c.name]))
    ours = tuple(replace(c, value=_too_good) if c.name == "acceptance_suspicious" else c for c in ours)
    return (*OUTSIDE, *((AUDITED,) if audited else ()), *ours)

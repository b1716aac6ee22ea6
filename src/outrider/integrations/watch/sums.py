"""Sums over the lives of a server: continued when it begins anew, kept when one vanishes, and what two of them say together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.integrations.watch.readers import Seen, Sums
from outrider.records import PHASES, Counts
from outrider.telemetry.prometheus import quantile

COUNTED = ("emitted", "prompt", "drafts", "proposed", "steps", "ended")
"""Sums that are counters of the page as they stand there: differences of counters that are read in between may fall a little."""


class Continued:
    """The sums of all lives of one server since the watch began; the first page counts in full.

    A server has begun anew when one of its counters is smaller than before, or its process has a later time of birth. What it
    counted between the last page and its end is lost.
    """

    def __init__(self) -> None:
        self.before: Sums = {}
        self.last: Sums = {}
        self.start: float | None = None
        self.lives = 0
        self.gone: set[str] = set()

    def add(self, seen: Seen) -> bool:
        """Take a page in; whether the server has begun anew."""
        start = seen.gauges.get("start")
        fell = any(v < self.last.get(name, 0.0) for name, v in seen.sums.items() if name.partition("/")[0] in COUNTED)
        born = self.start is not None and start is not None and start > self.start + 1.0
        anew = self.lives > 0 and (fell or born)
        if anew:
            self.before = self.now()
            self.last = {}
        self.lives += anew or not self.lives
        self.gone = set(self.last) - set(seen.sums)
        self.last = self.last | seen.sums
        self.start = self.start if start is None else start
        return anew

    def now(self) -> Sums:
        """The sums; one that vanished stands still."""
        return {k: self.before.get(k, 0.0) + self.last.get(k, 0.0) for k in {**self.before, **self.last}}


@dataclass(frozen=True, slots=True)
class Span:
    """What happened between two moments. seconds: between them. None: the engine does not tell."""

    sums: Sums
    seconds: float = 0.0

    @staticmethod
    def between(then: Sums, now: Sums, seconds: float) -> Span:
        """A sum that appeared meanwhile began at 0."""
        return Span({k: max(0.0, v - then.get(k, 0.0)) for k, v in now.items()}, seconds)

    def get(self, name: str) -> float | None:
        return self.sums.get(name)

    def ratio(self, top: str, bottom: str) -> float | None:
        """A ratio of sums; None where one is unknown or nothing was counted."""
        over, under = self.get(top), self.get(bottom)
        return over / under if over is not None and under else None

    def at(self, name: str) -> list[float]:
        """A sum by position, from the first; positions behind a gap are left out."""
        out: list[float] = []
        while (value := self.get(f"{name}/{len(out)}")) is not None:
            out.append(value)
        return out

    def under(self, prefix: str) -> dict[str, float]:
        """The parts of a sum by their names."""
        return {k.partition("/")[2]: v for k, v in self.sums.items() if k.startswith(f"{prefix}/")}

    # ------------------------------------------------------------------ speculation
    @property
    def tokens_per_pass(self) -> float | None:
        """Generated tokens over passes, those without a draft among them."""
        return self.ratio("emitted", "passes")

    @property
    def tokens_per_drafted_pass(self) -> float | None:
        """1 + accepted / drafts: what vLLM calls the mean acceptance length. It leaves passes without a draft out."""
        over = self.ratio("accepted", "drafts")
        return None if over is None else 1.0 + over

    @property
    def even(self) -> bool:
        """Whether all drafts were as long as the longest."""
        drafts, proposed, longest = self.get("drafts"), self.get("proposed"), len(self.at("accepted_at"))
        return bool(longest) and drafts is not None and proposed == longest * drafts

    def rejections(self) -> tuple[float, float] | None:
        """Least and largest number of rejected draft tokens: the same number where it is known.

        Of D drafts with m tokens in all, of which a were accepted and c at the last of K positions: every draft that was not kept
        whole has one rejection. If all have K tokens these are D - c. Otherwise m - a tokens were wasted, at least one and at
        most K by each rejection.
        """
        if (told := self.get("rejected")) is not None:
            return told, told
        drafts, proposed, accepted = (self.get(n) for n in ("drafts", "proposed", "accepted"))
        by = self.at("accepted_at")
        if drafts is None or proposed is None or accepted is None:
            return None
        if not drafts or not by:
            return (0.0, 0.0) if not drafts else None
        if self.even:
            return drafts - by[-1], drafts - by[-1]
        wasted = max(0.0, proposed - accepted)
        high = max(0.0, min(drafts - by[-1], wasted))
        return min(high, float(math.ceil(wasted / len(by)))), high

    def judged_at(self) -> list[float]:
        """Judged tokens by position; empty where unknown. With drafts of one length a position is judged where the one before it
        was accepted."""
        if told := self.at("judged_at"):
            return told
        return [self.get("drafts") or 0.0, *self.at("accepted_at")[:-1]] if self.even else []

    def rejection(self) -> tuple[float, float] | None:
        """Rejections per judged token, least and largest."""
        found, accepted = self.rejections(), self.get("accepted")
        judged = self.get("judged")
        if found is None or accepted is None or not (judged or accepted + found[1]):
            return None
        low, high = (r / (judged or accepted + r) if r else 0.0 for r in found)
        return low, high

    def counts(self) -> Counts:
        """As records of a store hold them. Rejections that are not known exactly count as none, judged tokens too: a ledger adds
        up only what is certain."""
        found, whole = self.rejections(), lambda name: round(self.get(name) or 0)
        exact = found is not None and found[0] == found[1]
        rejected = round(found[0]) if found is not None and exact else 0
        judged = self.judged_at() if exact else []
        told = self.get("judged")
        accepted = whole("accepted")
        return Counts(
            steps=whole("passes"),
            proposed=whole("proposed"),
            judged=round(told) if told is not None else accepted + rejected if exact else 0,
            accepted=accepted,
            rejected=rejected,
            emitted=whole("emitted"),
            risk=self.get("risk") or 0.0,
            spread=self.get("spread") or 0.0,
            bias=self.get("bias") or 0.0,
            judged_at=[round(j) for j in judged],
            accepted_at=[round(a) for a in self.at("accepted_at")[: len(judged)]],
        )

    # ------------------------------------------------------------------ time
    def quantiles(self, name: str) -> dict[str, float | None]:
        """Median and 95th percentile in seconds of a histogram."""
        ends = sorted((float(end), n) for end, n in self.under(name).items())
        bounds, counts = [e for e, _ in ends if math.isfinite(e)], [round(n) for _, n in ends]
        if not bounds:
            return {"median": None, "high": None}
        return {key: quantile(bounds, counts, share) for key, share in (("median", 0.5), ("high", 0.95))}

    def rate(self) -> float | None:
        """Generated tokens per second."""
        emitted = self.get("emitted")
        return emitted / self.seconds if emitted is not None and self.seconds > 0 else None

    def phases(self) -> dict[str, float]:
        """Seconds by phase; empty where the engine does not tell."""
        found = self.under("seconds")
        return {phase: found[phase] for phase in PHASES} if all(phase in found for phase in PHASES) else {}

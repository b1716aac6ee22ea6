"""Does a run hold its baseline? Speed, acceptance, exactness and quality, each with a margin stated beforehand.

"Not significantly worse" is not "not worse": a check passes only if its whole interval lies on the good side of the margin
(non-inferiority), fails if the whole interval lies on the bad side, and is inconclusive in between. The unit is the prompt group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outrider.errors import ConfigError
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.ratios import difference_influence, influence, margin
from outrider.evaluate.store.store import Store
from outrider.files import parse_json, read_text
from outrider.records import Counts
from outrider.telemetry.ledger import ledger

Outcome = Literal["passed", "failed", "inconclusive", "not measured"]


ALARM = 1e-4
"""Probability with which the ledger of an exact engine fails one check: a gate runs on every change."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. value in [low, high] (95%); margin: the worst value that still passes."""

    arm: str
    what: str
    outcome: Outcome
    value: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Margins:
    """How much worse is still good: shares of speed, absolute acceptance, nats per token."""

    speed: float = 0.05
    acceptance: float = 0.02
    quality: float = 0.02


RUN_BYTES = 1 << 30
"""Largest file of a run that is read."""
SAME = ("prompts", "temperature", "top_p", "max_tokens", "batch")
"""What two runs must have been asked alike for their difference to mean anything."""


def load_run(reference: str, store: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """A run by its id or name in a store, or the file that `bench --out` wrote: its configuration and records."""
    path = Path(reference)
    if path.suffix == ".json" and path.is_file():
        document = parse_json(read_text(path, RUN_BYTES), path)
        try:
            return document, [Record.from_dict(r) for r in document["records"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}: not a run that bench --out wrote") from None
    try:
        return _stored(reference, store)
    except ConfigError:
        if path.suffix == ".json":
            raise ConfigError(f"{path}: no such file, and no run of that name in {store}; check the path") from None
        raise


def _stored(reference: str, store: str | Path) -> tuple[dict[str, Any], list[Record]]:
    with Store(store, read_only=True) as db:
        run = db.run(reference)
        if run.kind != "bench":
            raise ConfigError(f"{store}: run {reference!r} is of kind {run.kind!r}; a gate compares bench runs")
        return run.config, [Record.from_dict(d) for d in db.records(run.id).values()]


def comparable(run: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises ConfigError for two runs that were asked different things; what one of them does not say is not compared."""
    for name in SAME:
        if name in run and name in base and run[name] != base[name]:
            ours, theirs = ("other ones", "") if name == "prompts" else (run[name], f" against {base[name]}")
            raise ConfigError(f"the runs differ in {name} ({ours}{theirs}): bench both with the same options")


def same_draws(ours: Sequence[Record], theirs: Sequence[Record]) -> str | None:
    """A sentence if both runs hold the very same plain texts, as two runs with one seed do; None if they are two samples.

    Such runs differ in speed alone: intervals of everything that is decided by the texts have no width, and say that the engine
    is deterministic, not that a margin was held. Known by the texts; runs of files, which hold none, by their counts.
    """
    sides = [{r.key: r for r in records if r.arm == "plain"} for records in (ours, theirs)]
    both = sides[0].keys() & sides[1].keys()
    alike = [_drawn(sides[0][k]) == _drawn(sides[1][k]) for k in both]
    if not both or not all(alike) or len(sides[0]) != len(sides[1]):
        return None
    return (
        "both runs drew the same texts (one --seed, or greedy): acceptance and quality show that the engine repeats itself, not "
        "that a margin holds; bench one side with another --seed for two samples"
    )


def _drawn(r: Record) -> object:
    return r.outputs or (r.tokens, r.loops, tuple(t.tokens for t in r.timings), r.nll)


def gate(run: Sequence[Record], base: Sequence[Record], margins: Margins, *, relative: bool) -> list[Check]:
    """All checks of every arm that both runs have.

    relative: compare speed-ups over the plain arm of the same run, which a faster or slower machine does not change; else
    tokens per second. Raises ConfigError when no arm is common.
    """
    arms = [a for a in dict.fromkeys(r.arm for r in base) if any(r.arm == a for r in run)]
    if not arms:
        raise ConfigError("the runs have no arm in common: bench both with the same --lengths")
    out: list[Check] = []
    for arm in arms:
        ours, theirs = _Arm(run, arm), _Arm(base, arm)
        if not relative or arm != "plain":
            out.append(speed(ours, theirs, margins.speed, relative))
        if ours.counts.proposed:
            out.append(acceptance(ours, theirs, margins.acceptance))
        out.append(exactness(ours))
        out.append(health(ours, theirs))
        out.append(quality(ours, theirs, margins.quality))
    return out


class _Arm:
    """Sums of one arm by prompt group, and of the plain arm of its run."""

    def __init__(self, records: Sequence[Record], name: str) -> None:
        self.name = name
        self.failed = sum(r.failed for r in records if r.arm == name)
        plain = [r for r in records if r.arm == "plain" and not r.failed]
        both = [r for r in records if r.arm == name and not r.failed]
        groups = {r.group for r in both} & ({r.group for r in plain} if plain else {r.group for r in both})
        self.groups = sorted(groups)
        self.records = [r for r in both if r.group in groups]
        if len(self.groups) < 2:
            raise ConfigError(f"arm {name!r} has {len(self.groups)} complete prompt groups; a gate needs at least two")
        self.rate = self._sums(self.records)
        self.plain = self._sums(plain) if plain else None
        self.counts = Counts()
        for r in self.records:
            self.counts.merge(r.counts)

    def _sums(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return np.array(
            [[sum(getattr(r, f) for r in records if r.group == g) for f in ("tokens", "seconds")] for g in self.groups]
        )

    def column(self, number: Any) -> NDArray[np.float64]:
        """Sum over the records of each group."""
        return np.array([sum(number(r) for r in self.records if r.group == g) for g in self.groups], dtype=float)


def _error(ours: _Arm, theirs: _Arm, mine: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Half width of the difference of two ratios from their influences: paired where both runs have the same prompt groups."""
    return margin([mine - other] if ours.groups == theirs.groups else [mine, other])


def judge(
    arm: str, what: str, value: float, low: float, high: float, worst: float, *, more_is_better: bool = True
) -> Check:
    """Non-inferiority from a 95% interval. worst: the value at the margin."""
    passed, failed = (low >= worst, high < worst) if more_is_better else (high <= worst, low > worst)
    outcome: Outcome = "passed" if passed else "failed" if failed else "inconclusive"
    return Check(arm, what, outcome, value, low, high, worst)


def speed(ours: _Arm, theirs: _Arm, limit: float, relative: bool) -> Check:
    """Tokens per second, or speed-up over plain, of the run over the baseline's."""
    if relative and (ours.plain is None or theirs.plain is None):
        raise ConfigError("a relative gate needs the arm 'plain' in both runs: bench with length 0, or use --absolute")

    def rate(arm: _Arm) -> tuple[float, NDArray[np.float64]]:
        tokens, seconds = arm.rate.T
        value, e = float(tokens.sum() / seconds.sum()), influence(tokens, seconds)
        if relative and arm.plain is not None:
            plain_tokens, plain_seconds = arm.plain.T
            value *= float(plain_seconds.sum() / plain_tokens.sum())
            e = e - influence(plain_tokens, plain_seconds)
        return value, e

    (now, mine), (before, other) = rate(ours), rate(theirs)
    wide, ratio = _error(ours, theirs, mine, other), now / before
    what = "speed-up over plain, ratio" if relative else "tokens per second, ratio"
    return judge(ours.name, what, ratio, ratio * math.exp(-wide), ratio * math.exp(wide), 1 - limit)


def acceptance(ours: _Arm, theirs: _Arm, limit: float) -> Check:
    """Accepted over judged drafts, difference."""
    parts = [(a.column(lambda r: r.counts.accepted), a.column(lambda r: r.counts.judged)) for a in (ours, theirs)]
    if not all(judged.sum() for _, judged in parts):
        return Check(ours.name, "acceptance", "not measured", note="one of the runs judged no drafts")
    return _difference(ours, theirs, "acceptance, difference", parts, -limit, more_is_better=True)


def _difference(
    ours: _Arm,
    theirs: _Arm,
    what: str,
    parts: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    worst: float,
    *,
    more_is_better: bool,
) -> Check:
    """Difference of two ratios of sums."""
    (a, b), (c, d) = parts
    value = float(a.sum() / b.sum() - c.sum() / d.sum())
    wide = _error(ours, theirs, difference_influence(a, b), difference_influence(c, d))
    return judge(ours.name, what, value, value - wide, value + wide, worst, more_is_better=more_is_better)


def exactness(ours: _Arm) -> Check:
    """The ledger of the run: observed rejections within their predicted interval, and no bias spent."""
    book = ledger(ours.counts, level=ALARM)
    good = book.agrees and ours.counts.bias == 0
    note = f"predicted {book.predicted:.1f} rejections, observed {book.observed}, bias {ours.counts.bias:.3g}"
    return Check(ours.name, "exactness", "passed" if good else "failed", book.observed, book.low, book.high, note=note)


def health(ours: _Arm, theirs: _Arm) -> Check:
    """Failed requests and texts that end in a loop: no more than in the baseline, by more than chance."""
    loops = [(sum(r.loops for r in a.records), sum(len(r.timings) for r in a.records)) for a in (ours, theirs)]
    share = [n / max(1, of) for n, of in loops]
    noise = 3 * (share[1] * (1 - share[1]) / max(1, loops[0][1])) ** 0.5 + 3 / max(1, loops[0][1])
    good = ours.failed <= theirs.failed and share[0] <= share[1] + noise
    note = f"{ours.failed} failed (baseline {theirs.failed}), {share[0]:.1%} loops (baseline {share[1]:.1%})"
    return Check(ours.name, "health", "passed" if good else "failed", note=note)


def quality(ours: _Arm, theirs: _Arm, limit: float) -> Check:
    """Nats per token of the texts under the target, difference: less is better."""
    if any(r.nll is None for a in (ours, theirs) for r in a.records):
        return Check(ours.name, "quality", "not measured", note="bench both runs with --quality")
    parts = [(a.column(lambda r: r.nll), a.column(lambda r: r.tokens)) for a in (ours, theirs)]
    what = "quality (nats per token), difference"
    return _difference(ours, theirs, what, parts, limit, more_is_better=False)


def overall(checks: Sequence[Check]) -> tuple[str, int]:
    """The gate's answer and exit code: 1 if a check failed, 3 if one is undecided, else 0."""
    outcomes = {c.outcome for c in checks}
    if "failed" in outcomes:
        return "failed", 1
    return ("inconclusive", 3) if "inconclusive" in outcomes else ("passed", 0)

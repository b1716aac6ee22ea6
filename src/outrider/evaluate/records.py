"""What a run leaves behind: one record a group of prompts, and what the records of an arm say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from outrider.evaluate.statistics.ratios import Ratio, paired_ratio
from outrider.records import PHASES, Counts

Key = tuple[str, int, int]
"""Of a record within its run: (task, item, sample); of a bench run (arm, group, repeat)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: seconds from its submission to its first tokens and to its end, its tokens, and the steps of all sequences of
    its group meanwhile (0 in records of older releases)."""

    first: float
    end: float
    tokens: int
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One run of one arm on one group of prompts. Seconds are wall clock; `counts` are the engine's raw sums.

    failed: requests that ended with an error. loops: texts that end in a repetition. outputs: the token ids.
    nll: negative log-likelihood of the outputs under the target, in nats, where it was asked for.
    joules: energy of the machine's processors meanwhile, where it reports it. machine: where and with what it ran (`machine`).
    replayed: target calls per token that replay expects of this arm along continuations that no arm wrote (`continuations`).
    asked: the prompts of the outputs, where some were made of replies; otherwise they are those of the group, and it is empty.
    shortened: dialogues that ended before their last turn, since behind these replies it did not fit into the context, or the chat
    template refused it: chance, not a failure of the arm.
    """

    arm: str
    group: int
    repeat: int
    order: int
    tokens: int
    seconds: float
    phases: dict[str, float]
    counts: Counts
    failed: int
    timings: tuple[Timing, ...] = ()
    loops: int = 0
    outputs: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    nll: float | None = None
    joules: float | None = None
    machine: Mapping[str, Any] = field(repr=False, default_factory=dict)
    replayed: float | None = None
    asked: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    shortened: int = 0

    @property
    def key(self) -> Key:
        return self.arm, self.group, self.repeat

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """The record that `asdict` turned into plain data."""
        return Record(
            **data
            | {
                "counts": Counts(**data["counts"]),
                "timings": tuple(Timing(**t) for t in data["timings"]),
                "outputs": tuple(tuple(o) for o in data["outputs"]),
                "asked": tuple(tuple(a) for a in data.get("asked", ())),
            }
        )


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm over all its records: rates as ratios of sums, the spread over records, and the ratio to the base arm.

    against: the same ratio to other arms of the run, by their names.
    """

    name: str
    tokens: int
    seconds: float
    tokens_per_second: float
    low: float
    median: float
    high: float
    phases: dict[str, float]
    counts: Counts
    failed: int
    speedup: Ratio | None
    loops: int = 0
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    nll: float | None = None
    joules: float | None = None
    against: Mapping[str, Ratio] = field(default_factory=dict)


def summarise(records: list[Record], base: str, against: Sequence[str] = ()) -> list[ArmSummary]:
    """Per arm, in order of first appearance with the base first. low and high: 10th and 90th percentile over records.

    against: arms that every other one is compared with as well, as it is with the base. Those without records are left out.
    """
    names = sorted(
        {r.arm for r in records}, key=lambda n: (n != base, next(i for i, r in enumerate(records) if r.arm == n))
    )
    failed_groups = {(r.group, r.repeat) for r in records if r.failed}
    per_arm = {n: [r for r in records if r.arm == n and (r.group, r.repeat) not in failed_groups] for n in names}
    out: list[ArmSummary] = []
    for name in names:
        mine = per_arm[name]
        if not mine:
            out.append(ArmSummary(name, 0, 0.0, 0.0, 0.0, 0.0, 0.0, {}, Counts(), sum(r.failed for r in records), None))
            continue
        counts = Counts()
        for r in mine:
            counts.merge(r.counts)
        rates = [r.tokens / r.seconds for r in mine]
        over = {n: speed_over(mine, per_arm[n]) for n in (base, *against) if n != name and per_arm.get(n)}
        low, median, high = np.quantile(rates, [0.1, 0.5, 0.9])
        tokens, seconds = sum(r.tokens for r in mine), sum(r.seconds for r in mine)
        phases = {p: sum(r.phases[p] for r in mine) for p in PHASES}
        failed = sum(r.failed for r in records if r.arm == name)
        out.append(
            ArmSummary(
                name,
                tokens,
                seconds,
                tokens / seconds,
                float(low),
                float(median),
                float(high),
                phases,
                counts,
                failed,
                over.get(base),
                sum(r.loops for r in mine),
                latency(mine),
                _mean_nll(mine),
                None if any(r.joules is None for r in mine) else sum(r.joules or 0.0 for r in mine),
                {n: over[n] for n in against if n in over},
            )
        )
    return out


PERCENTILES = (50, 90, 95, 99)
LEAST_FOR_TAIL = 300
"""Requests below which the 99th percentile is not given: it would be the largest few."""


def latency(records: list[Record]) -> dict[str, dict[str, float]]:
    """Percentiles in seconds: time to first token, time per later token of a request, end to end; and the number of requests."""
    timings = [t for r in records for t in r.timings]
    wanted = [p for p in PERCENTILES if p < 99 or len(timings) >= LEAST_FOR_TAIL]
    kinds = {
        "first_token": [t.first for t in timings],
        "per_token": [(t.end - t.first) / (t.tokens - 1) for t in timings if t.tokens > 1],
        "end_to_end": [t.end for t in timings],
    }
    out = {k: {f"p{p}": float(np.percentile(v, p)) for p in wanted} for k, v in kinds.items() if v}
    return out and {"requests": {"count": float(len(timings))}, **out}


def _mean_nll(records: list[Record]) -> float | None:
    """Nats per token of all texts under the target, where every record has it."""
    if not records or any(r.nll is None for r in records):
        return None
    return sum(r.nll or 0.0 for r in records) / max(1, sum(r.tokens for r in records))


def speed_over(ours: Sequence[Record], base: Sequence[Record]) -> Ratio:
    """Tokens per second of one arm over those of another on the same groups, paired by group; no record of a failed one."""
    return paired_ratio(*_by_group(ours), *_by_group(base))


def _by_group(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    groups = sorted({r.group for r in records})
    tokens = np.array([sum(r.tokens for r in records if r.group == g) for g in groups], dtype=float)
    seconds = np.array([sum(r.seconds for r in records if r.group == g) for g in groups], dtype=float)
    return tokens, seconds


def as_json(summary: ArmSummary) -> dict[str, object]:
    """One arm as plain data."""
    out = asdict(summary)
    if summary.speedup is not None:
        out["speedup"]["verdict"] = summary.speedup.verdict
    for name, ratio in summary.against.items():
        out["against"][name]["verdict"] = ratio.verdict
    return out

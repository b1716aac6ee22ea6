"""The server's interface to an experiment on its requests: it assigns each request to an arm and records how it ended."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol, runtime_checkable

from outrider.params import SamplingParams
from outrider.serve.tickets import Ticket

USER, ARM = "x-outrider-user", "x-outrider-arm"
"""Headers: the user of a request whose body has no `user`; and, in replies, its arm."""


@runtime_checkable
class LiveExperimentHook(Protocol):
    """An experiment. An assignment (`place`) has a `label`, the arm, and `overrides`, sampling parameters added to the request's;
    each is passed to `ended` once, with a record of plain data."""

    def start(self) -> None: ...
    def place(self, who: str) -> Any | None: ...
    def ended(self, place: Any, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Placer(LiveExperimentHook, Protocol):
    """The part of an experiment that a replica has: it places requests, and hands out what became of them, to be kept elsewhere."""

    def take(self, stopped: list[str]) -> list[dict[str, Any]]:
        """The records since the last call, as {label, unit, record}. stopped: arms that do harm, whose requests get the base's."""
        ...


def fixed_by_seed(params: SamplingParams, lane: str) -> bool:
    """Whether a request's seed fixes its text to one draft length: another length would give another draw of the same distribution.
    lane: of the server's rule; on lane `gumbel` (match) the text is the same for every length."""
    return params.seed is not None and not params.greedy and lane != "gumbel"


def join(trial: LiveExperimentHook, who: str, ticket: Ticket, params: SamplingParams) -> SamplingParams:
    """Assign a request to an arm and return its parameters there. Its record is passed on when its reply has ended."""
    place = trial.place(who)
    if place is None:
        return params
    ticket.arm, ticket.on_end = place.label, lambda done: trial.ended(place, record_of(done))
    return replace(params, **place.overrides)


def record_of(ticket: Ticket) -> dict[str, Any]:
    """How a request ended.

    outcome: why; "refused" if it never reached the engine. tokens: emitted. later: those after the first of each sample, which
    took `seconds`. queued, first: seconds until it had a slot, and until its first token. seeded: the client chose its seed.
    counts: raw sums of its drafts, rejections and predicted rejections.
    """
    counts, samples = ticket.counts(), ticket.sequences
    first, last = ticket.first, ticket.last
    return {
        "outcome": ticket.outcome if samples else "refused",
        "prompt_tokens": ticket.prompt_tokens,
        "tokens": counts.emitted,
        "later": max(0, counts.emitted - len(samples)),
        "seconds": 0.0 if first is None or last is None else last - first,
        "queued": None if ticket.admitted is None else ticket.admitted - ticket.arrived,
        "first": None if first is None else first - ticket.arrived,
        "seeded": any(s.params.seed is not None for s in samples),
        "counts": asdict(counts),
    }

"""The numbers of a step: plain values without torch, which are only summed and passed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PHASES: tuple[str, ...] = ("target", "rule", "draft", "host")


class CacheNeed(NamedTuple):
    """Bytes that caches take: `fixed` in any case, and `token` for each token in their pages."""

    fixed: int = 0
    token: int = 0


@dataclass(slots=True)
class Counts:
    """Raw counts, which are only summed; ratios are formed for output, as ratios of sums.

    steps: sequence-steps with a verdict. proposed: nodes proposed. judged, rejected: see `Verdict`. accepted: accepted nodes that
    were emitted. emitted: tokens. A text may end (end of text, stop string, limit) within the draft of its last step. dropped: the
    accepted nodes after that end. cut: the steps that lost their own token with it. So judged = accepted + dropped + rejected and
    emitted = accepted + steps - cut. risk, spread, bias: sums of the ledger over all judged positions.
    accepted_at[d]: steps whose node at depth d + 1 was accepted and emitted. judged_at[d]: steps in which depth d + 1 was judged,
    without positions after an end.
    """

    steps: int = 0
    proposed: int = 0
    judged: int = 0
    accepted: int = 0
    rejected: int = 0
    emitted: int = 0
    risk: float = 0.0
    spread: float = 0.0
    bias: float = 0.0
    accepted_at: list[int] = field(default_factory=list)
    judged_at: list[int] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the steps: the steps that plain decoding would have needed."""
        return self.accepted + self.steps - self.cut

    def add(
        self,
        proposed: int,
        accepted: int,
        judged: int,
        risk: float,
        spread: float,
        bias: float,
        kept: int | None = None,
    ) -> None:
        """Add one sequence-step with a verdict. kept: how many of its accepted + 1 tokens were emitted; None: all of them."""
        kept = accepted + 1 if kept is None else kept
        self.steps += 1
        self.proposed += proposed
        self.judged += judged
        self.accepted += min(accepted, kept)
        self.dropped += max(accepted - kept, 0)
        self.cut += kept <= accepted
        self.rejected += judged - accepted
        self.risk += risk
        self.spread += spread
        self.bias += bias
        self._grow(min(judged, kept))
        for d in range(min(judged, kept)):
            self.judged_at[d] += 1
        for d in range(min(accepted, kept)):
            self.accepted_at[d] += 1

    def merge(self, other: Counts) -> None:
        """Add the sums of `other`."""
        self.steps += other.steps
        self.proposed += other.proposed
        self.judged += other.judged
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.emitted += other.emitted
        self.risk += other.risk
        self.spread += other.spread
        self.bias += other.bias
        self.dropped += other.dropped
        self.cut += other.cut
        self._grow(len(other.judged_at))
        for d, (a, j) in enumerate(zip(other.accepted_at, other.judged_at, strict=True)):
            self.accepted_at[d] += a
            self.judged_at[d] += j

    def _grow(self, depth: int) -> None:
        while len(self.judged_at) < depth:
            self.accepted_at.append(0)
            self.judged_at.append(0)


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """What a step did to one sequence. slot: its index. proposed: nodes. judged: positions. accepted: nodes, emitted or not."""

    slot: int
    proposed: int
    judged: int
    accepted: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as sinks receive it: host numbers only.

    rows: rows of the forward; scored: sequences with a verdict; running, waiting: sequences after the step;
    seconds: wall-clock seconds of each of PHASES; counts: the step's sums. engine_seeded: the sums of the sequences whose seed the
    engine chose: a client's own seed may repeat its noise, and then the statistics of the ledger do not hold over several requests.
    replayed: tokens that the forward read besides its rows, once more, because a rejection had undone them (`Scores.replayed`).
    each: the scored sequences one by one, those that ended among them.
    cached: tokens that the forward's sequences had in the cache, in all. attended: pairs of a row and such a token of its sequence.
    """

    rows: int
    scored: int
    running: int
    waiting: int
    seconds: dict[str, float]
    counts: Counts
    engine_seeded: Counts = field(default_factory=Counts)
    replayed: int = 0
    each: tuple[SequenceStep, ...] = ()
    cached: int = 0
    attended: int = 0

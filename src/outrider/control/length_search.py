"""The measurements of one load, and its trial of two draft lengths, if one is running."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

PAIRS, MAX_TRIAL_STEPS = 16, 128
"""Paired step times of a trial of two lengths, and the number of steps after which it is abandoned."""
SETTLE, FIRST_PAUSE, CLOSE_PAUSE, LAST_PAUSE = 8, 64, 192, 2048
"""Steps before a trial: the first while a neighbouring length is unknown; otherwise the second, doubled while nothing changes, up
to the third after a close trial, which costs almost nothing and may have been wrong, and up to the last after a clear one. So
trials cost less than half a per cent in the long run."""
BLIND = 64
"""Surplus of steps that cannot be compared with a neighbour over those that can, after which a load uses predictions."""
PREFILL_TIME_SHARE = 0.02
"""Share of the time that the drafter's prefill for trials may take."""


@dataclass(slots=True)
class LengthSearch:
    """The state of one load class.

    first, longest: the length tried first, and the largest. length: the choice. trial: the length that alternates with it, or -1.
    turn: steps of the trial so far. pairs: T(trial) and T(length), pair by pair. halves: step times of the pair being measured, by
    part and length. cost[L]: latest T(L) / T(0), including prefill. recent: seconds of the latest steps of the choice. at: the step
    it was last measured in. known: lengths that were compared with the choice. pause, left: steps between trials, and to the next.
    spent: seconds of the drafter's prefill for a trial. asked: how often its length was asked for without a trial result. unseen:
    steps that had no comparable neighbour minus those that had, 0 to 2 BLIND.
    """

    first: int
    longest: int
    length: int
    trial: int = -1
    turn: int = 0
    pairs: list[tuple[float, float]] = field(default_factory=list)
    halves: dict[tuple[str, int], float] = field(default_factory=dict)
    cost: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    known: set[int] = field(default_factory=set)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=PAIRS))
    pause: int = FIRST_PAUSE
    left: int = SETTLE
    tried: int = 0
    spent: float = 0.0
    asked: int = 0
    at: int = -1
    unseen: int = 0

    def see(self, comparable: bool) -> None:
        """Count one step of this load. comparable: without prompts, and with the same sequences and one length as its neighbour."""
        self.unseen = max(0, self.unseen - 1) if comparable else min(2 * BLIND, self.unseen + 1)

    @property
    def blind(self) -> bool:
        """Whether trials cannot be decided at present: most steps have prompts, several lengths or changing sequences."""
        return self.unseen >= BLIND

    def begin(self, trial: int) -> None:
        """Start a trial of this length against the choice; -1: nothing to try, check again after the longest pause."""
        self.trial, self.turn = trial, 0
        self.pairs.clear()
        self.halves.clear()
        if trial < 0:
            self.left = LAST_PAUSE

    def take_turn(self) -> int:
        """The length of the trial's next step."""
        self.turn += 1
        return self.trial if self.turn % 2 else self.length

    def pair(self) -> None:
        """Complete a pair when both lengths have been verified and drafted once."""
        sums = [
            self.halves.get(("verify", x), math.nan) + self.halves.get(("draft", x), math.nan)
            for x in (self.trial, self.length)
        ]
        if not any(math.isnan(x) for x in sums) and sums[1] > 0:
            self.pairs.append((sums[0], sums[1]))
            self.halves.clear()

    def charged(self, length: float) -> float | None:
        """T / T(0) of drafts of this mean length, by the nearest length that was measured; None before any was."""
        drafted = [x for x in self.cost if x]
        if not drafted:
            return None
        return self.cost[min(drafted, key=lambda x: abs(x - length))] if length else 1.0

    def usual(self) -> float | None:
        """Median seconds of the latest steps of the choice; other threads call this too."""
        recent = list(self.recent)
        return median(recent) if recent else None

    def choose(self, length: int) -> None:
        """Change the choice without a trial."""
        if length != self.length:
            self.length = length
            self.recent.clear()
            self.known.clear()

    def near(self) -> list[int]:
        """Lengths to try against the choice: plain decoding, one less, one more, and two, since the gains of two single steps may
        each be below the margin; against plain decoding, `first` and 1."""
        one, two = ((self.length + d, self.length - d) for d in (1, 2))
        near = (0, one[1], one[0], *two) if self.length else (self.first, min(1, self.longest))
        return [x for x in dict.fromkeys(near) if 0 <= x <= self.longest and x != self.length]

    def next_trial(self) -> int:
        """The next length to try: an unknown neighbour first, otherwise all neighbours in turn; -1 if there is none."""
        near = self.near()
        self.tried += 1
        unknown = [x for x in near if x not in self.known]
        return unknown[0] if unknown else near[self.tried % len(near)] if near else -1

    def close(self, ratio: float, moved: bool, clear: bool) -> None:
        """End the trial. ratio: T(trial) / T(length). moved: the trial's length becomes the choice. clear: it is not close."""
        trial, length = self.trial, self.length
        if length == 0:
            self.cost[trial] = ratio
        elif trial == 0:
            self.cost[length] = 1.0 / ratio
        elif length in self.cost:
            self.cost[trial] = ratio * self.cost[length]
        self.known = {length} if moved else self.known | {trial}
        self.trial = -1
        if moved:
            self.length = trial
            self.recent.clear()
            self.pause = FIRST_PAUSE // 2
        self._pause(LAST_PAUSE if clear else CLOSE_PAUSE)

    def put_off(self, trial: int) -> None:
        """Treat this length, which is predicted to be slower, as if a trial had shown it."""
        self.known.add(trial)
        self._pause(LAST_PAUSE)

    def abandon(self) -> None:
        """End a trial that cannot be decided because this load has too few comparable neighbouring steps."""
        self.trial = -1
        self._pause(LAST_PAUSE)

    def _pause(self, longest: int) -> None:
        self.pause = min(longest, 2 * self.pause)
        unknown = any(x not in self.known for x in self.near())
        self.left = SETTLE if unknown else self.pause
        usual = self.usual()
        if self.spent and usual:
            self.left = max(self.left, int(self.spent / (PREFILL_TIME_SHARE * usual)))
        self.spent = 0.0

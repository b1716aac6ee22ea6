"""The cost of a drafter's prefill: of prompts, and of text that was written while it did not draft.

A drafter must read a sequence before it can draft for it. If it drafts in every step, it reads every prompt once; if it did not
draft for a while, it must read the rows deferred since. No comparison of two neighbouring steps shows this time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from outrider.types import SequenceView

REQUESTS = 64.0
"""Finished requests after which evidence about requests has lost 63% of its weight."""
LATEST, ENOUGH = 33, 4
"""Measurements whose median is used, and the least number of them: a single one during a stall of the machine must not decide."""
ESTIMATE_DECAY_STEPS = 16384.0
"""Plain steps after which an old measurement, which they cannot renew, counts only 37%, so that it is measured again."""
DEFERRED_PREFILL_ROWS = 256
"""Rows of a sequence that a drafter defers while it does not draft (its module's `CHUNK`); it reads full chunks as they come."""
REMAINING_SHARE = 4.0
"""A sequence that has reached the usual length is expected to go on for the usual length divided by this."""


class _Ratio:
    """A ratio of two fading sums."""

    def __init__(self) -> None:
        self._over = self._under = 0.0

    def learn(self, over: float, under: float) -> None:
        keep = 1.0 - 1.0 / REQUESTS
        self._over, self._under = keep * self._over + over, keep * self._under + under

    @property
    def value(self) -> float | None:
        return self._over / self._under if self._under > 0 else None


class PrefillCost:
    """Seconds of a drafter's prefill, and the output tokens over which they are spread."""

    def __init__(self) -> None:
        self._rows: deque[float] = deque(maxlen=LATEST)  # the drafter's seconds per prefill row
        self._trust = 1.0
        self._prompts = _Ratio()  # prompt rows per output token, of requests that have ended
        self._output = _Ratio()  # output tokens per request, of the same requests
        self._live: dict[
            int, tuple[SequenceView, int]
        ] = {}  # by slot: a sequence, and how many of its tokens were read

    def notice(self, sequences: Sequence[SequenceView], drafting: bool) -> None:
        """Note the sequences that decode now and whether drafts are made for them; ended ones show how long requests are."""
        self._trust *= 1.0 if drafting else 1.0 - 1.0 / ESTIMATE_DECAY_STEPS
        before, self._live = self._live, {v.slot: (v, len(v.tokens) if drafting else self._read(v)) for v in sequences}
        for slot, (view, _) in before.items():
            if slot not in self._live or self._live[slot][0].tokens is not view.tokens:
                written = len(view.tokens) - view.prompt
                self._prompts.learn(min(view.prompt, DEFERRED_PREFILL_ROWS), written)
                self._output.learn(written, 1.0)

    def learn(self, rows: int, seconds: float) -> None:
        """Record that the drafter's prefill of `rows` prompt rows took `seconds`."""
        self._rows.append(max(0.0, seconds) / rows)
        self._trust = 1.0

    @property
    def _row(self) -> float:
        """Estimated seconds per row; 0.0 before there are enough measurements."""
        return self._trust * median(self._rows) if len(self._rows) >= ENOUGH else 0.0

    def share(self, tokens: float) -> float:
        """Seconds of prefill that fall on so many output tokens, if drafts are made for whole requests."""
        return tokens * (self._prompts.value or 0.0) * self._row

    def behind(self, sequences: Sequence[SequenceView]) -> float:
        """Seconds of prefill that are due before there can be drafts for these sequences."""
        return sum(min(len(v.tokens) - self._read(v), DEFERRED_PREFILL_ROWS) for v in sequences) * self._row

    def ahead(self, sequences: Sequence[SequenceView]) -> float:
        """Expected remaining output tokens of these sequences; infinite before any request has ended."""
        usual = self._output.value
        if usual is None:
            return math.inf
        return sum(max(usual - (len(v.tokens) - v.prompt), usual / REMAINING_SHARE) for v in sequences)

    def _read(self, view: SequenceView) -> int:
        """Tokens of this sequence that the drafter has read; a released slot starts again at 0, as in the target."""
        held, read = self._live.get(view.slot, (None, 0))
        return min(read, view.cached + 1) if held is not None and held.tokens is view.tokens else 0

"""What it takes a drafter to read: prompts, and whatever was written while it was not asked.

A drafter reads a sequence before it can draft for it. Where it is asked in every step that is one reading of every prompt; where it
was not asked for a while, it is what it has put off since. No comparison of two neighbouring steps shows these seconds.
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
"""Readings whose median is believed, and how many there must be: one that fell into a stall of the machine must not decide."""
ESTIMATE_DECAY_STEPS = 16384.0
"""Plain steps after which a time that cannot be measured meanwhile is believed to 37%, so that it comes to be measured again."""
DEFERRED_PREFILL_ROWS = 256
"""Rows of a sequence that a drafter puts off while it is not asked (its module's `CHUNK`); it reads the others as they come."""
REMAINING_SHARE = 4.0
"""A sequence that is as long as others became is expected to go on for this part of their length, and not to end at once."""


class _Ratio:
    """A ratio of two sums that fade."""

    def __init__(self) -> None:
        self._over = self._under = 0.0

    def learn(self, over: float, under: float) -> None:
        keep = 1.0 - 1.0 / REQUESTS
        self._over, self._under = keep * self._over + over, keep * self._under + under

    @property
    def value(self) -> float | None:
        return self._over / self._under if self._under > 0 else None


class PrefillCost:
    """Seconds of a drafter's reading, and the tokens that they must be spread over."""

    def __init__(self) -> None:
        self._rows: deque[float] = deque(maxlen=LATEST)  # seconds in which the drafter read a row
        self._trust = 1.0
        self._prompts = _Ratio()  # prompt rows a token of output, of requests that have ended
        self._output = _Ratio()  # tokens of output a request, of the same
        self._live: dict[int, tuple[SequenceView, int]] = {}  # by slot: a sequence, and how much of it was read

    def notice(self, sequences: Sequence[SequenceView], drafting: bool) -> None:
        """Those that decode now, and whether there are drafts for them; who has gone tells how long requests are."""
        self._trust *= 1.0 if drafting else 1.0 - 1.0 / ESTIMATE_DECAY_STEPS
        before, self._live = self._live, {v.slot: (v, len(v.tokens) if drafting else self._read(v)) for v in sequences}
        for slot, (view, _) in before.items():
            if slot not in self._live or self._live[slot][0].tokens is not view.tokens:
                written = len(view.tokens) - view.prompt
                self._prompts.learn(min(view.prompt, DEFERRED_PREFILL_ROWS), written)
                self._output.learn(written, 1.0)

    def learn(self, rows: int, seconds: float) -> None:
        """Reading so many rows of prompts took the drafter so many seconds."""
        self._rows.append(max(0.0, seconds) / rows)
        self._trust = 1.0

    @property
    def _row(self) -> float:
        """Believed seconds a row; 0.0 before enough is known."""
        return self._trust * median(self._rows) if len(self._rows) >= ENOUGH else 0.0

    def share(self, tokens: float) -> float:
        """Seconds of reading that so many tokens of output must bear, where drafts are made for whole requests."""
        return tokens * (self._prompts.value or 0.0) * self._row

    def behind(self, sequences: Sequence[SequenceView]) -> float:
        """Seconds of reading before there can be drafts for these sequences."""
        return sum(min(len(v.tokens) - self._read(v), DEFERRED_PREFILL_ROWS) for v in sequences) * self._row

    def ahead(self, sequences: Sequence[SequenceView]) -> float:
        """Tokens that these sequences can be expected to bring yet; infinite before any request has ended."""
        usual = self._output.value
        if usual is None:
            return math.inf
        return sum(max(usual - (len(v.tokens) - v.prompt), usual / REMAINING_SHARE) for v in sequences)

    def _read(self, view: SequenceView) -> int:
        """Tokens of this sequence that the drafter has read; it forgets a slot that is given away, as the target does."""
        held, read = self._live.get(view.slot, (None, 0))
        return min(read, view.cached + 1) if held is not None and held.tokens is view.tokens else 0

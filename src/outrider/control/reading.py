"""What it takes a drafter to read: prompts, and whatever was written while it was not asked.

A drafter reads a sequence before it can draft for it. Where it is asked in every step that is one reading of every prompt; where it
was not asked for a while, it is everything since. No comparison of two neighbouring steps shows these seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.types import SequenceView

REQUESTS = 64.0
"""Finished requests, and steps in which prompts were read, after which evidence has lost 63% of its weight."""
OLD = 4.0
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


class Reading:
    """Seconds of a drafter's reading, and the tokens that they must be spread over."""

    def __init__(self) -> None:
        self._row = _Ratio()  # seconds in which the drafter reads a row
        self._prompts = _Ratio()  # prompt rows a token of output, of requests that have ended
        self._output = _Ratio()  # tokens of output a request, of the same
        self._live: dict[int, tuple[SequenceView, int]] = {}  # by slot: a sequence, and how much of it was read

    def notice(self, sequences: Sequence[SequenceView], drafting: bool) -> None:
        """Those that decode now, and whether there are drafts for them; who has gone tells how long requests are."""
        before, self._live = self._live, {v.slot: (v, len(v.tokens) if drafting else self._read(v)) for v in sequences}
        for slot, (view, _) in before.items():
            if slot not in self._live or self._live[slot][0].tokens is not view.tokens:
                written = len(view.tokens) - view.prompt
                self._prompts.learn(view.prompt, written)
                self._output.learn(written, 1.0)

    def learn(self, rows: int, seconds: float) -> None:
        """Reading so many rows of prompts took the drafter so many seconds."""
        self._row.learn(max(0.0, seconds), rows)

    def share(self, tokens: float) -> float:
        """Seconds of reading that so many tokens of output must bear, where drafts are made for whole requests."""
        return tokens * (self._prompts.value or 0.0) * (self._row.value or 0.0)

    def behind(self, sequences: Sequence[SequenceView]) -> float:
        """Seconds of reading before there can be drafts for these sequences."""
        return sum(len(v.tokens) - self._read(v) for v in sequences) * (self._row.value or 0.0)

    def ahead(self, sequences: Sequence[SequenceView]) -> float:
        """Tokens that these sequences can be expected to bring yet; infinite before any request has ended."""
        usual = self._output.value
        if usual is None:
            return math.inf
        return sum(max(usual - (len(v.tokens) - v.prompt), usual / OLD) for v in sequences)

    def _read(self, view: SequenceView) -> int:
        """Tokens of this sequence that the drafter has read."""
        held, read = self._live.get(view.slot, (None, 0))
        return read if held is not None and held.tokens is view.tokens else 0

"""What draft lengths do to the mix of texts in a batch.

A text that is easy to draft for is soon done and a hard one stays, all the more so the longer the drafts are: averages over the
steps that one draft length made count hard texts by the steps that *this* length gave them. Texts have tokens to write, not
steps: of texts i with n_i tokens and E_i(L) tokens per step, L needs the steps sum n_i / E_i(L) for all of them. Averages over
steps made with L instead rate a length M < L too low and M > L too high, by 2% a level where acceptance is 0.72 with a standard
deviation of 0.18 between texts. `factor` is the ratio of both, from acceptance in stretches of one text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul

from outrider.records import SequenceStep
from outrider.types import SequenceView

STRETCH = 32
"""Drafts of one text that make a stretch: shorter ones differ by chance, longer ones hide changes within a text."""
MEMORY = 4000.0
"""Drafts after which evidence about the mix has lost 63% of its weight."""
ENOUGH = 8 * STRETCH
"""Drafts in stretches before they count."""
PRIOR = 0.5
"""Drafts at the usual rate that a stretch starts with at every depth: for depths that it never reached."""
IDLE = 64
"""Steps without a draft after which a stretch has ended."""


class _Stretch:
    """Drafts of one text. judged, hits: by depth; text: its tokens, by which it is recognised."""

    __slots__ = ("hits", "judged", "latest", "steps", "text", "tokens")

    def __init__(self, longest: int) -> None:
        self.judged, self.hits = [0] * longest, [0] * longest
        self.steps = self.tokens = self.latest = 0
        self.text: object = None

    def add(self, step: SequenceStep, now: int) -> None:
        self.steps += 1
        self.tokens += step.accepted + 1
        self.latest = now
        for depth in range(min(step.judged, len(self.judged))):
            self.judged[depth] += 1
            self.hits[depth] += depth < step.accepted


class TextMix:
    """Sums over stretches of texts, for draft lengths 0 to `longest`."""

    def __init__(self, longest: int) -> None:
        self._longest, self._now = longest, 0
        self._open: dict[int, _Stretch] = {}
        self._judged, self._hits = [0.0] * longest, [0.0] * longest
        self._steps = self._tokens = 0.0
        self._by_steps = [0.0] * (longest + 1)  # sum of steps x E
        self._by_tokens = [0.0] * (longest + 1)  # sum of tokens / E

    def factor(self, length: int) -> float:
        """Tokens per step with drafts of this length, each text counted by its tokens, over the average over the steps made."""
        if self._steps < ENOUGH or not 0 <= length <= self._longest:
            return 1.0
        return self._tokens / self._by_tokens[length] / (self._by_steps[length] / self._steps)

    def notice(self, sequences: Iterable[SequenceView]) -> None:
        """A slot that holds another text than before begins another stretch."""
        for view in sequences:
            mine = self._open.get(view.slot)
            if mine is None or mine.text is view.tokens:
                continue
            if mine.text is not None:
                self._close(view.slot)
            else:
                mine.text = view.tokens

    def learn(self, each: Sequence[SequenceStep]) -> None:
        """A step's drafts; sequences without one tell nothing."""
        self._now += 1
        for step in each:
            if not step.judged:
                continue
            mine = self._open.get(step.slot)
            if mine is None:
                mine = self._open[step.slot] = _Stretch(self._longest)
            mine.add(step, self._now)
            if mine.steps >= STRETCH:
                text = mine.text
                self._close(step.slot)
                if text is not None:
                    self._open[step.slot] = begun = _Stretch(self._longest)
                    begun.text, begun.latest = text, self._now
        if self._now % IDLE == 0:
            for slot in [s for s, one in self._open.items() if one.latest <= self._now - IDLE]:
                self._close(slot)

    def _close(self, slot: int) -> None:
        one = self._open.pop(slot)
        if not one.steps:
            return
        keep = max(0.0, 1.0 - one.steps / MEMORY)
        self._judged = [keep * a + b for a, b in zip(self._judged, one.judged, strict=True)]
        self._hits = [keep * a + b for a, b in zip(self._hits, one.hits, strict=True)]
        self._steps = keep * self._steps + one.steps
        self._tokens = keep * self._tokens + one.tokens
        for length, expected in enumerate(self._expected(one)):
            self._by_steps[length] = keep * self._by_steps[length] + one.steps * expected
            self._by_tokens[length] = keep * self._by_tokens[length] + one.tokens / expected

    def _expected(self, one: _Stretch) -> list[float]:
        """E(0) to E(longest) of this stretch; depths that nobody drafted to continue at the rate above them."""
        rates, rate = list[float](), 0.5
        for depth in range(self._longest):
            if self._judged[depth]:
                usual = self._hits[depth] / self._judged[depth]
                rate = (one.hits[depth] + PRIOR * usual) / (one.judged[depth] + PRIOR)
            rates.append(rate)
        return list(accumulate([1.0, *accumulate(rates, mul)]))

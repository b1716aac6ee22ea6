"""Recent acceptance of each sequence, drawn towards that of all: what a further row of its draft is expected to gain."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outrider.records import SequenceStep
from outrider.theory.shared_rows import SharedRows
from outrider.theory.shrinkage import prior
from outrider.types import SequenceView

MEMORY = 32.0
"""Steps of a sequence after which evidence about it has lost 63% of its weight: texts change between code, prose and copies."""
ENDED = 64
"""Sequences that have ended and still count for the pool."""
EVERY = 8
"""Steps after which it is estimated again how sequences differ."""
FADE, TRUST, RATIOS = 1.0 / 1000.0, 30.0, (0.25, 2.0)
"""Weight of the newest draft in the ratio of accepted to expected tokens; the tokens with which it starts, at 1; its bounds."""
ROWS = 8.0
"""Asked rows that the pool counts for in a sequence's share of proposed rows."""
LEAST_USE = 1.0 / 64.0
SURE = 0.995
"""The highest rate believed: whole drafts must not look free because none was rejected yet."""


@dataclass(slots=True)
class Evidence:
    """Fading counts of one sequence. tries, hits: of the first draft token, and of those below it, given the one before.

    asked, proposed: rows that it might draft, and did.
    """

    tries: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    hits: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    asked: float = 0.0
    proposed: float = 0.0

    def fade(self) -> None:
        """Forget a little."""
        keep = 1.0 - 1.0 / MEMORY
        self.tries *= keep
        self.hits *= keep
        self.asked *= keep
        self.proposed *= keep

    def learn(self, asked: int, step: SequenceStep) -> None:
        """Add a verified draft for which `asked` levels were asked."""
        self.tries += (step.judged > 0, max(0, step.judged - 1))
        self.hits += (step.accepted > 0, max(0, step.accepted - 1))
        self.asked += asked
        self.proposed += step.proposed


class _Known:
    """A live sequence: its tokens' list says whether a slot still holds it. asked: the levels asked of it, and the gain expected of
    them, for the draft that this step verifies and for the one that it makes."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.evidence = tokens, Evidence()
        self.asked = deque([(0, 0.0), (0, 0.0)], maxlen=2)


class OwnAcceptance:
    """The evidence of every sequence, by slot, and of those that ended lately."""

    def __init__(self) -> None:
        self._live: dict[int, _Known] = {}
        self._ended: deque[Evidence] = deque(maxlen=ENDED)
        self._pools, self._usual, self._age = [prior([], []), prior([], [])], 1.0, 0
        self._expected = self._accepted = TRUST

    @property
    def ratio(self) -> float:
        """Accepted tokens of recent drafts beside those that were expected of them."""
        low, high = RATIOS
        return min(high, max(low, self._accepted / self._expected))

    def notice(self, sequences: Sequence[SequenceView]) -> None:
        """Note which sequences are there."""
        held = {v.slot: v for v in sequences}
        for slot in [s for s, known in self._live.items() if s not in held or held[s].tokens is not known.tokens]:
            self._ended.append(self._live.pop(slot).evidence)
        for slot, view in held.items():
            if slot not in self._live:
                self._live[slot] = _Known(view.tokens)

    def ask(self, asked: Mapping[int, tuple[int, float]]) -> None:
        """Note how many levels are asked of each slot for the next step's draft, and the gain expected of them."""
        for slot, known in self._live.items():
            known.asked.append(asked.get(slot, (0, 0.0)))

    def learn(self, each: Sequence[SequenceStep]) -> None:
        """Learn from a step's verdicts."""
        for step in each:
            known = self._live.get(step.slot)
            if known is None:
                continue
            known.evidence.fade()
            levels, gain = known.asked[0]
            if levels:
                known.evidence.learn(levels, step)
            if gain:
                self._expected = (1.0 - FADE) * self._expected + gain
                self._accepted = (1.0 - FADE) * self._accepted + step.accepted
        self._age += 1

    def rows(self, slots: Sequence[int], depths: Sequence[int]) -> SharedRows:
        """What rows of these sequences gain, each to at most its own depth."""
        if self._age % EVERY == 0:
            self._pool()
        mine = [self._live[slot].evidence for slot in slots]
        rates = np.empty((len(mine), 2))
        for part, pool in enumerate(self._pools):
            rates[:, part] = pool.posterior([e.hits[part] for e in mine], [e.tries[part] for e in mine])
        rates = np.minimum(rates, SURE)
        levels = np.arange(max(depths, default=0))
        survival = rates[:, :1] * rates[:, 1:] ** levels[None, :]
        survival[levels[None, :] >= np.asarray(depths, int).reshape(-1, 1)] = 0.0
        use = [(e.proposed + ROWS * self._usual) / (e.asked + ROWS) for e in mine]
        return SharedRows(survival, np.maximum(use, LEAST_USE))

    def _pool(self) -> None:
        """Estimate again how sequences differ."""
        all_of = [*(known.evidence for known in self._live.values()), *self._ended]
        tries, hits = (np.array([getattr(e, name) for e in all_of]).reshape(-1, 2) for name in ("tries", "hits"))
        self._pools = [prior(hits[:, part], tries[:, part]) for part in (0, 1)]
        asked, proposed = sum(e.asked for e in all_of), sum(e.proposed for e in all_of)
        self._usual = (proposed + 1.0) / (asked + 1.0)

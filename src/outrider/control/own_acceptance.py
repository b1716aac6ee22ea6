"""Recent acceptance of each sequence, drawn towards that of all: what a further row of its draft is expected to gain."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.records import SequenceStep
from outrider.theory.shared_rows import SharedRows
from outrider.theory.shrinkage import GUESS, prior
from outrider.types import SequenceView

MEMORY, IDLE = 32.0, 256.0
"""Steps with and without a draft after which evidence about a sequence has lost 63% of its weight: texts change between code, prose
and copies, and one without drafts is tried again, for it is taken for an average one in the end."""
ENDED = 64
"""Sequences that have ended and still count for the pool."""
ENOUGH = 60.0
"""Judged draft tokens before what was expected of a draft is compared with what it brought."""
FADE, TRUST, RATIOS = 1.0 / 500.0, 30.0, (0.25, 2.0)
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

    tries: tuple[float, float] = (0.0, 0.0)
    hits: tuple[float, float] = (0.0, 0.0)
    asked: float = 0.0
    proposed: float = 0.0

    def learn(self, asked: int, step: SequenceStep) -> None:
        """Forget a little, and add a verified draft for which `asked` levels were asked."""
        keep = 1.0 - 1.0 / (MEMORY if asked else IDLE)
        new = step if asked else SequenceStep(step.slot, 0, 0, 0)
        self.tries = keep * self.tries[0] + (new.judged > 0), keep * self.tries[1] + max(0, new.judged - 1)
        self.hits = keep * self.hits[0] + (new.accepted > 0), keep * self.hits[1] + max(0, new.accepted - 1)
        self.asked, self.proposed = keep * self.asked + asked, keep * self.proposed + new.proposed


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
        self._pools, self._usual, self._judged = [GUESS, GUESS], 1.0, 0.0
        self._expected = self._accepted = TRUST

    @property
    def ratio(self) -> float:
        """Accepted tokens of recent drafts beside those that were expected of them."""
        low, high = RATIOS
        return min(high, max(low, self._accepted / self._expected))

    def notice(self, sequences: Sequence[SequenceView]) -> bool:
        """Note which sequences are there; whether they are others than before."""
        held = {v.slot: v for v in sequences}
        gone = [s for s, known in self._live.items() if s not in held or held[s].tokens is not known.tokens]
        for slot in gone:
            self._ended.append(self._live.pop(slot).evidence)
        new = [v for v in sequences if v.slot not in self._live]
        for view in new:
            self._live[view.slot] = _Known(view.tokens)
        return bool(gone or new)

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
            levels, gain = known.asked[0]
            known.evidence.learn(levels, step)
            self._judged += step.judged
            if gain and self._judged >= ENOUGH:
                self._expected = (1.0 - FADE) * self._expected + gain
                self._accepted = (1.0 - FADE) * self._accepted + step.accepted

    def rows(self, sequences: Sequence[SequenceView], longest: int) -> SharedRows:
        """What rows of these sequences gain, at `longest` for each and no more than it has a use for."""
        self._pool()
        mine = [self._live[v.slot].evidence for v in sequences]
        tries, hits = self._counts(mine)
        rates = np.stack([pool.posterior(hits[:, i], tries[:, i]) for i, pool in enumerate(self._pools)], axis=1)
        rates = np.minimum(rates, SURE)
        levels = np.arange(longest)
        survival = rates[:, :1] * rates[:, 1:] ** levels
        survival[levels >= np.array([_useful(v, longest) for v in sequences]).reshape(-1, 1)] = 0.0
        use = [(e.proposed + ROWS * self._usual) / (e.asked + ROWS) for e in mine]
        return SharedRows(survival, np.maximum(use, LEAST_USE))

    def _pool(self) -> None:
        """Estimate again how sequences differ."""
        all_of = [*(known.evidence for known in self._live.values()), *self._ended]
        tries, hits = self._counts(all_of)
        self._pools = [prior(hits[:, i], tries[:, i], pool) for i, pool in enumerate(self._pools)]
        asked, proposed = sum(e.asked for e in all_of), sum(e.proposed for e in all_of)
        self._usual = (proposed + 1.0) / (asked + 1.0)

    @staticmethod
    def _counts(of: Sequence[Evidence]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """[n, 2] tries and hits."""
        return np.array([e.tries for e in of]).reshape(-1, 2), np.array([e.hits for e in of]).reshape(-1, 2)


def _useful(view: SequenceView, longest: int) -> int:
    """The longest draft that a sequence has a use for: its request's own limit, and the tokens that it may still emit."""
    own, left = view.params.draft_length, view.params.max_tokens - (len(view.tokens) - view.prompt) - 1
    return max(0, min(longest, left, longest if own is None else own))

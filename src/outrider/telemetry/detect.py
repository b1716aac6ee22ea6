"""Change detection on the ledger's residuals: does the engine still reject as often as its own rule predicts?

Before its coins a rule states the rejections to expect (risk) and their predictable variance (spread). Under an exact engine the
residual rejections - risk is a martingale whose steps are at most one in size, so for every lambda in (0, 3)

    exp(lambda (rejections - risk) - (e^lambda - 1 - lambda) spread)

has expectation at most one given the past (Freedman 1975), and so has its mirror image. These factors give two statistics:

- *evidence* over the life of a server: their running product, averaged over lambda and sign, a test martingale. An exact engine
  ever reaches 1 / a with probability at most a, at any time of checking (Ville 1939).
- an *e-detector* that forgets (Shin, Ramdas, Rinaldo 2024, "E-detectors", Shiryaev-Roberts form): M_n = (M_{n-1} + 1) factor_n.
  An exact engine reaches 1 / a after at least 1 / a steps on average, and a change is detected after a delay that does not grow
  with the time before it.

Neither depends on the quality of drafts: worse drafts are rejected more often, and the rule predicts it.
"""

from __future__ import annotations

import math

from outrider.records import Counts

BETS = tuple(sign * size for size in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0) for sign in (1.0, -1.0))
"""Values of lambda, with both signs: for slight deviations over many tokens up to gross ones at once."""
SLACK = 1e-5
"""Rejections per judged token by which float32 distributions may be off; the null hypothesis is widened by it."""
LIFE_LEVEL = 1e-6
"""Probability that an exact server's evidence ever raises the alarm."""
STEPS_BETWEEN_FALSE_ALARMS = 1e9
"""Least average number of engine steps before the e-detector raises a false alarm: 58 days of 5 ms steps."""


class Residuals:
    """Evidence and e-detector of one engine. Feed it the sums of every step, in order."""

    def __init__(self) -> None:
        self._cost = [math.exp(abs(bet)) - 1 - abs(bet) for bet in BETS]
        self._life = [0.0] * len(BETS)
        self._recent = [-math.inf] * len(BETS)
        self.highest = 0.0

    def add(self, counts: Counts) -> None:
        """One engine step."""
        if not counts.judged:
            return
        residual, slack = counts.rejected - counts.risk, SLACK * counts.judged
        for i, (bet, cost) in enumerate(zip(BETS, self._cost, strict=True)):
            factor = bet * residual - abs(bet) * slack - cost * counts.spread
            self._life[i] += factor
            self._recent[i] = _log_add(self._recent[i], 0.0) + factor
        self.highest = max(self.highest, self.log_evidence)

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the evidence against exactness since the start; negative: no evidence."""
        return _log_mean(self._life)

    @property
    def log_detector(self) -> float:
        """Natural logarithm of the e-detector; the alarm is at log(STEPS_BETWEEN_FALSE_ALARMS). Minus infinity before any step."""
        return _log_mean(self._recent)

    @property
    def doubted(self) -> bool:
        """Whether the evidence has ever reached its level: the engine does not do what its rule predicts."""
        return self.highest >= math.log(1 / LIFE_LEVEL)

    @property
    def changed(self) -> bool:
        """Whether the e-detector is at its level now."""
        return self.log_detector >= math.log(STEPS_BETWEEN_FALSE_ALARMS)


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if top == -math.inf else top + math.log(math.exp(a - top) + math.exp(b - top))


def _log_mean(values: list[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(v - top) for v in values) / len(values))

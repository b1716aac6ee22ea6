"""Many small proportions estimated together: each is drawn to the mean of all, by as much as chance explains their differences.

Sequence i has h_i hits in n_i tries. Its rate a_i is taken as a draw from a Beta distribution with mean m and strength s (s m and
s (1 - m) are the usual parameters), so the posterior mean is (s m + h_i) / (s + n_i): its own share where n_i is large beside s,
the pool's mean where it is small. The prior is estimated from the same counts (empirical Bayes) by moments, through
1 / (s + 1), the share of the variance of a single try that lies between sequences. Sources: Kleinman, "Proportions with extraneous
variance", JASA 68 (1973), for the moments; Morris, "Parametric empirical Bayes inference", JASA 78 (1983), for the use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WEAKEST, STRONGEST = 0.5, 1e6
"""Bounds of a prior's strength, in tries."""

TOLD = 2.0
"""Tries from which a rate says something of how rates differ."""


@dataclass(frozen=True, slots=True)
class Prior:
    """A Beta distribution of rates. mean: 0 to 1. strength: the tries that it counts for, WEAKEST to STRONGEST."""

    mean: float
    strength: float

    def posterior(self, hits: npt.ArrayLike, tries: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Posterior mean of each rate, given its hits and its tries (0 <= hits <= tries, of any one shape).

        >>> Prior(0.5, 2.0).posterior([0.0, 2.0], [0.0, 2.0])
        array([0.5 , 0.75])
        """
        h, n = np.asarray(hits, float), np.asarray(tries, float)
        return (self.strength * self.mean + h) / (self.strength + n)


GUESS = Prior(0.5, 8.0)
"""What is believed without evidence."""


def prior(hits: npt.ArrayLike, tries: npt.ArrayLike, guess: Prior = GUESS) -> Prior:
    """The prior that these counts suggest. hits, tries: [k], tries of any size, none counted where it is 0.

    guess: what was believed before; its mean counts as one try, and its strength stays where no rate has enough tries to show it.

    The mean weighs each share by w_i = n_i / (1 + rho (n_i - 1)), the inverse of its variance, with the guess's rho = 1 / (s + 1):
    a sequence that is tried often must not stand for all. A share varies by m (1 - m) (rho + (1 - rho) / n_i), so
    Q = sum n_i (h_i / n_i - m)^2 is expected at m (1 - m) (k + rho (N - k)) with N = sum n_i; this is solved for rho. The
    strength is the strongest where the rates differ no more than chance explains.

    >>> prior([8.0, 2.0], [10.0, 10.0])
    Prior(mean=0.5, strength=2.4615384615384617)
    """
    h, n = np.asarray(hits, float), np.asarray(tries, float)
    h, n = h[n > 0], n[n > 0]
    weights = n / (1.0 + (n - 1.0) / (guess.strength + 1.0))
    centre = (guess.mean + float(weights @ (h / n))) / (1.0 + float(weights.sum()))
    variance, told = centre * (1.0 - centre), n >= TOLD
    room = float((n[told] - 1.0).sum())
    if room <= 0.0 or variance <= 0.0:
        return Prior(centre, guess.strength)
    rho = (float(n[told] @ (h[told] / n[told] - centre) ** 2) / variance - int(told.sum())) / room
    found = 1.0 / rho - 1.0 if rho > 1.0 / (STRONGEST + 1.0) else STRONGEST
    return Prior(centre, float(np.clip(found, WEAKEST, STRONGEST)))

"""Many small proportions estimated together: each is drawn towards the mean of all, by as much as chance explains their differences.

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


def prior(hits: npt.ArrayLike, tries: npt.ArrayLike, mean: float = 0.5, strength: float = 8.0) -> Prior:
    """The prior that these counts suggest. hits, tries: [k], tries of any size, none counted where it is 0.

    mean, strength: what is assumed without evidence. The pool's mean counts as if `mean` had been seen in one try; the strength
    stays as assumed where fewer than two rates have tries, or where one try each is all there is.

    With weights n_i, Q = sum n_i (h_i / n_i - m)^2 and k rates, E[Q] = m (1 - m) (k - 1 + rho (N - sum n_i^2 / N - (k - 1))) for
    N = sum n_i and rho = 1 / (s + 1); this is solved for rho, which is 0, and the strength the strongest, where the rates differ
    no more than chance explains.

    >>> prior([8.0, 2.0], [10.0, 10.0], 0.5, 8.0)
    Prior(mean=0.5, strength=2.125)
    """
    h, n = np.asarray(hits, float), np.asarray(tries, float)
    h, n = h[n > 0], n[n > 0]
    total = float(n.sum())
    centre = (mean + float(h.sum())) / (1.0 + total)
    variance = centre * (1.0 - centre)
    room = total - float(n @ n) / total - (len(n) - 1) if len(n) > 1 else 0.0
    if room <= 0.0 or variance <= 0.0:
        return Prior(centre, strength)
    spread = float(n @ (h / n - centre) ** 2) / variance
    rho = (spread - (len(n) - 1)) / room
    found = 1.0 / rho - 1.0 if rho > 1.0 / (STRONGEST + 1.0) else STRONGEST
    return Prior(centre, float(np.clip(found, WEAKEST, STRONGEST)))

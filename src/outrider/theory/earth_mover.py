"""The earth mover's distance between two distributions over codes that have places: how far probability has to be carried.

Total variation counts the mass that moved; this weighs it by the distance it goes. For lossy rules over image codes it says whether
a grey went to the next grey or to black (Rubner, Tomasi and Guibas 2000; the Wasserstein distance of order 1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import identity, kron

from outrider.theory.checks import probabilities, real

LEAST = 1e-8
"""Share of the moved mass that is not worth a variable of the programme: it is counted as staying, an error below V LEAST diameters
of it."""
UNIT = 1e4
"""What all moved mass is in the programme: large beside the solver's tolerance of 1e-7, which small masses would lie within."""
SLACK = 1e-9
"""Share of the moved mass by which a code may take more: rounding must not leave a programme without a solution."""


def earth_movers_distance(first: npt.ArrayLike, second: npt.ArrayLike, points: npt.ArrayLike) -> float:
    """The least sum of mass times Euclidean distance that turns one distribution into the other; in the units of `points`.

    Mass that both have stays where it is, which is optimal for any distance that obeys the triangle inequality; what is left is a
    linear programme over pairs of a code that has too much and one that has too little.

    Args:
        first, second: (V,), distributions.
        points: (V, d), the place of every code.

    Raises:
        ValueError: no distributions, or not as many points as codes.

    >>> earth_movers_distance([0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [[0.0], [1.0], [3.0]])
    1.0
    """
    p, q, places = probabilities("first", first, 1), probabilities("second", second, 1), real("points", points, 2)
    if not len(p) == len(q) == len(places):
        raise ValueError(f"{len(p)} and {len(q)} probabilities need as many points, got {len(places)}")
    more, less = np.maximum(p - q, 0.0), np.maximum(q - p, 0.0)
    moved = float(more.sum())
    giving, taking = (np.flatnonzero(x > LEAST * moved) for x in (more, less))
    if not len(giving) or not len(taking):
        return 0.0
    cost = np.linalg.norm(places[giving][:, None] - places[taking][None], axis=-1)
    give, take = (x / x.sum() for x in (more[giving], less[taking]))
    if len(give) == 1 or len(take) == 1:
        return float((cost * np.outer(give, take)).sum()) * moved
    rows = kron(identity(len(give)), np.ones((1, len(take))), format="csr")
    columns = kron(np.ones((1, len(give))), identity(len(take)), format="csr")
    found = linprog(cost.ravel(), A_ub=columns, b_ub=UNIT * (take + SLACK), A_eq=rows, b_eq=UNIT * give)
    if not found.success:
        raise ValueError(f"the distance was not found: {found.message}")
    return float(found.fun) / UNIT * moved

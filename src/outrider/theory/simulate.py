"""Monte Carlo of the literal algorithms on a `Chain`, many runs at once, with exact values beside the estimates.

Runs advance together, one output position at a time (block verification: one call at a time). A draft token is drawn
when its test comes, which is the same as drafting to the end and throwing away what follows a rejection: those tokens
are never looked at, and after a rejection they are drafted anew. Coins are compared as u q < p with u in [0, 1).

The code follows the algorithms, with normalised residuals as they are printed, and shares none of the formulas of
`batch` and `rejections`, so that agreement says something. Seeds are those of `numpy.random.default_rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory import rejections as exact
from outrider.theory.chains import Chain
from outrider.theory.checks import number, positive_int

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Accept = Callable[[Array, Array], Array]
RESIDUALS = ("optimal", "target", "draft")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A simulated mean beside its exact value.

    Attributes:
        mean: over the runs.
        standard_error: of the mean; from the exact standard deviation where that is known, else from the sample.
        exact: the exact value, or None where no formula is known.
        z: (mean - exact) / standard_error, or None; standard normal if the simulation and the formula agree.
    """

    mean: float
    standard_error: float
    exact: float | None = None
    z: float | None = None

    @classmethod
    def of(cls, samples: npt.ArrayLike, moments: exact.Moments | None = None, mean: float | None = None) -> Estimate:
        """From two samples or more, with the exact moments, the exact mean alone, or neither.

        >>> Estimate.of([0.0, 1.0], mean=0.25)
        Estimate(mean=0.5, standard_error=0.5, exact=0.25, z=0.5)
        """
        values = np.asarray(samples, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"samples must be one row of at least two values, got shape {values.shape}")
        known = moments.mean if moments is not None else mean
        deviation = moments.standard_deviation if moments is not None else float(values.std(ddof=1))
        average, error = float(values.mean()), deviation / math.sqrt(len(values))
        if known is None:
            return cls(average, error)
        gap = average - known
        # A count without variance must be met exactly, up to the rounding of the formula.
        within = abs(gap) <= 1e-9 * max(1.0, abs(known))
        z = gap / error if error > 1e-12 else (0.0 if within else math.copysign(math.inf, gap))
        return cls(average, error, known, z)


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What the runs of one algorithm did.

    Attributes:
        tokens: (runs, T) outputs.
        rejected: (runs, T) bool: the token came from a rejection.
        calls: (runs,) target calls.
        rejections: estimate of E[N_rej].
        oracle_calls: estimate of E[calls].
    """

    tokens: Ints
    rejected: npt.NDArray[np.bool_]
    calls: Ints
    rejections: Estimate
    oracle_calls: Estimate


def speculative(chain: Chain, runs: int, seed: int, drafts: int = 1, length: int | None = None) -> Simulation:
    """Speculative decoding, with `drafts` independent drafts a call whose first tokens are tried in order.

    Algorithms 1 and 4 of Yin et al., NeurIPS 2024. In Algorithm 4 as printed the residual is taken once too often when
    all drafts are refused and the last one is sampled within the loop; this is the version of its proof, which keeps
    the target's law. With `length` K a fully accepted draft earns a bonus token from the target (K = 0: plain
    decoding). Exact values: `rejections.rejection_moments` and `call_moments`.

    >>> from outrider.theory.chains import best_guess
    >>> result = speculative(best_guess(), runs=2000, seed=0, drafts=4)
    >>> round(result.rejections.exact, 4), abs(result.rejections.z) < 6.1
    (14.0901, True)
    """
    runs, drafts, random = positive_int("runs", runs, low=2), positive_int("drafts", drafts), _generator(seed)
    longest = chain.horizon if length is None else positive_int("length", length, low=0)
    last = _draw(random, chain.start[None].cumsum(axis=1), np.zeros(runs, dtype=np.intp))
    depth = np.zeros(runs, dtype=np.intp)  # tokens of the current draft accepted so far
    tokens, rejected = np.empty((runs, chain.horizon), dtype=np.intp), np.zeros((runs, chain.horizon), dtype=bool)
    calls = np.zeros(runs, dtype=np.intp)
    for n in range(chain.horizon):
        p, q = chain.target[n], chain.draft[n]
        calls += depth == 0
        free = depth == longest
        judged = ~free
        new = np.empty(runs, dtype=np.intp)
        new[free] = _draw(random, p.cumsum(axis=1), last[free])
        new[judged], rejected[judged, n] = _judge(random, p, q, last[judged], depth[judged] == 0, drafts)
        depth = np.where(free | rejected[:, n], 0, depth + 1)
        tokens[:, n] = last = new
    return Simulation(
        tokens,
        rejected,
        calls,
        Estimate.of(rejected.sum(axis=1), exact.rejection_moments(chain, drafts, length)),
        Estimate.of(calls, exact.call_moments(chain, drafts, length)),
    )


def lossy(chain: Chain, runs: int, seed: int, accept: Accept, residual: str = "optimal") -> Simulation:
    """One draft to the horizon, accepted with any probabilities b: Algorithm 2 of Yin et al., NeurIPS 2024.

    Args:
        accept: b, from the target and draft rows (..., V) to acceptance probabilities (..., V) in [0, 1].
        residual: what replaces a refused token: "optimal", the normalised (p - b q)_+, which loses least in total
            variation (Theorem 4); "target", p; "draft", q.

    The exact expectation is that of the Markov chain with kernel b q + P(reject) * residual; its standard deviation is
    estimated. For calls nothing exact is given.

    >>> from outrider.theory.chains import best_guess
    >>> result = lossy(best_guess(), runs=2000, seed=0, accept=over_acceptance(0.05))
    >>> result.rejections.exact < 12, abs(result.rejections.z) < 6.1
    (True, True)
    """
    runs, random = positive_int("runs", runs, low=2), _generator(seed)
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {residual!r}")
    last = _draw(random, chain.start[None].cumsum(axis=1), np.zeros(runs, dtype=np.intp))
    tokens, rejected = np.empty((runs, chain.horizon), dtype=np.intp), np.empty((runs, chain.horizon), dtype=bool)
    expected, law = 0.0, chain.start
    for n in range(chain.horizon):
        p, q = chain.target[n], chain.draft[n]
        b = np.asarray(accept(p, q), dtype=np.float64)
        if b.shape != p.shape or not ((b >= 0.0) & (b <= 1.0)).all():
            raise ValueError(f"accept must return probabilities of shape {p.shape}, got shape {b.shape}: {b}")
        after = {"optimal": _normalised(np.maximum(p - b * q, 0.0), p), "target": p, "draft": q}[residual]
        new = _draw(random, q.cumsum(axis=1), last)
        refused = random.random(runs) >= b[last, new]
        new[refused] = _draw(random, after.cumsum(axis=1), last[refused])
        refuse = ((1.0 - b) * q).sum(axis=1)
        expected, law = expected + float(law @ refuse), law @ (b * q + refuse[:, None] * after)
        tokens[:, n], rejected[:, n], last = new, refused, new
    calls = 1 + rejected[:, :-1].sum(axis=1)
    return Simulation(tokens, rejected, calls, Estimate.of(rejected.sum(axis=1), mean=expected), Estimate.of(calls))


def over_acceptance(epsilon: float) -> Accept:
    """b(x) = min(1, (p(x) + epsilon) / q(x)), epsilon >= 0: the over-accepting rule of Yin et al. (NeurIPS 2024).

    epsilon = 0 is speculative decoding.

    >>> over_acceptance(0.1)(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    array([1. , 0.4])
    """
    epsilon = number("epsilon", epsilon, low=0.0)

    def accept(target: Array, draft: Array) -> Array:
        raised = np.minimum(target + epsilon, draft)  # before the division, which cannot overflow then
        return np.divide(raised, draft, out=np.ones_like(raised), where=draft > 0.0)

    return accept


def block(chain: Chain, runs: int, seed: int, length: int | None = None) -> Simulation:
    """Block verification (Sun et al., ICLR 2025) with blocks of `length` tokens; None: to the horizon.

    The whole block is drafted and judged at once, see `exact.block` for the rule; a block is cut at the horizon, and
    one that is accepted whole before it earns a bonus token. Its state is a running ratio, so no cheap exact value is
    known; `exact.block` enumerates small instances.

    >>> from outrider.theory.chains import best_guess
    >>> one, many = (f(best_guess(), runs=2000, seed=0).rejections.mean for f in (speculative, block))
    >>> many < one
    True
    """
    runs, random = positive_int("runs", runs, low=2), _generator(seed)
    longest = chain.horizon if length is None else min(positive_int("length", length), chain.horizon)
    tokens, rejected = np.zeros((runs, chain.horizon), dtype=np.intp), np.zeros((runs, chain.horizon), dtype=bool)
    last = _draw(random, chain.start[None].cumsum(axis=1), np.zeros(runs, dtype=np.intp))
    done, calls = np.zeros(runs, dtype=np.intp), np.zeros(runs, dtype=np.intp)  # done: tokens emitted
    draft_cdf = chain.draft.cumsum(axis=2)
    while (active := np.flatnonzero(done < chain.horizon)).size:
        calls[active] += 1
        size = np.minimum(longest, chain.horizon - done[active])
        path, kept, excess = _block_call(random, chain, draft_cdf, done[active], last[active], size)
        step, n = kept, done[active]
        for i in range(int(kept.max(initial=0))):
            on = kept > i
            tokens[active[on], n[on] + i] = path[on, i + 1]
        final = n + kept < chain.horizon
        rows = active[final]
        rejected[rows, (n + kept)[final]] = (kept < size)[final]
        tokens[rows, (n + kept)[final]] = _draw_rows(random, excess[final].cumsum(axis=1))
        done[active] = n + step + final
        last[active] = tokens[active, done[active] - 1]
    return Simulation(tokens, rejected, calls, Estimate.of(rejected.sum(axis=1)), Estimate.of(calls))


def _block_call(
    random: np.random.Generator, chain: Chain, draft_cdf: Array, n: Ints, last: Ints, size: Ints
) -> tuple[Ints, Ints, Array]:
    """One block for each run: (anchor and drafted tokens, tokens kept, unnormalised law of the token after them)."""
    runs, longest = len(n), int(size.max())
    path = np.repeat(last[:, None], longest + 1, axis=1)
    kept, w = np.zeros(runs, dtype=np.intp), np.ones(runs)
    law = np.zeros((runs, chain.states))
    for i in range(longest + 1):
        inside = np.flatnonzero((i <= size) & (n + i < chain.horizon))  # positions at which the chain goes on
        at, before = (n + i)[inside], path[inside, i]
        p, q = chain.target[at, before], chain.draft[at, before]
        whole = np.equal(i, size[inside])
        mass = np.where(whole[:, None], p, np.maximum(w[inside, None] * p - q, 0.0))
        chance, total = w.copy(), mass.sum(axis=1)
        partial, rest = inside[~whole], total[~whole]
        below = rest + 1.0 - w[partial]
        chance[partial] = np.divide(rest, below, out=np.ones_like(rest), where=below > 0.0)
        taken = (i <= size) & ((random.random(runs) < chance) | (i == 0))
        kept[taken] = i
        law[inside[taken[inside]]] = mass[taken[inside]]
        if i < longest:
            new = _draw_rows(random, draft_cdf[at, before])
            path[inside, i + 1] = new
            ratio = p[np.arange(len(inside)), new] * w[inside] / q[np.arange(len(inside)), new]
            w[inside] = np.minimum(ratio, 1.0)
    return path, kept, law


def _judge(
    random: np.random.Generator, p: Array, q: Array, last: Ints, root: npt.NDArray[np.bool_], drafts: int
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Draw and test one position: (tokens, whether they come from a rejection). At a root there are `drafts` tries."""
    runs, draft_cdf = len(last), q.cumsum(axis=1)
    new, refused = np.empty(runs, dtype=np.intp), np.ones(runs, dtype=bool)
    current, trying = p, np.arange(runs)
    for m in range(drafts):
        candidates = _draw(random, draft_cdf, last[trying])
        u = random.random(len(trying))
        accepted = u * q[last[trying], candidates] < current[last[trying], candidates]
        new[trying[accepted]], refused[trying[accepted]] = candidates[accepted], False
        current = _normalised(np.maximum(current - q, 0.0), current)
        trying = trying[~accepted]
        if m == 0:  # deeper positions have one draft: draw from the first residual now
            deep = trying[~root[trying]]
            new[deep] = _draw(random, current.cumsum(axis=1), last[deep])
            trying = trying[root[trying]]
        if not len(trying):
            break
    new[trying] = _draw(random, current.cumsum(axis=1), last[trying])
    return new, refused


def _draw(random: np.random.Generator, cdf: Array, rows: Ints) -> Ints:
    """One sample from `cdf[r]` for every r in `rows`."""
    return _draw_rows(random, cdf[rows])


def _draw_rows(random: np.random.Generator, cdf: Array) -> Ints:
    """One sample from each row of (R, V) cumulative masses, which need not end at one."""
    u = random.random(len(cdf)) * cdf[:, -1]
    return np.minimum((cdf <= u[:, None]).sum(axis=1), cdf.shape[1] - 1)


def _normalised(mass: Array, otherwise: Array) -> Array:
    """Rows of `mass` as laws; rows of `otherwise` where there is no mass, which are reached with probability zero."""
    total = mass.sum(axis=-1, keepdims=True)
    return np.divide(mass, total, out=otherwise.copy(), where=total > 0.0)


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(positive_int("seed", seed, low=0))

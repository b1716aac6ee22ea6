"""Batch speculative decoding: M drafts, used one after the other at the first position, after which one is followed.

Algorithm 4 of Yin et al. (NeurIPS 2024): each target call scores M drafts drawn independently from the draft law. Their
first tokens are tried in order, each refusal replacing the target law by its residual; if all M are refused the last
residual is sampled and one rejection is counted. Deeper positions of the accepted draft are judged as in plain
speculative decoding, against the original target, and the other drafts are forgotten.

Letters: p is the target, q the draft (the paper has them the other way round). For one conditional law,

    p^1 = p,   r_m = TV(p^m, q),   p^{m+1} = (p^m - q)_+ / r_m,   rho_M = r_1 ... r_M

and rho_M is the probability that all M drafts are refused. Here the chain is kept un-normalised,
g_1 = p, g_{m+1} = (g_m - rho_{m-1} q)_+, rho_m = sum g_{m+1}, so that g_{m+1} = rho_m p^{m+1}: no division, and no
loss of precision when rho gets small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from outrider.theory.chains import Chain
from outrider.theory.checks import fraction, number, positive_int, probabilities, same_shape

Array = npt.NDArray[np.float64]


def check_drafts(drafts: int | float) -> int | float:
    """`drafts` as an int of at least one, or `math.inf`; anything else is a ValueError."""
    return math.inf if drafts == math.inf else positive_int("drafts", drafts)  # pyright: ignore[reportArgumentType]


def total_variation(target: npt.ArrayLike, draft: npt.ArrayLike) -> Array:
    """TV(p, q) = sum (p - q)_+ along the last axis: the probability that one draft token is rejected.

    Args are (..., V) and of one shape; the result is (...). Source: Yin et al., NeurIPS 2024, Theorem 1.

    >>> float(total_variation([0.9, 0.1], [0.5, 0.5]))
    0.4
    """
    p, q = _pair(target, draft)
    return np.maximum(p - q, 0.0).sum(axis=-1)


def residuals(target: npt.ArrayLike, draft: npt.ArrayLike) -> Iterator[Array]:
    """g_2, g_3, ...: the un-normalised residuals after one refused draft, two, and so on without end.

    `g_{M+1}(y)` is the probability that M drafts are all refused and y is then sampled; its sum is rho_M, and as a
    law it is p^{M+1}. Args are (..., V), every item too. Pointwise non-increasing in M.

    Source: Yin et al., NeurIPS 2024, Theorem 3 (there normalised).

    >>> first, second = (g for g, _ in zip(residuals([0.0, 1.0], [0.5, 0.5]), range(2)))
    >>> first, second
    (array([0. , 0.5]), array([0.  , 0.25]))
    """
    p, q = _pair(target, draft)
    return _residuals(p, q)


def root_rejection(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int | float) -> Array:
    """g_{M+1}, (..., V): mass that M = `drafts` tokens are refused and y is output instead. Its sum is rho_M.

    `math.inf` gives the limit p 1{q = 0}: what no draft can ever propose. Source: Yin et al., NeurIPS 2024, Theorem 3.

    >>> root_rejection([0.0, 1.0], [0.5, 0.5], 3)
    array([0.   , 0.125])
    """
    return refused(*_pair(target, draft), check_drafts(drafts))


def refused(p: Array, q: Array, drafts: int | float) -> Array:
    """`root_rejection` of checked arrays and numbers, for the modules of this package."""
    if drafts == math.inf:
        return np.where(q == 0.0, p, 0.0)
    g = np.maximum(p - q, 0.0)
    for _ in range(int(drafts) - 1):
        before, g = g, np.maximum(g - g.sum(axis=-1, keepdims=True) * q, 0.0)
        if np.array_equal(g, before):  # further drafts change nothing
            break
    return g


def per_position(chain: Chain, drafts: int | float) -> Array:
    """(T,): the probability that the n-th output token comes from a rejection, with M = `drafts` drafts a call.

    With f_n(x) the probability that x_n = x and came from a rejection, and f_0 = start (the first position is a root,
    a convention that Yin et al. leave open; zero would be wrong),

        f_n = (pi_{n-1} - f_{n-1}) (p_n - q_n)_+  +  f_{n-1} g_{M+1},     E[R_n] = sum f_n,     pi_n = pi_{n-1} p_n

    in O(T M V^2). M = 1 is Theorem 1, `math.inf` Proposition 1. Source: Yin et al., NeurIPS 2024, Theorem 3.

    >>> from outrider.theory.chains import best_guess
    >>> float(round(per_position(best_guess(), drafts=4).sum(), 4))
    14.0901
    """
    drafts = check_drafts(drafts)
    out = np.empty(chain.horizon)
    pi = rejected = chain.start
    for part in chain.chunks():
        p, q = chain.target[part], chain.draft[part]
        deep, root = np.maximum(p - q, 0.0), refused(p, q, drafts)
        rejected, pi = _advance(out[part], pi, rejected, p, deep, root)
    return out


def expected_rejections(chain: Chain, drafts: int | float) -> float:
    """E[N_rej] with M = `drafts` drafts a call (`math.inf` allowed). Non-increasing in M, for every chain.

    Source: Yin et al., NeurIPS 2024, Theorem 3 and Proposition 1.

    >>> from outrider.theory.chains import best_guess
    >>> round(expected_rejections(best_guess(), 5), 4), round(expected_rejections(best_guess(), math.inf), 4)
    (13.8684, 12.0994)
    """
    return float(per_position(chain, drafts).sum())


def sweep(chain: Chain, drafts: Sequence[int]) -> Array:
    """E[N_rej] for each number of drafts in `drafts`, in one pass over the residual chain: O(T V^2 max(drafts)).

    Holds (T, V, V) arrays; for instances too large for that call `expected_rejections` one by one.

    >>> from outrider.theory.chains import best_guess
    >>> sweep(best_guess(), [1, 4, 5]).round(4)
    array([16.4049, 14.0901, 13.8684])
    """
    wanted = [positive_int("drafts", m) for m in drafts]
    values: dict[int, float] = {}
    deep, out = np.maximum(chain.target - chain.draft, 0.0), np.empty(chain.horizon)
    for m, root in zip(range(1, max(wanted, default=0) + 1), _residuals(chain.target, chain.draft), strict=False):
        if m in wanted:
            _advance(out, chain.start, chain.start, chain.target, deep, root)
            values[m] = float(out.sum())
    return np.array([values[m] for m in wanted], dtype=np.float64)


def rejection_floor(chain: Chain) -> float:
    """(E[N_SD] - d) / (1 + d), d the largest TV of the chain: no number of drafts gets below this. At least E/2 - 1/2.

    A rejection saved at a root costs at most one later, because the next position is then judged by one draft only:
    the "batch improvement" sum of Theorem 3 is at most d (1 + E[N_batch]). With constant TV the tokens per call go
    from 1/d to at most 1/d + 1: batch speculative decoding buys at most one token a call.

    >>> from outrider.theory.chains import best_guess
    >>> rejection_floor(best_guess()) < expected_rejections(best_guess(), math.inf)
    True
    """
    worst = max(float(total_variation(chain.target[s], chain.draft[s]).max()) for s in chain.chunks())
    return max(0.0, (expected_rejections(chain, 1) - worst) / (1.0 + worst))


def shared_per_position(chain: Chain, drafts: int) -> Array:
    """(T,) rejection probabilities when every draft that still agrees with the output is tried, at every depth.

    The M drafts of a call are M independent sequences as in Algorithm 4, but those that begin with the accepted tokens
    stay in play (prefix sharing, as in SpecInfer, Miao et al., ASPLOS 2024): same target call, fewer rejections.
    State (x, k) with k drafts alive: the m-th of them is accepted as y with mass min(rho_{m-1} q, g_m)(y|x), after
    which 1 + Binomial(k - m, q(y|x)) are alive (refused ones never equal y); if all k are refused, y is drawn with
    mass g_{k+1}(y|x), a rejection, and M are alive again. O(T M^2 V^2).

    >>> from outrider.theory.chains import best_guess
    >>> [round(float(shared_per_position(best_guess(), m).sum()), 3) for m in (1, 2, 4, 8)]
    [16.405, 14.841, 13.677, 12.703]
    """
    drafts = positive_int("drafts", drafts)
    out = np.empty(chain.horizon)
    alive = np.zeros((drafts, chain.states))  # alive[k - 1, x]
    alive[-1] = chain.start
    for n in range(chain.horizon):
        alive, rejected = _shared_step(alive, chain.target[n], chain.draft[n])
        out[n] = rejected.sum()
        alive[-1] += rejected
    return out


def tree_acceptance(chain: Chain, branching: Sequence[int]) -> Array:
    """(D,): probability that at least d levels of a draft tree are accepted, d = 1..D, from the start of `chain`.

    `branching[d]` children are drawn independently at every node of depth d and tried in order, each level against the
    residual chain of its own conditional law; the sum is the expected number of accepted tokens. D <= T.
    The measure of accepted paths that end in y is a_{d+1} = a_d (p - g_{k+1}), a_0 = start: a tree with k = 1 is a
    plain draft. The acceptance rule is that of Theorem 3 (Yin et al., NeurIPS 2024) at every node.

    >>> from outrider.theory.chains import iid
    >>> tree_acceptance(iid([0.5, 0.5], [0.0, 1.0], horizon=3), [2, 2, 1])
    array([0.75   , 0.5625 , 0.28125])
    """
    counts = [positive_int("branching", k) for k in branching]
    if not 1 <= len(counts) <= chain.horizon:
        raise ValueError(f"branching must have 1 to {chain.horizon} levels, got {len(counts)}")
    reached, out = chain.start, np.empty(len(counts))
    for depth, children in enumerate(counts):
        p, q = chain.target[depth], chain.draft[depth]
        reached = reached @ (p - refused(p, q, children))
        out[depth] = reached.sum()
    return out


def improvement(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int | float) -> Array:
    """TV(p, q) - rho_M, (...): how much M drafts lower the rejection probability of one conditional law.

    `math.inf` gives the limit TV - p(q = 0). Source: Yin et al., NeurIPS 2024, Theorem 3 ("batch improvement").

    >>> float(improvement([0.0, 1.0], [0.5, 0.5], 2))
    0.25
    """
    return total_variation(target, draft) - root_rejection(target, draft, drafts).sum(axis=-1)


def bernoulli_improvement(target: float, draft: float, drafts: int | float) -> float:
    """Batch improvement of p = Ber(`target`), q = Ber(`draft`), in closed form: |p - q| (1 - s^{M-1}).

    s is the draft's probability of the token it proposes too often: `draft` if draft >= target, else 1 - draft.
    The limit is |p - q|. The case draft >= target is in Yin et al., NeurIPS 2024 (plotted in Figure 3, right); the
    other follows by symmetry.

    >>> round(bernoulli_improvement(0.5, 0.85, 2), 4), bernoulli_improvement(0.5, 0.75, math.inf)
    (0.0525, 0.25)
    """
    p, q, m = fraction("target", target), fraction("draft", draft), check_drafts(drafts)
    if p == q:
        return 0.0
    surplus = q if q > p else 1.0 - q
    # An infinite number of drafts misses only what the draft never proposes.
    return abs(p - q) * (1.0 - surplus ** (m - 1))


def uniform_improvement(ratio: float, drafts: int | float) -> float:
    """Batch improvement of a uniform draft and a uniform target, in closed form; `ratio` = V_draft / V_target > 0.

    ratio >= 1 (the target's support lies inside the draft's): (1 - 1/r) - (1 - 1/r)^M, limit 1 - 1/r. For a fixed M it
    vanishes as r grows. ratio < 1 (the draft's support lies inside the target's): zero for every M, because the
    residual is disjoint from the draft. The first case is in Yin et al., NeurIPS 2024 (plotted in Figure 3, right).

    >>> uniform_improvement(2.0, 2), uniform_improvement(0.5, 10)
    (0.25, 0.0)
    """
    r, m = number("ratio", ratio, low=0.0), check_drafts(drafts)
    if r == 0.0:
        raise ValueError("ratio must be positive, got 0")
    if r <= 1.0:
        return 0.0
    miss = 1.0 - 1.0 / r
    return miss - miss**m


def _pair(target: npt.ArrayLike, draft: npt.ArrayLike) -> tuple[Array, Array]:
    p, q = probabilities("target", target), probabilities("draft", draft)
    same_shape("target", p, "draft", q)
    return p, q


def _residuals(p: Array, q: Array) -> Iterator[Array]:
    g, rho = np.maximum(p - q, 0.0), 1.0
    while True:
        yield g
        rho = g.sum(axis=-1, keepdims=True)
        g = np.maximum(g - rho * q, 0.0)


def _advance(out: Array, pi: Array, rejected: Array, p: Array, deep: Array, root: Array) -> tuple[Array, Array]:
    """Fill `out` with E[R_n] of consecutive positions; the rejected mass and the law of the last token after them."""
    for n in range(len(out)):
        rejected = (pi - rejected) @ deep[n] + rejected @ root[n]
        pi = pi @ p[n]
        out[n] = rejected.sum()
    return rejected, pi


def _shared_step(alive: Array, p: Array, q: Array) -> tuple[Array, Array]:
    """One position of prefix sharing: (new `alive` without the rejections, rejected mass by token)."""
    drafts, states = alive.shape
    spare = np.zeros((drafts, states, states))  # spare[d, x, y]: y accepted, d drafts not yet tried
    rejected = np.zeros(states)
    g, rho = p, 1.0
    for m in range(1, drafts + 1):
        accepted = np.minimum(rho * q, g)
        g = np.maximum(g - rho * q, 0.0)
        rho = g.sum(axis=-1, keepdims=True)
        spare[: drafts - m + 1] += alive[m - 1 :, :, None] * accepted
        rejected += alive[m - 1] @ g
    # Generating function of the number of agreeing spares, sum_d spare_d (1 - q + q z)^d, by Horner's rule in z.
    agree = np.zeros_like(spare)
    for d in range(drafts - 1, -1, -1):
        agree[1:] = agree[1:] * (1.0 - q) + agree[:-1] * q
        agree[0] = agree[0] * (1.0 - q) + spare[d]
    return agree.sum(axis=1), rejected

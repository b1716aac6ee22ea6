"""The optimal rule for several i.i.d. candidates at a node: choose one of them, then verify it like a single draft token.

The probability that the output is one of k candidates drawn from q is at most 1 + min over H of p(H) - q(H)^k (Sun et al., NeurIPS
2023, arXiv 2310.15141; Khisti et al., ICLR 2025, arXiv 2410.18234). A choice that needs no linear program reaches this bound:

1. Give every candidate a priority U, drawn by a kernel that depends on its token, and take the candidate with the highest. If
   U is uniform on [0, 1] under q, token x is taken with probability m(x) = q(x) E[k U^(k-1) | x].
2. Accept it with probability min(1, p / m), else draw from (p - m)_+. This is exact for any kernels.
3. With tokens in order of p / q, the best m is clip(p, mu q, lambda q): H lifted to the total q(H)^k, its complement capped to
   the rest. Its running sum C over quantiles of q lies above t^k, touches it at 0, q(H) and 1, and is convex. So it is
   reached from U = t by mixing uniformly over the intervals that the tangents of C cut out of t^k, the steepest one first.

The proof is in docs/theory.md, section 3.1. In large vocabularies, tokens of nearly the same p / q share a piece of C: that costs
a little acceptance but no exactness, since m is computed from the kernels that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from outrider.types import Draft
from outrider.verify import native
from outrider.verify import numerics as c
from outrider.verify.multidraft import common_distribution
from outrider.verify.tree import NodeSet, SiblingRule, recursive_rejection, sequential_tests

Array = npt.NDArray[np.float64]

EVERY_TOKEN = 256
"""Vocabularies up to this size get one piece per token, which is exactly optimal; larger ones get PIECES pieces."""

PIECES = 512
"""Pieces by p / (k q) of larger vocabularies: equal steps of its square root, finest where few ratios are near the bound."""


FEW = 256
"""Up to this number of slopes, cuts are computed to full precision; see `_cut`."""

TINY = 1e-37
"""Lower bound of q in a ratio; tokens with q = 0 may be in any piece."""

LEAST = 1e-12
"""Where no more than this mass of q remains, the remaining pieces count as empty."""


class OptimalTransport(SiblingRule):
    """The optimal choice among the i.i.d. siblings of one distribution at a node; speculative sampling at every other node.

    Lossless if the distributions a draft declares are true. Ledger: with i.i.d. siblings the risk of a position is the mass of (p -
    m)_+, the least that any exact rule can have for the same siblings (up to the width of a piece).
    """

    name = "optimal_transport"

    def judge(self, here: Float[Tensor, "1 V"], draft: Draft, children: list[int]) -> NodeSet:
        """One node: P(child j is chosen and accepted | the tokens) as sequential tests, and the residual if none is."""
        found = common_distribution(here, draft, children)
        if found is None:
            return recursive_rejection(here, draft, children)
        q, tokens = found
        if here.shape[1] > EVERY_TOKEN:
            done = native.transport(here, q, tokens, PIECES, gauss_points((len(tokens) + 1) // 2))
            if done is not None:
                return NodeSet(sequential_tests(done.taken), done.rest, c.clamp01(done.left))
        return plain_choice(here.double(), q.double(), tokens)


def plain_choice(p: Float64[Tensor, "1 V"], q: Float64[Tensor, "1 V"], tokens: list[int]) -> NodeSet:
    """The plain twin of `outrider.verify.native.transport`."""
    q = q / c.row_sums(q)
    piece, choice = best_choice(p, q, len(tokens))
    mixed = q * torch.from_numpy(choice.multiplier)[piece]
    chosen = choice.chances(piece[tokens].tolist())
    taken = []
    for j, x in enumerate(tokens):  # of equal siblings the first is chosen, since it is the one that may have children
        share = sum(chosen[i] for i, y in enumerate(tokens) if y == x) if x not in tokens[:j] else 0.0
        px, mx = float(p[0, x]), float(mixed[0, x])
        taken.append(share * (1.0 if px >= mx else px / mx))
    rest = (p - mixed).clamp_(min=0)
    return NodeSet(sequential_tests(taken), rest, c.clamp01(float(c.row_sums(rest))))


@dataclass(frozen=True, slots=True)
class CandidateChoice:
    """Kernels from the token of a candidate to its priority, for J slopes of C, each an interval of the quantiles of q.

    A candidate of slope j starts uniform on [start_j, start_j+1] and is mixed over [start_j, end_j], then over that of the
    slope below as far as it reaches, down to the first. So its density is constant between neighbouring ends.

    ends: [J]. multiplier, slope_of: [pieces], m / q of every piece and the number of its slope. The rest are logarithms of the
    kernels' densities, see `density`.
    """

    ends: Array
    multiplier: Array
    slope_of: npt.NDArray[np.intp]
    log_height: Array
    log_hand: Array
    lowest: npt.NDArray[np.intp]

    def density(self, j: int) -> Array:
        """Density of the priority of a candidate of slope j in every cell (end_i-1, end_i]; zero above cell j."""
        out = np.zeros(len(self.ends))
        low = self.lowest[j]
        out[low : j + 1] = np.exp(self.log_hand[j] - self.log_hand[low : j + 1] + self.log_height[low : j + 1])
        return out

    def chances(self, pieces: Sequence[int]) -> list[float]:
        """For candidates of these pieces: how probable it is that each has the highest priority. Their sum is one."""
        width = np.diff(self.ends, prepend=0.0)
        density = np.array([self.density(int(self.slope_of[j])) for j in pieces])
        below = np.cumsum(density * width, axis=1) - density * width
        at, weight = gauss_points((len(pieces) + 1) // 2)  # exact: the integrand has degree k - 1
        inside = below[:, :, None] + (density * width)[:, :, None] * (0.5 + 0.5 * at)
        out = []
        for i in range(len(pieces)):
            others = np.delete(inside, i, axis=0).prod(axis=0)
            out.append(float((density[i] * width) @ (others @ (0.5 * weight))))
        total = sum(out)
        return [x / total for x in out]


@cache
def gauss_points(n: int) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on [-1, 1]; found by eigenvalues, so once is enough."""
    return np.polynomial.legendre.leggauss(n)


def best_choice(
    p: Float64[Tensor, "1 V"], q: Float64[Tensor, "1 V"], k: int
) -> tuple[Int[Tensor, "V"], CandidateChoice]:
    """(the piece of every token, the kernels). k: number of candidates, at least 2. Tokens that q cannot draw get any piece."""
    piece, count = _pieces(p[0], q[0], k)
    mass = torch.zeros(2, count, dtype=torch.float64)
    mass.index_add_(1, piece, torch.stack([p[0].where(q[0] > 0, 0.0), q[0]]).cpu())
    wanted, weight = mass.numpy()
    return piece, choose(wanted, weight, k)


def _pieces(p: Float64[Tensor, "V"], q: Float64[Tensor, "V"], k: int) -> tuple[Int[Tensor, "V"], int]:
    """Number of the piece of every token, in order of p / q, and how many pieces there are."""
    if len(p) <= EVERY_TOKEN:
        ratio = (p / q).nan_to_num_(nan=0.0, posinf=torch.finfo(torch.float64).max)
        return ratio.argsort(stable=True).argsort().cpu(), len(p)
    ratio = p.float() / q.float().clamp_(min=TINY)  # which piece a token is in costs or gains acceptance only
    step = ratio.mul_(1.0 / k).clamp_(max=1.0).sqrt_().mul_(PIECES - 1)
    return step.long().cpu(), PIECES


def choose(p: Array, q: Array, k: int) -> CandidateChoice:
    """The optimal kernels for pieces [J] of mass p and q, in order of p / q."""
    q = q / q.sum()
    goal = _best_multiplier(p, q, k)
    last = np.append(
        np.flatnonzero(goal[1:] > goal[:-1]), len(goal) - 1
    )  # pieces of one slope are one: most, as a rule
    stop = np.cumsum(q)[last]
    stop[-1] = 1.0
    goal = goal[last]
    start = np.append(0.0, stop[:-1])
    done = np.append(0.0, np.cumsum(goal * (stop - start))[:-1])
    ends = np.minimum(np.maximum.accumulate(np.maximum(_cut(start, done, goal, k), stop)), 1.0)
    return _kernels(start, ends, k, np.searchsorted(last, np.arange(len(q))))


def _best_multiplier(p: Array, q: Array, k: int) -> Array:
    """[J] clip(p / q, mu, lambda): the pieces of H lifted to the total q(H)^k, the others capped to 1 - q(H)^k."""
    ratio = np.divide(np.minimum(p, k * q), q, out=np.zeros_like(p), where=q > 0)  # k candidates give no token more
    ratio = np.maximum.accumulate(
        np.where(q > 0, ratio, 0.0)
    )  # order up to rounding; empty pieces follow their neighbour
    mass, wanted = np.append(0.0, np.cumsum(q)), np.append(0.0, np.cumsum(p))
    h = int((wanted - mass**k).argmin())
    inside = min(mass[h], 1.0) ** k
    out = ratio.copy()
    if h:  # smallest i with: pieces below i lifted to one level, the others of H as they are
        level = (inside - wanted[h] + wanted[1 : h + 1]) / np.maximum(mass[1 : h + 1], c.MIN_MASS)
        fits = level <= np.append(ratio[1:h], np.inf)
        out[:h] = np.maximum(out[:h], level[int((fits & (mass[1 : h + 1] > 0)).argmax())])
    above = 1.0 - mass[h:-1]
    level = (1.0 - inside - wanted[h:-1] + wanted[h]) / np.maximum(above, LEAST)
    fits = (level <= ratio[h:]) & (above > LEAST)
    if fits.any():  # the first one: pieces from it on capped at one level; else all are covered and need no cap
        out[h:] = np.minimum(out[h:], max(level[int(fits.argmax())], 0.0))
    return out


def _cut(start: Array, done: Array, slope: Array, k: int) -> Array:
    """[J] where the line of each slope through (start, done) leaves the region above t^k: by Newton's method from the right.

    An end that is a little too far costs a little acceptance and nothing else, so many pieces are not chased to the last bit.
    """
    enough = 1e-14 if len(start) <= FEW else 1e-6
    at = np.ones_like(start)
    for _ in range(60):
        power = at ** (k - 1)
        over = power * at - slope * (at - start) - done
        rise = k * power - slope
        step = np.where((over > 0) & (rise > 0), over / np.where(rise > 0, rise, 1.0), 0.0)
        at -= step
        if step.max() <= enough:
            break
    return at


def _kernels(start: Array, ends: Array, k: int, slope_of: npt.NDArray[np.intp]) -> CandidateChoice:
    """The kernels that these intervals make, and the multipliers that come out of them: exact whatever the intervals are.

    Piece j keeps 1 - f_j of its mass between end_j-1 and end_j and hands f_j = (end_j-1 - start_j) / (end_j - start_j) down.
    """
    before = np.append(0.0, ends[:-1])
    width = ends - start
    empty = width <= 0
    hand = np.where(empty, 1.0, np.clip((before - start) / np.where(empty, 1.0, width), 0.0, 1.0))
    hand[0] = 0.0
    power = ends**k
    gain = np.append(power[0], np.diff(power))
    cell = np.where(empty, 0.0, 1.0 / np.where(empty, 1.0, width))
    means: list[float] = []
    mean = 0.0
    for kept, handed in zip((gain * cell).tolist(), hand.tolist(), strict=True):
        mean = kept + handed * mean
        means.append(mean)
    with np.errstate(divide="ignore"):
        steps = np.log(hand)
    lowest = np.maximum.accumulate(np.where(hand == 0.0, np.arange(len(ends)), 0))
    log_hand = np.cumsum(np.where(hand == 0.0, 0.0, steps))
    with np.errstate(divide="ignore"):
        log_height = np.log(cell)
    return CandidateChoice(ends, np.array(means)[slope_of], slope_of, log_height, log_hand, lowest)

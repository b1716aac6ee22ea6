"""Named lossy rules: acceptance function, exact output law, bias, and distance from the front.

Every rule accepts the draft token x with probability b(x), else samples a residual P; it outputs pi = b q + R P with
p the target, q the draft and R = sum (1 - b) q (see `pareto`). None of them is exact, except at its strict parameter.
For any of them pi itself could be sampled exactly, by speculative sampling against pi: that is the baseline that a
lossy rule has to be compared with. Rules that over-accept lie on the front P(reject) + bias = TV(p, q); the two gates
(`typical`, `top_k`) do not, because they also refuse tokens that speculative sampling would have kept for free.

Residuals are optimal ones (Yin et al., NeurIPS 2024, Theorem 4) unless a rule says otherwise, so a rule that is used
with another residual elsewhere is shown here at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from outrider.theory import kl, pareto
from outrider.theory.batch import total_variation
from outrider.theory.checks import number, positive_int, probabilities
from outrider.theory.laws import Array, kl_unchecked, not_negative, pair, ratio

Divergence = Literal["js", "kl", "tv"]
"""Distance of draft and target for `fuzzy`: Jensen-Shannon or KL(draft || target), both in nats, or total variation."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A lossy rule on one conditional law, or on rows of them: laws are (..., V), numbers (...).

    Attributes:
        accept: b, in [0, 1].
        residual: P, what is sampled after a refusal.
        kernel: pi, the law of the output token.
        reject: R, the probability of a refusal.
        bias: TV(pi, p).
        optimal_bias: the least bias that b allows, sum (b q - p)_+.
        excess: sum (min(p, q) - b q)_+; reject + optimal_bias = TV(p, q) + excess.
    """

    accept: Array
    residual: Array
    kernel: Array
    reject: Array
    bias: Array
    optimal_bias: Array
    excess: Array


def step(
    target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike, residual: npt.ArrayLike | None = None
) -> Step:
    """Any rule (b, P), with everything that is exactly known about it; residual None takes an optimal one.

    >>> s = step([0.5, 0.5], [0.75, 0.25], accept=1.0)
    >>> float(s.reject), float(s.bias)
    (0.0, 0.25)
    """
    p, q = pair(target, draft)
    b = np.array(np.broadcast_to(accept, p.shape), dtype=np.float64)
    law = pareto.optimal_residual(p, q, b) if residual is None else probabilities("residual", residual)
    return Step(
        accept=b,
        residual=law,
        kernel=pareto.output_kernel(q, b, law),
        reject=pareto.rejection_probability(q, b),
        bias=pareto.loss(p, q, b, law),
        optimal_bias=pareto.optimal_loss(p, q, b),
        excess=pareto.excess(p, q, b),
    )


def supported(target: npt.ArrayLike, draft: npt.ArrayLike, rule: Step) -> Step:
    """`rule` without the tokens that the target forbids (p = 0): they are refused, and an optimal residual is drawn instead.

    What the engine does with every lossy rule: a ban is not a part of the distribution that may be bent. A rule on the front
    stays on it, and the rejection probability is at least the mass that the draft has on forbidden tokens.

    >>> s = supported([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], epsilon([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], eps=1.0))
    >>> s.kernel, float(s.reject), float(s.bias)
    (array([0.5, 0.5, 0. ]), 0.5, 0.0)
    """
    p, q = pair(target, draft)
    bent = np.any((p <= 0) & (rule.accept * q > 0), axis=-1)
    lawful = step(p, q, np.where(p > 0, rule.accept, 0.0))
    pick = lambda ours, theirs: np.where(bent.reshape(bent.shape + (1,) * (ours.ndim - bent.ndim)), ours, theirs)  # noqa: E731
    return Step(*(pick(getattr(lawful, f.name), getattr(rule, f.name)) for f in fields(Step)))


def epsilon(target: npt.ArrayLike, draft: npt.ArrayLike, eps: npt.ArrayLike) -> Step:
    """b = min(1, (p + eps) / q), eps >= 0; strict at 0. On the front. Source: Yin et al., NeurIPS 2024, Section 4.1.

    >>> float(epsilon([0.5, 0.5], [1.0, 0.0], eps=0.125).bias)
    0.125
    """
    return step(target, draft, pareto.epsilon_acceptance(target, draft, eps))


def lenience(target: npt.ArrayLike, draft: npt.ArrayLike, factor: float) -> Step:
    """b = min(1, p / (factor q)), 0 < factor <= 1; strict at 1. On the front, and pi <= p / factor for every token.

    Source: Leviathan et al., ICML 2023, Appendix A.5 (there l).

    >>> lenience([0.5, 0.5], [1.0, 0.0], factor=0.625).kernel
    array([0.8, 0.2])
    """
    p, q = pair(target, draft)
    if number("factor", factor, 0.0, 1.0) == 0.0:
        raise ValueError("factor must be in (0, 1], got 0")
    return step(p, q, np.minimum(ratio(p, factor * q, 1.0), 1.0))


def mentored(
    target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike, direction: kl.Direction = "target_first"
) -> Step:
    """Least rejection with KL(p || pi) <= `budget` nats (or KL(pi || p)); strict at 0. On the front, see `kl.mentored`.

    Source: Tran-Thien, "An optimal lossy variant of speculative decoding", 2023.

    >>> s = mentored([0.5, 0.5], [0.9, 0.1], budget=0.05)
    >>> round(float(kl.kl_unchecked(np.array([0.5, 0.5]), s.kernel)), 12)
    0.05
    """
    rule = kl.mentored(target, draft, budget, direction)
    return step(target, draft, rule.accept, rule.residual)


def cactus(target: npt.ArrayLike, draft: npt.ArrayLike, delta: npt.ArrayLike) -> Step:
    """b = min(1, g / q) with g = min(p + sqrt(2 delta p (1 - p)), 1), delta >= 0; strict at 0. On the front.

    g is, to second order, the largest probability that a law within KL `delta` of the target can give to the token.
    Source: Cactus, ICLR 2026 (arXiv 2604.04987).

    >>> float(cactus([0.5, 0.5], [1.0, 0.0], delta=0.125).accept[0])
    0.75
    """
    p, q = pair(target, draft)
    d = not_negative("delta", delta, p.shape[:-1])[..., None]
    raised = np.minimum(p + np.sqrt(2.0 * d * np.maximum(p * (1.0 - p), 0.0)), 1.0)
    return step(p, q, np.minimum(ratio(raised, q, 1.0), 1.0))


def fuzzy(target: npt.ArrayLike, draft: npt.ArrayLike, threshold: float, divergence: Divergence = "js") -> Step:
    """Accept everything where the laws are closer than `threshold`, else speculative sampling; strict at 0. On the front.

    Source: fuzzy speculative decoding (arXiv 2502.20704).

    >>> fuzzy([0.5, 0.5], [0.75, 0.25], threshold=0.3, divergence="tv").kernel
    array([0.75, 0.25])
    """
    p, q = pair(target, draft)
    near = _distance(p, q, divergence) < number("threshold", threshold, low=0.0)
    return step(p, q, np.where(near[..., None], 1.0, np.minimum(ratio(p, q, 1.0), 1.0)))


def typical(target: npt.ArrayLike, draft: npt.ArrayLike, eps: float = 0.09, delta: float = 0.3) -> Step:
    """b = 1{p(x) > min(eps, delta exp(-H(p)))}: typical acceptance. Not on the front: excess may be positive.

    The defaults are Medusa's `posterior_threshold` and `posterior_alpha`. A gate: whether x is accepted does not
    depend on the draft. Source: Cai et al., "Medusa", ICML 2024, Section 2.3.1 (with an optimal residual, see above).

    >>> typical([0.9, 0.1], [0.5, 0.5], eps=0.09).accept, typical([0.95, 0.05], [0.5, 0.5]).accept
    (array([1., 1.]), array([1., 0.]))
    """
    p, q = pair(target, draft)
    floor = typical_floor(p, number("eps", eps, low=0.0), number("delta", delta, low=0.0))
    return step(p, q, (p > floor[..., None]).astype(np.float64))


def typical_floor(target: npt.ArrayLike, eps: float = 0.09, delta: float = 0.3) -> Array:
    """min(eps, delta exp(-H(p))), (...), H the entropy in nats: the target probability typical acceptance asks for.

    >>> float(typical_floor([0.5, 0.5], delta=0.1).round(12))
    0.05
    """
    p = probabilities("target", target)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.minimum(eps, delta * np.exp((p * logs).sum(axis=-1)))


def top_k(target: npt.ArrayLike, draft: npt.ArrayLike, k: int) -> Step:
    """b = 1{x is one of the k most probable tokens of the target}; ties go to the lower index. Not on the front.

    >>> top_k([0.2, 0.5, 0.3], [1.0, 0.0, 0.0], k=2).accept
    array([0., 1., 1.])
    """
    p, q = pair(target, draft)
    order = np.argsort(-p, axis=-1, kind="stable")[..., : positive_int("k", k)]
    gate = np.zeros_like(p)
    np.put_along_axis(gate, order, 1.0, axis=-1)
    return step(p, q, gate)


def uno_target(target: npt.ArrayLike, draft: npt.ArrayLike, eps: npt.ArrayLike) -> Step:
    """`epsilon` with the target as residual: biased even at eps = 0, TV = 1/2 sum |p (1 - R) - b q|.

    The suboptimal arm "Decoding-UNO" of the experiments of Yin et al. (NeurIPS 2024, Section 4.2), as the text has it.

    >>> p, q = [0.75, 0.25], [0.25, 0.75]
    >>> float(uno_target(p, q, eps=0.0).bias), float(epsilon(p, q, eps=0.0).bias)
    (0.125, 0.0)
    """
    p, q = pair(target, draft)
    return step(p, q, pareto.epsilon_acceptance(p, q, eps), p)


def uno_draft(target: npt.ArrayLike, draft: npt.ArrayLike, eps: npt.ArrayLike) -> Step:
    """`epsilon` with the draft as residual: the same arm as the code listing of Yin et al. (2024, Appendix G) has it.

    >>> float(uno_draft([1.0, 0.0], [0.5, 0.5], eps=0.0).bias)
    0.25
    """
    p, q = pair(target, draft)
    return step(p, q, pareto.epsilon_acceptance(p, q, eps), q)


RULES: Mapping[str, Callable[..., Step]] = MappingProxyType(
    {
        "epsilon": epsilon,
        "lenience": lenience,
        "mentored": mentored,
        "cactus": cactus,
        "fuzzy": fuzzy,
        "typical": typical,
        "top_k": top_k,
        "uno_target": uno_target,
        "uno_draft": uno_draft,
    }
)
"""Every named rule: (target, draft, its own parameters) -> Step, row by row on (..., V)."""


def neighbours(target: npt.ArrayLike, draft: npt.ArrayLike, points: npt.ArrayLike, delta: float, k: int) -> Step:
    """LANTERN (Jang et al. 2025): p(x) is lifted by the mass of its nearest codes as long as that stays within delta.

    target, draft: [V]. points: [V, d] the codes, NaN for tokens that are none: they have no neighbours. One code at a time, as the
    paper states it; the engine's rule takes all at once.
    """
    p, q = pair(target, draft)
    codes, accept = np.asarray(points, dtype=float), np.ones(len(p))
    for x in range(len(p)):
        gaps = np.linalg.norm(codes - codes[x], axis=1)
        near = [y for y in range(len(p)) if y != x and not np.isnan(gaps[y])]
        others = sorted(near, key=lambda y: (gaps[y], y))[:k]
        moved = 0.0
        for y in others:
            if moved + p[y] > delta:
                break
            moved += p[y]
        accept[x] = min(1.0, (p[x] + moved) / q[x]) if q[x] > 0 else 1.0
    return step(p, q, accept)


def cluster(
    target: npt.ArrayLike, draft: npt.ArrayLike, points: npt.ArrayLike, k: int, gap: float, near: float
) -> Step:
    """Grouped speculative decoding (So et al. 2025): P(C) / Q(C) of the codes around x in the order of p that are like it.

    points: as for `neighbours`.
    """
    p, q = pair(target, draft)
    codes, accept = np.asarray(points, dtype=float), np.ones(len(p))
    order = sorted((y for y in range(len(p)) if not np.isnan(codes[y]).any()), key=lambda y: (-p[y], y))
    alone = [y for y in range(len(p)) if y not in order and q[y] > 0]
    accept[alone] = np.minimum(1.0, p[alone] / q[alone])
    for rank, x in enumerate(order):
        around = order[max(0, rank - k // 2) : rank + k // 2 + 1]
        members = [
            y for y in around if y == x or (abs(p[y] - p[x]) < gap and np.linalg.norm(codes[y] - codes[x]) < near)
        ]
        below = sum(q[y] for y in members)
        accept[x] = min(1.0, sum(p[y] for y in members) / below) if below > 0 else 1.0
    return step(p, q, accept)


def _distance(p: Array, q: Array, divergence: Divergence) -> Array:
    if divergence == "js":
        middle = 0.5 * (p + q)
        return 0.5 * (kl_unchecked(p, middle) + kl_unchecked(q, middle))
    if divergence == "kl":
        return kl_unchecked(q, p)
    if divergence == "tv":
        return total_variation(p, q)
    raise ValueError(f"divergence must be one of {get_args(Divergence)}, got {divergence!r}")

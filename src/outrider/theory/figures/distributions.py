"""Figures 3 and 4 of Yin et al., NeurIPS 2024: one conditional law at a time, with many drafts or with a bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory import batch, chains, rejections, simulate
from outrider.theory.chains import Chain
from outrider.theory.figures.figure import SEED, Array, Curve, Figure, Panel, curve

EPSILONS = (0.0, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
PAPER_FIGURE_4C = {0.0: 0.407, 0.05: 0.265, 0.1: 0.18, 0.15: 0.12, 0.2: 0.08, 0.3: 0.02, 0.35: 0.0}


def figure_3_left() -> Figure:
    """The schematic of batch speculative decoding."""
    return Figure(
        "figure-3-left",
        (),
        "Batch speculative decoding (Algorithm 4) with M = 3 drafts: first tokens are tried in order against successive "
        "residuals p^1 = p, p^2, p^3 of the target; the first accepted draft is followed with ordinary tests, and a "
        "refusal there ends the call and is a rejection. Only when all M first tokens are refused does the root count one.",
        "drawn anew",
        "the printed Algorithm 4 samples the residual inside the loop over drafts and takes it once too often, which is "
        "biased; drawn is the version of its proof, which is exact",
    )


def figure_3_right(runs: int) -> Figure:
    """Batch improvement of Bernoulli and uniform laws over the number of drafts."""
    counts, few = list(range(1, 251)), (1, 2, 5, 20, 100, 250)
    upper, lower = [], []
    plateaus = {0.1: 0.40, 0.2: 0.30, 0.3: 0.10, 0.65: 0.15, 0.85: 0.35, 0.95: 0.45}
    for i, (u, value) in enumerate(plateaus.items()):
        exact = [batch.bernoulli_improvement(0.5, u, m) for m in counts]
        upper.append(curve(f"draft Ber({u:g})", "exact", counts, exact, series=i))
        upper.append(_improvements([0.5, 0.5], [1 - u, u], few, runs, i))
        upper.append(curve(f"paper, Ber({u:g})", "paper", [250], [value], series=i))
    ends = {2: 0.5, 5: 0.8, 10: 0.9, 15: 0.933, 20: 0.95, 50: 0.974}
    for i, (r, value) in enumerate(ends.items()):
        exact = [batch.uniform_improvement(r, m) for m in counts]
        lower.append(curve(f"r = {r}", "exact", counts, exact, series=i))
        lower.append(_improvements(np.eye(r)[0], np.full(r, 1 / r), few, runs, i))
        lower.append(curve(f"paper, r = {r}", "paper", [250], [value], series=i))
    label = "batch improvement"
    return Figure(
        "figure-3-right",
        (
            Panel("target Ber(0.5)", "drafts M", label, tuple(upper), log_x=True),
            Panel("uniform laws, r = V(draft) / V(target)", "drafts M", label, tuple(lower), log_x=True),
        ),
        f"How much M drafts lower the rejection probability of one conditional distribution, TV - rho_M: exact (closed forms) and "
        f"simulated ({runs:,} runs; bars: 3 standard errors). Crosses at M = 250: the paper's values. The paper's axis is linear.",
        "plateaus .40 .30 .20 .15 .35 .45 (upper) and 1 - 1/r (lower; .974 at M = 250 for r = 50)",
        "the paper's curve labelled Ber(0.3) ends at 0.10 where the formula gives |0.3 - 0.5| = 0.20: the label is wrong "
        "(Ber(0.4) or Ber(0.6) was plotted). For fixed M the lower curves fall to 0 again as r grows",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Front:
    """The rule b_epsilon at one position of the chain, averaged over previous states: exact and simulated."""

    where: str
    tv: float
    fine: Array
    reject: Array
    bias: Array
    seen_reject: Array  # (epsilons, 2): mean, standard error
    seen_bias: Array

    @property
    def worst_z(self) -> float:
        exact = np.interp(EPSILONS, self.fine, self.reject)
        mean, error = self.seen_reject.T
        return float(np.max(np.abs(mean - exact)[error > 0] / error[error > 0]))


def figure_4(chain: Chain, runs: int) -> tuple[Figure, Figure, Figure]:
    """The front between bias and rejections: schematic, on the chain, and over epsilon."""
    averages = np.maximum(chain.target - chain.draft, 0.0).sum(axis=2).mean(axis=1)
    at = int(np.argmin(abs(averages - 0.407)))
    fine = np.linspace(0.0, 0.5, 501)
    seen = np.array([_front_simulated(chain, at, e, runs) for e in EPSILONS])
    front = _Front(
        f"position {at + 1} of the chain, average over the 7 previous states, TV = {averages[at]:.3f} (nearest to the "
        "paper's 0.407)",
        float(averages[at]),
        fine,
        *_front_exact(chain, at, fine),
        seen[:, 0],
        seen[:, 1],
    )
    return _figure_4a(), _figure_4b(front, runs), _figure_4c(front)


def _figure_4a() -> Figure:
    line = curve("front: P(reject) + bias = TV", "exact", [0, 1], [1, 0])
    notes = (
        (0.04, 1.0, "speculative decoding: no bias"),
        (0.68, 0.02, "always accept"),
        (0.58, 0.62, "attainable, wasteful"),
        (0.14, 0.3, "impossible"),
    )
    return Figure(
        "figure-4a",
        (
            Panel(
                "The front between bias and rejection",
                "bias / TV(p, q)",
                "P(reject) / TV(p, q)",
                (line,),
                notes=notes,
            ),
        ),
        "Schematic, both axes in units of TV(p, q): no rule lies below the line, and every over-accepting rule with the "
        "optimal residual lies on it (Theorem 5).",
        "the line is exact: one rejection less costs as much bias",
        "nothing; the front is the triangle inequality between the distributions of draft, output and target",
    )


def _figure_4b(front: _Front, runs: int) -> Figure:
    gap = float(abs(front.reject + front.bias - front.tv).max())
    seen, bars = (front.seen_bias[:, 0], front.seen_reject[:, 0]), 3 * front.seen_reject[:, 1]
    return Figure(
        "figure-4b",
        (
            Panel(
                "On the chain",
                "bias: TV between output and target",
                "P(reject)",
                (
                    curve("exact front", "exact", front.bias, front.reject),
                    curve("simulated, one point per epsilon", "simulated", *seen, bars),
                    curve("paper's intercepts", "paper", [0.0, 0.407], [0.407, 0.0]),
                ),
            ),
        ),
        f"Accepting with b = min(1, (p + epsilon) / q), optimal residual; {front.where}. Line: exact; circles: simulated "
        f"({runs:,} runs a state; bars: 3 standard errors); crosses: the paper's intercepts.",
        f"P(reject) + bias = TV to {gap:.0e} along the curve; intercepts {front.tv:.3f}, paper 0.407",
        "the paper does not say which position it shows, and its instance is another",
    )


def _figure_4c(front: _Front) -> Figure:
    paper = curve("paper, P(reject)", "paper", list(PAPER_FIGURE_4C), list(PAPER_FIGURE_4C.values()))
    (reject, reject_error), (bias, bias_error) = front.seen_reject.T, front.seen_bias.T
    return Figure(
        "figure-4c",
        (
            Panel(
                "Over epsilon",
                "epsilon",
                "probability",
                (
                    curve("P(reject), exact", "exact", front.fine, front.reject),
                    curve("P(reject), simulated", "simulated", EPSILONS, reject, 3 * reject_error),
                    curve("bias, exact", "exact", front.fine, front.bias, series=1),
                    curve("bias, simulated", "simulated", EPSILONS, bias, 3 * bias_error, series=1),
                    paper,
                ),
            ),
        ),
        f"P(reject) and least bias over epsilon; {front.where}. Lines: exact; markers: simulated; crosses: the paper's P(reject).",
        f"largest |z| of the simulated P(reject) {front.worst_z:.2f}; P(reject) falls from {front.reject[0]:.3f} to 0, the "
        "paper's from .407 to 0 at .35",
        "another instance. The paper's curve cannot belong to one pair of distributions, where P(reject) falls at least as fast as "
        "epsilon grows until it is 0; it must be an average over previous states, as plotted here",
    )


def _improvements(target: npt.ArrayLike, draft: npt.ArrayLike, counts: Sequence[int], runs: int, series: int) -> Curve:
    """Simulated TV - rho_M of one conditional law: a chain of one token."""
    chain = chains.iid(draft, target, horizon=1)
    tv = rejections.expected_rejections(chain)
    estimates = [simulate.speculative(chain, runs, SEED + m, m).rejections for m in counts]
    bars = [3.0 * e.standard_error for e in estimates]
    return curve("simulated", "simulated", counts, [tv - e.mean for e in estimates], bars, series)


def _front_exact(chain: Chain, at: int, epsilons: npt.ArrayLike) -> tuple[Array, Array]:
    """(P(reject), least bias) at one position for every epsilon, averaged over previous states."""
    over = np.maximum(chain.draft[at] - chain.target[at], 0.0)[None]
    eps = np.asarray(epsilons, dtype=np.float64)[:, None, None]
    return np.maximum(over - eps, 0.0).sum(axis=2).mean(axis=1), np.minimum(over, eps).sum(axis=2).mean(axis=1)


def _front_simulated(
    chain: Chain, at: int, epsilon: float, runs: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """((mean, standard error) of P(reject), the same of the bias) at one position, by running the rule.

    The bias is estimated without bias as the surplus frequency of the tokens that the rule favours.
    """
    p, q = chain.target[at], chain.draft[at]
    reject, bias = [], []
    for state in range(chain.states):
        one = chains.iid(q[state], p[state], horizon=1)
        result = simulate.lossy(one, runs, SEED + state, simulate.over_acceptance(epsilon))
        favoured = np.minimum(q[state], p[state] + epsilon) > p[state]
        reject.append((result.rejections.mean, result.rejections.standard_error))
        surplus = simulate.Estimate.of(favoured[result.tokens[:, 0]])
        bias.append((surplus.mean - float(p[state][favoured].sum()), surplus.standard_error))
    pool = [(float(np.mean([m for m, _ in x])), math.hypot(*(s for _, s in x)) / len(x)) for x in (reject, bias)]
    return pool[0], pool[1]

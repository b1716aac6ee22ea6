"""Speculative sampling on forests, level by level: the plain form of the rule, and the twin that `chain.py` is tested against.

At a node set (the children of one parent) the residual r starts as p. Each child in draw order is accepted with
probability min(1, r(x) / q(x)); a refusal turns r into the normalised max(r - q, 0). If all are refused, the token is drawn
from r (multi-round rejection: Miao et al. 2023; Yin et al. 2024, Algorithm 4; without replacement: Jeon et al. 2024). A point
mass at x is the case q(x) = 1: accepted with probability r(x), else x is removed from r. That is exact however x was chosen,
so a node whose declared distribution gives its token probability 0 or NaN counts as a point mass too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.deprecated import Renamed
from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft, Proposal, Verdict
from outrider.verify import device
from outrider.verify import numerics as c
from outrider.verify.chain import verdict_of, verify_chains


@dataclass(frozen=True, slots=True)
class NodeSet:
    """The children of one node before their coins.

    tests: for each child (r(x), scale): it is accepted if u * scale < r(x). rest: the residual weights if all are refused.
    """

    tests: list[tuple[float, float]]
    rest: Float[Tensor, "1 V"]
    risk: float


def sequential_tests(chances: Sequence[float]) -> list[tuple[float, float]]:
    """Tests that accept child j with probability chances[j], at most one of them: each given that none before it accepted."""
    out, left = [], 1.0
    for chance in chances:
        out.append((chance, left))
        left = max(left - chance, 0.0)
    return out


Judge = Callable[[Float[Tensor, "1 V"], Draft, list[int]], NodeSet]
"""(the target distribution at a node, the draft, the node's children) -> their tests, and the residual if all are refused."""


def verify_forest(p: Float[Tensor, "M V"], draft: Draft, noise: Noise, judge: Judge | None = None) -> Verdict:
    """Apply a rule to any forest, one node set at a time. `judge`: the rule at one node; None is recursive rejection."""
    judge = judge or recursive_rejection
    paths, tokens, risks = [], [], []
    for b in range(len(draft.counts)):
        path, token, risk = _walk(p, draft, noise, b, judge)
        paths.append(path)
        tokens.append(token)
        risks.append(risk)
    return c.verdict(paths, tokens, risks)


class SiblingRule:
    """A lossless rule that differs from speculative sampling only in how it verifies the siblings at one node."""

    lossless = True
    trees = True
    lane = "draft"
    tv_limit = 0.0
    limit = Renamed("tv_limit")

    def judge(self, here: Float[Tensor, "1 V"], draft: Draft, children: list[int]) -> NodeSet:
        """The rule at one node."""
        return recursive_rejection(here, draft, children)

    def launch(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> transfer.Pending[Verdict] | None:
        """The same verdict, decided on the device of p and not yet read; None for a tree, which the host decides."""
        return device.speculative_sampling(p, draft, noise, verdict_of) if draft.is_chain else None

    @device.launched_by(launch)
    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: distributions of the B anchors, then of the K nodes; rows finite, not negative, sum one.

        Reads noise lanes `accept` (index: sibling) and `final`. Raises RequestError if a distribution to draw from has no mass.
        """
        if not draft.is_chain:
            return verify_forest(p, draft, noise, self.judge)
        if transfer.on_host(p):
            return verify_chains(p, draft, noise)
        return transfer.fetch(device.speculative_sampling(p, draft, noise, verdict_of))[0]


class SpeculativeSampling(SiblingRule):
    """Speculative sampling on any forest. Lossless if the distributions a draft declares are true; it may declare none (q=None).

    Ledger: the risk of a position is one minus the overlap of p and q for one child with a distribution (Yin et al. 2024,
    Theorem 1), and the product over the rounds for i.i.d. siblings. Point masses and siblings drawn without replacement
    have the risk given their tokens: the product of 1 - min(1, r(x) / q(x)). Each is the exact probability that the
    position ends in a rejection, provided the number of siblings was chosen before their tokens were known.
    """

    name = "speculative_sampling"


def _walk(p: Tensor, draft: Draft, noise: Noise, b: int, judge: Judge) -> tuple[list[int], int, list[float]]:
    """Path, next token and risks of one sequence."""
    path: list[int] = []
    risks: list[float] = []
    row, rest = b, p[b : b + 1]
    while children := draft.children(b, path[-1] if path else -1):
        depth = len(path) + 1
        nodes = judge(p[row : row + 1], draft, children)
        risks.append(nodes.risk)
        taken = -1
        for j, (rx, scale) in enumerate(nodes.tests):
            if noise.uniform(b, depth, "accept", j) * scale < rx:
                taken = children[j]
                break
        if taken < 0:
            rest = nodes.rest
            break
        path.append(taken)
        row = draft.row(b, taken)
        rest = p[row : row + 1]
    u = noise.uniform(b, len(path) + 1, "final")
    return path, c.final_token(c.draw_one(rest, u), p, row, u, b), risks


def recursive_rejection(here: Float[Tensor, "1 V"], draft: Draft, children: list[int]) -> NodeSet:
    """Compute the residual through all children as if each were refused. It is stored as weight / mass, not normalised."""
    distributions = SiblingDistributions(draft.q)
    weight, mass = here, 1.0
    tests: list[tuple[float, float]] = []
    before, given = [], []  # probability that each child is refused: before its token is drawn, and given its token
    for k in children:
        x, row = draft.tokens[k], distributions.row_of(k)
        rx, qx = float(weight[0, x]), distributions.at(row, x)
        has_q = c.is_positive(qx * mass)
        scale = qx * mass if has_q else mass
        tests.append((rx, scale))
        given.append(c.clamp01(1.0 - rx / scale))
        weight, whole = weight.double().clone(), weight
        if has_q:
            q = distributions.now(row) if mass == 1.0 else distributions.now(row).double() * mass
            before.append(c.rejection_risk(c.overlap_row(whole, q, distributions.support) / mass, rx, scale))
            c.subtract(weight, q, distributions.support)
            distributions.drawn(row, x)
        else:
            weight[0, x] = 0
        mass = float(c.row_sums(weight))
        if not c.is_drawable(mass):  # refused with probability zero up to rounding: start again from p
            weight, mass = here, 1.0
    rows = {distributions.row_of(k) for k in children}
    integrated = (
        len(before) == len(children) and len(rows) == 1 and (len(children) == 1 or distributions.siblings == "iid")
    )
    return NodeSet(tests, weight, math.prod(before if integrated else given))


class SiblingDistributions:
    """The distributions of one node set: that of each sibling given those before it."""

    def __init__(self, q: Proposal | None) -> None:
        self.q = q
        self.support = q.support if q is not None else None
        self.siblings = q.siblings if q is not None else "iid"
        self._now: dict[int, Tensor] = {}

    def row_of(self, k: int) -> int:
        return self.q.row[k] if self.q is not None else POINT_MASS

    def now(self, row: int) -> Float[Tensor, "1 S"]:
        """The distribution the next sibling of `row` is drawn from."""
        assert self.q is not None
        return self._now.get(row, self.q.probs[row : row + 1])

    def at(self, row: int, token: int) -> float:
        """The probability of `token` under `row`; zero for a point mass and outside the support."""
        column = self._column(token)
        return float(self.now(row)[0, column]) if row >= 0 and column >= 0 else 0.0

    def drawn(self, row: int, token: int) -> None:
        """Record that `token` has been drawn from `row`."""
        if self.siblings == "iid":
            return
        distribution = self.now(row).double().clone()
        column = self._column(token)
        hub = int(self.now(row)[0].argmax()) if self.siblings == "hub" else column
        if column == hub:
            distribution[0, column] = 0
        else:
            distribution.zero_()[0, hub] = 1.0
        rest = float(c.row_sums(distribution))
        self._now[row] = distribution / rest if rest > 0 else distribution

    def _column(self, token: int) -> int:
        if self.support is None:
            return token
        hit = (self.support == token).nonzero()
        return int(hit[0]) if len(hit) else -1

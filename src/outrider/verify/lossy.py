"""Lossy rules: fewer rejections for a stated, exactly metered distance from the target distribution. Never chosen automatically.

All are of one kind (Yin et al. 2024, Section 4, with draft distribution q and target distribution p): a proposed x is accepted with
probability b(x), and a refusal draws from a residual. The distribution of the position is b q plus the residual; its
total-variation distance from p is the `bias` of the verdict, summed over judged positions. The residual (p - b q)_+ is optimal for
every b, with bias sum (b q - p)_+ (Theorem 4). Where b >= min(1, p / q), rejection probability + bias = TV(p, q) exactly (Theorem
5): the front.

A token of target probability 0 is forbidden (by a grammar, a ban, `min_tokens`, a cut), and no lossy rule may accept it: whatever
an acceptance function returns, `allowed` refuses such tokens. b >= min(1, p / q) still holds where it held, so the front is the
same line; it only ends at the rejection probability q(p = 0). At temperature 0 only one token is allowed: every rule is exact.

Bias adds up: two copies of the text, one exact and one by the rule, can be coupled so that they differ at a judged position
with probability at most its bias, so the distribution of a whole text is within E[sum of biases] of the target's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from outrider.deprecated import Renamed
from outrider.errors import CapabilityError, ConfigError
from outrider.noise import Noise
from outrider.types import Draft, Verdict
from outrider.verify import numerics as c
from outrider.verify.chain import probs_of_tokens

FORBIDDEN = 1e-30
"""A probability up to this counts as 0: more than a `logit_bias` of -100, the way to say "never", leaves in single precision."""

ROUNDING = 1e-12
"""How far the mass of a plan may be from one before the plan counts as partly forbidden by the target."""


class Position(NamedTuple):
    """A judged position: distributions of the target and of the draft [1, V] float64, and what its sequence may still spend."""

    p: Float64[Tensor, "1 V"]
    q: Float64[Tensor, "1 V"]
    allowance: float


class AcceptancePlan(NamedTuple):
    """accept: b, per token the probability that it is accepted if proposed. rest: what a refusal draws from, sum 1 - sum b q."""

    accept: Float64[Tensor, "1 V"]
    rest: Float64[Tensor, "1 V"]


@runtime_checkable
class AcceptanceRule(Protocol):
    """How a rule would treat a position without a budget. Pure. Its values for tokens of target probability 0 are ignored."""

    def __call__(self, position: Position) -> AcceptancePlan: ...


@dataclass
class Lossy:
    """A chain rule made from an acceptance function. When its budget is used up it accepts as speculative sampling does: exactly.

    per_token: total variation it may spend at one position. tv_limit: on one sequence in all; math.inf for no limit.
    Ledger: risk is the rule's own rejection probability, 1 - sum b q, before the token is drawn; given the token for point
    masses. bias is sum (b q - p)_+ of the judged positions.
    """

    name: str
    accept: AcceptanceRule
    per_token: float = 1.0
    tv_limit: float = math.inf
    lossless = False
    trees = False
    lane = "draft"
    limit = Renamed("tv_limit")

    def __post_init__(self) -> None:
        if not 0.0 <= self.per_token <= 1.0:
            raise ConfigError(f"per_token is a total variation in [0, 1], got {self.per_token}")
        if not self.tv_limit >= 0.0:
            raise ConfigError(f"per_sequence is a sum of total variations, at least 0, got {self.tv_limit}")

    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: distributions of the B anchors, then of the K nodes. allowance: what each sequence may still spend; None:
        `tv_limit`."""
        if not draft.is_chain:
            raise CapabilityError(f"rule {self.name!r} verifies chains only: use a drafter without branching")
        qx = probs_of_tokens(p, draft)[1]
        left = [self.tv_limit] * len(draft.counts) if allowance is None else allowance
        walks = [self._walk(p, draft, noise, b, qx, left[b]) for b in range(len(draft.counts))]
        return Verdict(*(tuple(part) for part in zip(*walks, strict=True))) if walks else c.verdict((), (), ())

    def _walk(
        self, p: Tensor, draft: Draft, noise: Noise, b: int, qx: list[float], left: float
    ) -> tuple[tuple[int, ...], int, int, float, float, float]:
        """One sequence: path, next token, judged positions, risk, spread, bias."""
        nodes, risk, spread, bias = draft.nodes(b), 0.0, 0.0, 0.0
        row, judged, rest = draft.row(b), 0, None
        for d, k in enumerate(nodes):
            q = _draft_distribution(draft, k, qx[k], p)
            here = Position(_normal(p[row : row + 1]), q, max(0.0, min(self.per_token, left - bias)))
            taken, left_over, chance, cost = within(allowed(self.accept(here), here), here, draft.tokens[k])
            risk, spread, bias = risk + chance, spread + chance * (1.0 - chance), bias + cost
            judged += 1
            if not noise.uniform(b, d + 1, "accept") < taken:
                rest = left_over
                break
            row = draft.row(b, k)
        accepted = judged - (rest is not None)
        u = noise.uniform(b, accepted + 1, "final")
        drawn = c.draw_plain(c.as_weights(p[row : row + 1] if rest is None else rest), u)
        return tuple(nodes[:accepted]), c.final_token(drawn, p, row, u, b), judged, risk, spread, bias


def _normal(distribution: Float[Tensor, "1 V"]) -> Float64[Tensor, "1 V"]:
    """The distribution in float64 with a sum of exactly one: bias is a difference of two distributions, and rounding must not
    count as bias."""
    distribution = distribution.double()
    return distribution / distribution.sum()


def _draft_distribution(draft: Draft, k: int, qx: float, p: Tensor) -> Float64[Tensor, "1 V"]:
    """The distribution node k was drawn from, or the point mass at its token."""
    if draft.q is not None and c.is_positive(qx):
        return _normal(draft.q.dense([draft.q.row[k]], p.shape[1]))
    out = torch.zeros(1, p.shape[1], dtype=torch.float64, device=p.device)
    out[0, draft.tokens[k]] = 1.0
    return out


def optimal(accept: Float64[Tensor, "1 V"], position: Position) -> AcceptancePlan:
    """The plan with an optimal residual: (p - b q)_+, scaled to the refused mass (Theorem 4)."""
    handed = accept * position.q
    rest = (position.p - handed).clamp_(min=0)
    refused, mass = 1.0 - float(handed.sum()), float(rest.sum())
    return AcceptancePlan(accept, rest * (max(refused, 0.0) / mass) if mass > 0.0 else rest)


def exact(position: Position) -> AcceptancePlan:
    """The plan of speculative sampling, which has no bias: min(1, p / q), and (p - q)_+."""
    accept = torch.where(position.q > 0, position.p / position.q, 1.0).clamp_(max=1.0)
    return AcceptancePlan(accept, (position.p - position.q).clamp_(min=0))


def bias_of(choice: AcceptancePlan, position: Position) -> float:
    """Total variation between the distribution of the position and p."""
    return float(c.row_sums((choice.accept * position.q + choice.rest - position.p).clamp_(min=0)))


def allowed(plan: AcceptancePlan, position: Position) -> AcceptancePlan:
    """The plan without the tokens that the target forbids; their mass is refused, and drawn from p instead."""
    if float(position.p.min()) > FORBIDDEN:  # one look at p instead of five passes: only constraints and cuts forbid
        return plan
    accept = plan.accept.where(position.p > FORBIDDEN, 0.0)
    missing = 1.0 - float(c.row_sums(accept * position.q)) - float(c.row_sums(plan.rest))
    return AcceptancePlan(accept, plan.rest) if abs(missing) <= ROUNDING else optimal(accept, position)


def within(plan: AcceptancePlan, position: Position, token: int) -> tuple[float, Float64[Tensor, "1 V"], float, float]:
    """The plan, or the share of it that the allowance permits. Returns the probability of accepting `token`, the residual, risk
    and bias.

    A mixture of a share s of the plan with 1 - s of the exact rule has s times the bias of the plan.
    """
    bias = bias_of(plan, position)
    taken, rest = float(plan.accept[0, token]), plan.rest
    if bias > position.allowance:
        share, bias = position.allowance / bias, position.allowance
        px, qx = float(position.p[0, token]), float(position.q[0, token])
        residual = (position.p - position.q).clamp_(min=0)
        taken, rest = (1.0 - share) * min(1.0, px / qx) + share * taken, residual.lerp_(rest, share)
    return taken, rest, c.clamp01(float(c.row_sums(rest))), bias


# ------------------------------------------------------------------------------------------------- acceptance functions
@dataclass(frozen=True, slots=True)
class Spend:
    """Accepts every allowed token: with a budget, the plan that turns all of it into fewer rejections.

    Mixed with the exact plan by `within`, it spends min(allowance, TV) at every position and lies on the front. The positions
    at which a total-variation budget is spent do not change the sum of rejections and bias (the front is a line).
    """

    def __call__(self, position: Position) -> AcceptancePlan:
        return AcceptancePlan(torch.ones_like(position.p), torch.zeros_like(position.p))


@dataclass(frozen=True, slots=True)
class OverAcceptance:
    """min(1, (p + eps) / q): the base paper's family (Yin et al. 2024, Section 4.2)."""

    eps: float

    def __call__(self, position: Position) -> AcceptancePlan:
        accept = torch.where(position.q > 0, (position.p + self.eps) / position.q, 1.0).clamp_(max=1.0)
        return optimal(accept, position)


@dataclass(frozen=True, slots=True)
class Lenience:
    """min(1, p / (l q)), 0 < l <= 1 (Leviathan et al. 2023, Appendix A.5)."""

    l: float  # noqa: E741 (the paper's letter)

    def __call__(self, position: Position) -> AcceptancePlan:
        accept = torch.where(position.q > 0, position.p / (self.l * position.q), 1.0).clamp_(max=1.0)
        return optimal(accept, position)


@dataclass(frozen=True, slots=True)
class Mentored:
    """min(1, p / (a q)) with the smallest a whose output distribution has KL(p || output) <= kl nats (Tran-Thien 2023).

    The output is clip(q, c2 p, p / a) with c2 from normalisation: the most accepted tokens for this divergence.
    """

    kl: float

    def __call__(self, position: Position) -> AcceptancePlan:
        p, q = position.p, position.q
        keep = p > 0
        t, d = p[keep], q[keep]
        least = 1e-9  # the search ends there: with a factor of a billion, everything is accepted
        if self.kl <= 0.0:
            return exact(position)
        a = least if self._gap(t, d, least) <= 0.0 else c.root(lambda x: self._gap(t, d, x), least, 1.0)
        accept = torch.where(q > 0, p / (a * q), 1.0).clamp_(max=1.0)
        return AcceptancePlan(accept, (_normaliser(t, d, a) * p - q).clamp_(min=0))

    def _gap(self, p: Tensor, q: Tensor, a: float) -> float:
        """KL(p || output) - kl, with a large number for infinity."""
        out = torch.maximum(torch.minimum(q, p / a), _normaliser(p, q, a) * p)
        value = float((p * (p / out).log()).sum())
        return (value if math.isfinite(value) else 1e300) - self.kl


def _normaliser(p: Tensor, q: Tensor, a: float) -> float:
    """c2 in [0, 1] such that clip(q, c2 p, p / a) sums to one."""
    top = torch.minimum(q, p / a)
    if float(top.sum()) >= 1.0:
        return 0.0
    return c.root(lambda x: float(torch.maximum(top, x * p).sum()) - 1.0, 0.0, 1.0 + 1e-12)


@dataclass(frozen=True, slots=True)
class Typical:
    """1 where p(x) > min(eps, delta exp(-H(p))): Medusa's typical acceptance (Cai et al. 2024). Not on the front."""

    eps: float = 0.09
    delta: float = 0.3

    def __call__(self, position: Position) -> AcceptancePlan:
        entropy = -float(torch.special.xlogy(position.p, position.p).sum())
        return optimal((position.p > min(self.eps, self.delta * math.exp(-entropy))).double(), position)


@dataclass(frozen=True, slots=True)
class TopK:
    """1 where x is among the k most likely tokens of p. Far from the front; for comparison."""

    k: int

    def __call__(self, position: Position) -> AcceptancePlan:
        p = position.p
        least = p.topk(min(self.k, p.shape[1]), dim=-1).values[:, -1:]
        return optimal(((p >= least) & (p > 0)).double(), position)

"""K-SEQ: several i.i.d. candidates at a node, each tested against the whole of p at a rate that makes the total exact.

Each of k siblings drawn from q is accepted with probability min(1, p(x) / (rho q(x))), where rho in [1, k] is the root of
1 - (1 - beta)^k = rho beta with beta = sum min(q, p / rho): then the k tests together accept exactly rho beta of the mass, and
the residual is (p - rho q)_+ (Sun et al., NeurIPS 2023, arXiv 2310.15141, Algorithm 2; the residual in this form holds at the
root only). It accepts at least 1 - (1 - 1/k)^k of the best that any rule can from the same siblings.
"""

from __future__ import annotations

from jaxtyping import Float, Float64
from torch import Tensor

from outrider.types import POINT_MASS, Draft, Siblings
from outrider.verify import native
from outrider.verify import numerics as c
from outrider.verify.tree import NodeSet, SiblingRule, recursive_rejection


class KSeq(SiblingRule):
    """K-SEQ at every node with two or more i.i.d. siblings of one distribution; speculative sampling at every other node.

    Lossless if the distributions a draft declares are true. Ledger: with i.i.d. siblings the risk of a position is (1 - beta)^k.
    """

    name = "k_seq"

    def judge(self, here: Float[Tensor, "1 V"], draft: Draft, children: list[int]) -> NodeSet:
        """K-SEQ where it applies, else speculative sampling."""
        found = common_distribution(here, draft, children)
        if found is None:
            return recursive_rejection(here, draft, children)
        p, q, tokens = here.double(), found[0].double(), found[1]
        rho = solve_rho(p, q, len(children))
        beta = covered(p, q, rho)
        rest = (p - rho * q).clamp_(min=0)
        tests = [(float(p[0, x]), rho * float(q[0, x])) for x in tokens]
        return NodeSet(tests, rest, c.clamp01(1.0 - beta) ** len(children))


def common_distribution(
    here: Float[Tensor, "1 V"], draft: Draft, children: list[int], siblings: Siblings = "iid"
) -> tuple[Float[Tensor, "1 V"], list[int]] | None:
    """(q, tokens) if two or more children were drawn in this way from one distribution, which gives each of them probability."""
    q = draft.q
    row = POINT_MASS if q is None else q.row[children[0]]
    same = q is not None and q.siblings == siblings and row >= 0 and all(q.row[k] == row for k in children)
    if q is None or not same or len(children) < 2:
        return None
    distribution = q.dense([row], here.shape[1])
    tokens = [draft.tokens[k] for k in children]
    return (distribution, tokens) if all(c.is_positive(x) for x in distribution[0, tokens].tolist()) else None


def covered(p: Float64[Tensor, "1 V"], q: Float64[Tensor, "1 V"], rho: float) -> float:
    """Sum of min(p / rho, q)."""
    found = native.overlap(p, q, 1.0 / rho)
    return float(c.row_sums((p / rho).minimum(q))) if found is None else found.common


def solve_rho(p: Float64[Tensor, "1 V"], q: Float64[Tensor, "1 V"], k: int) -> float:
    """The root in [1, k] of 1 - (1 - beta(rho))^k = rho beta(rho), by Brent's method; 1 where p covers q or overlaps nowhere."""

    def excess(rho: float) -> float:
        beta = min(covered(p, q, rho), 1.0)
        return 1.0 - (1.0 - beta) ** k - rho * beta

    if excess(1.0) <= 0.0 or excess(float(k)) >= 0.0:
        return 1.0 if excess(1.0) <= 0.0 else float(k)
    return c.root(excess, 1.0, float(k))

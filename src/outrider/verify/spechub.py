"""SpecHub: pairs of candidates that all contain one token, so that the optimal transport from pairs to outputs is a greedy fill.

With a the draft's most likely token, a pair is (i, a) with probability q(i), or (a, i) with probability q(a) q(i) / (1 - q(a)). The
target is filled in this order: i from (i, a), i from (a, i), a from the remaining mass of the (a, .), a from the remaining mass
of the (., a); the rest of p is the residual (Sun et al., EMNLP 2024, arXiv 2411.05289). A pair is accepted with probability (mass
filled from it) / (its own mass), so the output distribution is p.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from outrider.types import Draft
from outrider.verify import numerics as c
from outrider.verify.multidraft import common_distribution
from outrider.verify.tree import NodeSet, SiblingRule, recursive_rejection, sequential_tests


class SpecHub(SiblingRule):
    """SpecHub at nodes with a pair drawn as `Proposal.siblings == "hub"`; speculative sampling at every other node.

    Lossless if the distributions a draft declares are true. Ledger: the risk of such a position is the mass of the residual.
    """

    name = "spechub"

    def judge(self, here: Float[Tensor, "1 V"], draft: Draft, children: list[int]) -> NodeSet:
        """The greedy fill at one node, and the acceptance of this pair by it."""
        found = common_distribution(here, draft, children, "hub")
        if found is None or len(children) != 2:
            return recursive_rejection(here, draft, children)
        p, q, tokens = here.double(), found[0].double(), found[1]
        q = q / c.row_sums(q)
        hub = int(q[0].argmax())
        top = float(q[0, hub])
        others = q.clone()
        others[0, hub] = 0
        following = others * (top / (1.0 - top))
        from_first = p.minimum(others)
        from_second = (p - from_first).minimum(following)
        room = float(p[0, hub])
        left = float(c.row_sums(following - from_second)), float(c.row_sums(others - from_first))
        hub_leading = min(room, left[0])
        hub_second = min(room - hub_leading, left[1])
        filled = from_first + from_second
        filled[0, hub] = hub_leading + hub_second
        rest = (p - filled).clamp_(min=0)
        leads = tokens[0] == hub
        i = tokens[leads]
        mass, taken, spare, fill = (
            (following, from_second, left[0], hub_leading) if leads else (others, from_first, left[1], hub_second)
        )
        keep = min(1.0, float(taken[0, i]) / float(mass[0, i]))
        lead = (1.0 - keep) * min(1.0, fill / spare) if c.is_positive(spare) else 0.0
        return NodeSet(
            sequential_tests((lead, keep) if leads else (keep, lead)), rest, c.clamp01(float(c.row_sums(rest)))
        )

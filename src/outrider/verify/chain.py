"""Speculative sampling on chains in closed form: the fast twin of `tree.py`.

The coins need only p(x) and q(x) of the K draft tokens. Once they are tossed, the passes over V touch only the judged rows
and, per sequence, the row that gives its last token. `device.py` does the same on an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.noise import Noise
from outrider.types import Draft, Verdict
from outrider.verify import numerics as c


def verify_chains(p: Float[Tensor, "M V"], draft: Draft, noise: Noise) -> Verdict:
    """Accept x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0) (Leviathan et al. 2023, Algorithm 1).

    p: distributions of the B anchors, then of the K nodes. A point mass at x is accepted with probability p(x), else taken out.
    """
    px, qx = probs_of_tokens(p, draft)
    sequences = range(len(draft.counts))
    accepted = [accept_prefix(px, qx, draft, noise, b) for b in sequences]
    tokens = [last_token(p, draft, noise, b, accepted[b], 1.0, qx) for b in sequences]
    common = [0.0] * len(px)
    for b in sequences:
        for k in draft.nodes(b)[: accepted[b] + 1]:
            if draft.q is not None and c.is_positive(qx[k]):
                distribution, row = draft.q.row[k], draft.parent_rows[k]
                common[k] = c.overlap_row(
                    p[row : row + 1], draft.q.probs[distribution : distribution + 1], draft.q.support
                )
    return verdict_of(draft, accepted, tokens, px, qx, common)


def verdict_of(
    draft: Draft,
    accepted: Sequence[int],
    tokens: Sequence[int],
    px: Sequence[float],
    qx: Sequence[float],
    common: Sequence[float],
) -> Verdict:
    """The verdict of chains, with the risk of every judged node. accepted: accepted nodes of each chain.

    px, qx, common: per node p(x), q(x), and the overlap of p and q where q(x) counts.
    """
    paths, risks = [], []
    for b, n in enumerate(accepted):
        nodes = draft.nodes(b)
        paths.append(nodes[:n])
        judged = nodes[: n + 1]
        risks.append(
            [
                c.rejection_risk(common[k], px[k], qx[k]) if c.is_positive(qx[k]) else c.clamp01(1.0 - px[k])
                for k in judged
            ]
        )
    return c.verdict(paths, tokens, risks)


def probs_of_tokens(p: Float[Tensor, "M V"], draft: Draft) -> tuple[list[float], list[float]]:
    """p(x) and q(x) of every node, on the host. q(x) is zero where the node counts as a point mass."""
    n = len(draft.parent)
    if not n:
        return [], []
    px = c.take_pairs(p, draft.parent_rows, draft.token)
    if draft.q is None:
        return px.tolist(), [0.0] * n
    both = torch.cat([px, c.token_probs(draft.q, draft.q.row, draft.token)]).tolist()
    return both[:n], both[n:]


def accept_prefix(px: list[float], qx: list[float], draft: Draft, noise: Noise, b: int) -> int:
    """The number of nodes of sequence b that are accepted, from the anchor down, before one is refused."""
    for d, k in enumerate(draft.nodes(b)):
        if not noise.uniform(b, d + 1, "accept") * (qx[k] if c.is_positive(qx[k]) else 1.0) < px[k]:
            return d
    return draft.counts[b]


def last_token(
    p: Float[Tensor, "M V"], draft: Draft, noise: Noise, b: int, accepted: int, w: float, qx: Sequence[float]
) -> int:
    """The token after the accepted nodes of sequence b: from p if all were accepted; else from (w p - q)_+ with q of the refused
    node, or, if that was a point mass, from p without its token."""
    nodes, u = draft.nodes(b), noise.uniform(b, accepted + 1, "final")
    row = draft.row(b, nodes[accepted - 1] if accepted else -1)
    here, k = p[row : row + 1], nodes[accepted] if accepted < len(nodes) else -1
    if k < 0:
        drawn = c.draw_one(here, u)
    elif draft.q is not None and c.is_positive(qx[k]):
        drawn = c.draw_residual(here, draft.q, draft.q.row[k], w, u)
    else:
        drawn = c.draw_without(here, draft.tokens[k], u)
    return c.final_token(drawn, p, row, u, b)

"""Speculative sampling on chains, in closed form for all sequences and nodes at once: the fast twin of `tree.py`.

Two short copies to the host and no loop over V in Python. The coins need only p(x) and q(x) of the K proposed tokens.
Once they are tossed, the passes over V touch only the rows that were judged and, per sequence, the row that gives its
last token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from outrider.noise import Noise
from outrider.types import Draft, Verdict
from outrider.verify import native
from outrider.verify import numerics as c

FEW = 1 << 18
"""Probabilities whose overlap is taken at once: temporaries stay in cache, and long rows are read in place."""


class _Walk(NamedTuple):
    """How far one sequence got.

    judged: positions whose coin was tossed. row: the row of p its last token comes from. refused: the node refused
    there, or -1. law: that node's law, or -1 if it counts as a point mass.
    """

    accepted: int
    judged: int
    row: int
    refused: int = -1
    law: int = -1


def judge_chains(p: Float[Tensor, "M V"], draft: Draft, noise: Noise) -> Verdict:
    """Accept x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0) (Leviathan et al. 2023, Algorithm 1).

    p: laws of the B anchors, then of the K nodes. A point mass at x is accepted with probability p(x), else taken out.
    """
    low, rows = draft.offsets, judging_rows(draft)
    px, qx = probs_of_tokens(p, draft, rows)
    walks = [_toss(px, qx, draft, noise, b) for b in range(len(draft.counts))]
    judged = [range(low[b], low[b] + w.judged) for b, w in enumerate(walks)]
    lawful = [k for nodes in judged for k in nodes if c.is_mass(qx[k])]
    tokens, shared = _finish(p, draft, noise, walks, lawful, rows)
    risk = [c.unit(1.0 - x) for x in px]
    for k, common in zip(lawful, shared, strict=True):
        risk[k] = c.law_risk(common, px[k], qx[k])
    paths = [nodes[: w.accepted] for nodes, w in zip(judged, walks, strict=True)]
    return c.verdict(paths, tokens, [[risk[k] for k in nodes] for nodes in judged])


def judging_rows(draft: Draft) -> list[int]:
    """For every node the row of p that judges it: its sequence's anchor, or the node before it."""
    rows: list[int] = []
    sequences = len(draft.counts)
    for b, n in enumerate(draft.counts):
        if n:
            first = sequences + draft.offsets[b]
            rows.append(b)
            rows.extend(range(first, first + n - 1))
    return rows


def probs_of_tokens(p: Float[Tensor, "M V"], draft: Draft, rows: list[int]) -> tuple[list[float], list[float]]:
    """p(x) and q(x) of every node, on the host. q(x) is zero where the node counts as a point mass."""
    if not rows:
        return [], []
    n = len(rows)
    px = c.take_pairs(p, rows, draft.token)
    if draft.q is None:
        return px.tolist(), [0.0] * n
    both = torch.cat([px, c.token_probs(draft.q, draft.q.row, draft.token)]).tolist()
    return both[:n], both[n:]


def _toss(px: list[float], qx: list[float], draft: Draft, noise: Noise, b: int) -> _Walk:
    """Accept the nodes of sequence b from the anchor down, until one is refused."""
    row, low, n = b, draft.offsets[b], draft.counts[b]
    for d in range(n):
        k = low + d
        lawful = c.is_mass(qx[k])
        if not noise.uniform(b, d + 1, "accept") * (qx[k] if lawful else 1.0) < px[k]:
            return _Walk(d, d + 1, row, k, draft.q.row[k] if lawful and draft.q is not None else -1)
        row = len(draft.counts) + k
    return _Walk(n, n, row)


def _finish(
    p: Float[Tensor, "M V"], draft: Draft, noise: Noise, walks: list[_Walk], lawful: list[int], rows: list[int]
) -> tuple[list[int], list[float]]:
    """The last token of every sequence, and the overlap of p and q at each of the `lawful` judged nodes."""
    if native.serve(p):
        return _finish_in_turn(p, draft, noise, walks, lawful, rows)
    order = sorted(range(len(walks)), key=lambda b: walks[b].law < 0)  # those refused by a law first: one slice
    u = [noise.uniform(b, walks[b].accepted + 1, "final") for b in order]
    token, total = c.draw(_weights(p, draft, [walks[b] for b in order]), u)
    parts = [token.double(), total]
    if draft.q is not None:
        few = max(1, FEW // p.shape[1])
        for nodes in (lawful[i : i + few] for i in range(0, len(lawful), few)):
            q = c.take_rows(draft.q.probs, [draft.q.row[k] for k in nodes])
            parts.append(c.overlap(c.take_rows(p, [rows[k] for k in nodes]), q, draft.q.support))
    host = torch.cat(parts).tolist()
    n = len(walks)
    tokens = [0] * n
    for i, b in enumerate(order):
        tokens[b] = int(host[i]) if c.is_total(host[n + i]) else c.draw_row(p, walks[b].row, u[i], b)
    return tokens, host[2 * n :]


def _finish_in_turn(
    p: Float[Tensor, "M V"], draft: Draft, noise: Noise, walks: list[_Walk], lawful: list[int], rows: list[int]
) -> tuple[list[int], list[float]]:
    """The same, one row after the other, as native passes read them."""
    tokens = []
    for b, walk in enumerate(walks):
        u, here = noise.uniform(b, walk.accepted + 1, "final"), p[walk.row : walk.row + 1]
        if walk.law >= 0 and draft.q is not None:
            token, total = c.draw_residual(here, draft.q, walk.law, 1.0, u)
        elif walk.refused >= 0:
            token, total = c.draw_without(here, draft.tokens[walk.refused], u)
        else:
            token, total = c.draw_one(here, u)
        tokens.append(token if c.is_total(total) else c.draw_row(p, walk.row, u, b))
    shared = []
    for k in lawful:
        assert draft.q is not None
        law = draft.q.row[k]
        shared.append(c.overlap_one(p[rows[k] : rows[k] + 1], draft.q.probs[law : law + 1], draft.q.support))
    return tokens, shared


def _weights(p: Float[Tensor, "M V"], draft: Draft, walks: list[_Walk]) -> Float64[Tensor, "n W"]:
    """What the last tokens are drawn from: p, less the law that was refused, or without the point mass that was."""
    weight = c.as_weights(c.take_rows(p, [w.row for w in walks]))
    laws = [w.law for w in walks if w.law >= 0]
    if laws and draft.q is not None:
        c.subtract(weight[: len(laws), : p.shape[1]], c.take_rows(draft.q.probs, laws), draft.q.support)
    width = weight.shape[1]
    points = [i * width + draft.tokens[w.refused] for i, w in enumerate(walks) if w.law < 0 <= w.refused]
    if points:
        weight.view(-1)[torch.tensor(points, device=p.device)] = 0
    return weight

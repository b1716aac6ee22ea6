"""Chains verified on an accelerator: everything is decided there, and one copy brings the result to the host.

Twins of `chain.py` and `block.py`, coin for coin. Coins do not depend on the target's output, so those of all positions are
uploaded while it is still computing. What the host twin computes only where it is needed (the overlap at a position, the weights
of the last token) is computed for all positions here. Nothing waits for the device: see `transfer.Pending`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from outrider.noise import Noise
from outrider.transfer import Pending, upload
from outrider.types import Draft, Verdict
from outrider.verify import numerics as c

Call = TypeVar("Call", bound=Callable[..., Any])


def launched_by(launch: Callable[..., Pending[Verdict] | None]) -> Callable[[Call], Call]:
    """Mark the `__call__` of a rule: `launch` decides the same and leaves the verdict on the device, so that a caller can read it
    together with other values. It returns None where the host decides. A subclass with its own `__call__` is not marked."""

    def mark(call: Call) -> Call:
        setattr(call, "launch", launch)  # noqa: B010 (a function has no such attribute to a type checker)
        return call

    return mark


@dataclass(frozen=True, slots=True)
class _Chains:
    """The chains of B sequences, with at most D nodes each, as tensors on the device of p.

    parent_row, q_row: [K] row of p that verifies a node, and row of q that it was drawn from (0 where there is none).
    px, qx, has_q: [K] p(x), q(x), and whether q(x) counts. accept: [K] coins. final: [B, D + 1] by number of accepted nodes, and
    final_host the same on the host. place, there: [B, D] node of each depth, and whether there is one. cell: [K] a node's place in
    a table [B, D]. low, count: [B] first node, and how many.
    """

    parent_row: Int[Tensor, "K"]
    q_row: Int[Tensor, "K"]
    px: Float64[Tensor, "K"]
    qx: Float64[Tensor, "K"]
    has_q: Bool[Tensor, "K"]
    accept: Float64[Tensor, "K"]
    final: Float64[Tensor, "B E"]
    place: Int[Tensor, "B D"]
    there: Bool[Tensor, "B D"]
    cell: Int[Tensor, "K"]
    low: Int[Tensor, "B"]
    count: Int[Tensor, "B"]
    final_host: list[list[float]]


def speculative_sampling(
    p: Float[Tensor, "M V"], draft: Draft, noise: Noise, verdict_of: Callable[..., Verdict]
) -> Pending[Verdict]:
    """Twin of `chain.verify_chains`. verdict_of: makes the verdict from the values read, as the host twin does."""
    chains = _chains(p, draft, noise)
    passed = chains.accept * chains.qx.where(chains.has_q, 1.0) < chains.px
    accepted = (passed[chains.place] & chains.there).long().cumprod(1).sum(1)
    tokens, totals = _last(p, draft, chains, accepted, None)
    common = torch.zeros_like(chains.px)
    if draft.q is not None and draft.parent:
        q = draft.q.probs.index_select(0, chains.q_row)
        common = c.overlap(p.index_select(0, chains.parent_row), q, draft.q.support)

    def finish(accepted: list[int], tokens: list[int], totals: list[float], *ledger: list[float]) -> Verdict:
        last = _checked(p, draft, chains, accepted, tokens, totals)
        return verdict_of(draft, accepted, last, *ledger)

    return Pending((accepted, tokens, totals, chains.px, chains.qx.where(chains.has_q, 0.0), common), finish)


def block(p: Float[Tensor, "M V"], draft: Draft, noise: Noise, verdict_of: Callable[..., Verdict]) -> Pending[Verdict]:
    """Twin of `BlockVerification`. verdict_of: makes the verdict from the values read, as the host twin does."""
    chains = _chains(p, draft, noise)
    w = _keep(chains)
    above, keep = (table.flatten()[chains.cell] for table in (w[:, :-1], w[:, 1:]))
    lost, variance = _lost(p, draft, chains, keep, above)
    depth = torch.arange(w.shape[1], device=p.device)
    end = depth[1:] == chains.count.unsqueeze(1)
    follow = torch.cat([lost, lost.new_zeros(1)])[chains.place + 1]  # S of the node itself: its child's entry of `lost`
    top, bottom = w[:, 1:].where(end, follow), torch.where(end, 1.0, follow + 1.0 - w[:, 1:])
    stands = (chains.accept[chains.place] * bottom < top) | (bottom <= 0.0)
    taken = torch.cat([depth[:1].expand(len(w), 1), depth[1:] * (stands & chains.there)], 1).amax(1)
    tokens, totals = _last(p, draft, chains, taken, w.gather(1, taken.unsqueeze(1)))

    def finish(taken: list[int], tokens: list[int], totals: list[float], *ledger: list[float]) -> Verdict:
        return verdict_of(draft, taken, _checked(p, draft, chains, taken, tokens, totals), *ledger)

    return Pending((taken, tokens, totals, keep, lost, variance), finish)


def _chains(p: Tensor, draft: Draft, noise: Noise) -> _Chains:
    """Upload the structure of the chains and their coins, and look up p(x) and q(x)."""
    sequences, nodes, deep = len(draft.counts), len(draft.parent), max(draft.counts, default=0)
    q = draft.q
    owners = [(b, draft.nodes(b)) for b in range(sequences)]
    q_row = [max(row, 0) for row in q.row] if q is not None else [0] * nodes
    grid = [own[d] if d < len(own) else -1 for _, own in owners for d in range(deep)]
    cell = [b * deep + d for b, own in owners for d in range(len(own))]
    table = [*(max(k, 0) for k in grid), *(k >= 0 for k in grid)]
    whole = [*draft.parent_rows, *q_row, *cell, *table, *draft.offsets[:-1], *draft.counts]
    sizes = [nodes] * 3 + [sequences * deep] * 2 + [sequences] * 2
    rows, q_rows, cells, place, there, low, count = upload(whole, torch.int64, p.device).split(sizes)
    final = [[noise.uniform(b, d + 1, "final") if d <= len(own) else 0.5 for d in range(deep + 1)] for b, own in owners]
    accept = [noise.uniform(b, d + 1, "accept") for b, own in owners for d in range(len(own))]
    coins = upload([*accept, *(u for row in final for u in row)], torch.float64, p.device)
    px = p[rows, draft.token].double()
    qx = torch.zeros_like(px) if q is None or not nodes else c.token_probs(q, q.row, draft.token).double()
    return _Chains(
        rows, q_rows, px, qx, (qx > 0) & qx.isfinite(), coins[:nodes], coins[nodes:].view(sequences, deep + 1),
        place.view(sequences, deep), there.view(sequences, deep).bool(), cells, low, count, final,
    )  # fmt: skip


def _last(
    p: Tensor, draft: Draft, chains: _Chains, taken: Int[Tensor, "B"], w: Float64[Tensor, "B 1"] | None
) -> tuple[Int[Tensor, "B"], Float64[Tensor, "B"]]:
    """`chain.last_token` of every sequence, with the totals of the weights drawn from. w: of the residuals; None: one."""
    sequences, size = len(draft.counts), p.shape[1]
    anchors = torch.arange(sequences, device=p.device)
    weight = c.as_weights(p.index_select(0, torch.where(taken > 0, sequences + chains.low + taken - 1, anchors)))
    if draft.parent:
        refused = taken < chains.count
        node = (chains.low + taken).clamp_(max=len(draft.parent) - 1)
        has_q = (refused & chains.has_q[node]).unsqueeze(1)
        if draft.q is not None:
            less = draft.q.probs.index_select(0, chains.q_row[node]).where(has_q, 0.0)
            c.subtract(
                weight[:, :size] if w is None else weight[:, :size].mul_(w.where(has_q, 1.0)), less, draft.q.support
            )
        point, token = refused.unsqueeze(1) & ~has_q, draft.token[node].unsqueeze(1)
        weight.scatter_(1, token, weight.gather(1, token).where(~point, 0.0))
    level = chains.final.gather(1, taken.unsqueeze(1)).clamp(max=c.BELOW_ONE)
    tokens, totals = c.draw_at(weight, level)
    # parallel sums may decrease by rounding, and then a column of weight zero may be the first above a level
    some = weight.gather(1, tokens.clamp(max=weight.shape[1] - 1).unsqueeze(1)).squeeze(1) > 0
    return tokens.where(some, weight.argmax(1)), totals


def _checked(
    p: Tensor, draft: Draft, chains: _Chains, taken: list[int], tokens: list[int], totals: list[float]
) -> list[int]:
    """The last tokens; where the weights had no mass, the token is drawn again from the row itself."""
    out = []
    for b, n in enumerate(taken):
        row = draft.row(b, draft.nodes(b)[n - 1] if n else -1)
        out.append(c.final_token((tokens[b], totals[b]), p, row, chains.final_host[b][n], b))
    return out


def _keep(chains: _Chains) -> Float64[Tensor, "B E"]:
    """w of the anchors (one) and of the nodes of every depth."""
    w = chains.final.new_ones(len(chains.final))
    scale = chains.qx.where(chains.has_q, 1.0)
    out = [w]
    for place in chains.place.unbind(1):
        w = _clamp01(w * chains.px[place] / scale[place])
        out.append(w)
    return torch.stack(out, 1)


def _lost(
    p: Tensor, draft: Draft, chains: _Chains, keep: Float64[Tensor, "K"], above: Float64[Tensor, "K"]
) -> tuple[Float64[Tensor, "K"], Float64[Tensor, "K"]]:
    """For every node S of its parent, and the variance of w that drawing its token adds."""
    lost, variance = above - keep, torch.zeros_like(keep)
    if draft.q is None or not draft.parent:
        return lost, variance
    here = p.index_select(0, chains.parent_row) * above.to(p.dtype).unsqueeze(1)
    common, loss, square = c.overlaps(here, draft.q.probs.index_select(0, chains.q_row), draft.q.support)
    variance = (square - common * common).nan_to_num(nan=0.0).clamp_(min=0).where(chains.has_q, 0.0)
    return _clamp01(loss).where(chains.has_q, lost), variance


def _clamp01(x: Float64[Tensor, "n"]) -> Float64[Tensor, "n"]:
    """`numerics.clamp01` of tensors."""
    return x.nan_to_num(nan=1.0).clamp_(0.0, 1.0)

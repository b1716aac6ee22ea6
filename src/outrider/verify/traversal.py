"""Traversal verification: block verification on trees. Leaves come first, and a refused leaf leaves its share to its parent.

A node carries a measure w * r, r a distribution and w at most one: the output mass through it that is not covered yet. A child x
drawn from q covers the share min(1, (w r)(x) / q(x)) of q(x); a leaf is kept if its coin is below its w. When a child and its whole
subtree are refused, the measure shrinks to (w r - q)_+ with total S, and since this happens with probability S + 1 - w, the parent
continues with the measure (w r - q)_+ / (S + 1 - w): with its next child, or its own coin (Weng et al. 2025, arXiv 2505.12398).
On a chain this is block verification, coin for coin, and `block.py` verifies it.

It is exact, by induction over the remaining children: given the path to a node, the output through it has the measure w * r.
A leaf: it is kept with probability w and draws from its r. A child: averaged over q it outputs min(q, w r), and after its
refusal the rest has, by induction, the measure (S + 1 - w) (w r - q)_+ / (S + 1 - w). Both add up to w r for every token of
the child, so it holds for i.i.d. siblings, for siblings without replacement and for point masses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from outrider.deprecated import Renamed
from outrider.noise import Noise
from outrider.transfer import Pending
from outrider.types import Draft, Verdict
from outrider.verify import device
from outrider.verify import numerics as c
from outrider.verify.block import BlockVerification
from outrider.verify.tree import SiblingDistributions


class Traversal:
    """Traversal verification of any forest. Lossless if the distributions a draft declares are true; it may declare none (q=None).

    Ledger: risk is the probability, given the draft, that no leaf is kept. It is computed from all nodes, including those after
    the one that is kept.
    """

    name = "traversal"
    lossless = True
    trees = True
    lane = "draft"
    reads_below = True  # a decision about one node looks at the drafts below it
    tv_limit = 0.0
    limit = Renamed("tv_limit")

    def launch(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Pending[Verdict] | None:
        """The same verdict of chains, decided on the device of p and not yet read; None for a tree, which the host decides."""
        return BlockVerification().launch(p, draft, noise, allowance) if draft.is_chain else None

    @device.launched_by(launch)
    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: distributions of the B anchors, then of the K nodes; rows finite, not negative, sum one.

        Reads noise lanes `accept` (index: the node's number at its depth) and `final`. Raises RequestError if a distribution to
        draw from has no mass.
        """
        if draft.is_chain:
            return BlockVerification()(p, draft, noise, allowance)
        paths, tokens, judged, risks = [], [], [], []
        for b in range(len(draft.counts)):
            path, token, whole, risk = judge_sequence(p, draft, noise, b)
            paths.append(path)
            tokens.append(token)
            judged.append(len(path) + (not whole))
            risks.append(risk)
        spread = tuple(risk * (1.0 - risk) for risk in risks)
        return Verdict(tuple(paths), tuple(tokens), tuple(judged), tuple(risks), spread, (0.0,) * len(risks))


@dataclass(frozen=True, slots=True)
class Stop:
    """A node at its turn, the anchor (-1) last: it is kept with probability `keep`, and then the next token is drawn from
    `distribution`.

    whole: whether it has no children, so that keeping it refuses nothing.
    """

    node: int
    keep: float
    distribution: Float64[Tensor, "1 V"]
    whole: bool


def judge_sequence(p: Tensor, draft: Draft, noise: Noise, b: int) -> tuple[tuple[int, ...], int, bool, float]:
    """Path, next token, whether a leaf is kept, and the probability that none is."""
    number = _numbers(draft, b)
    found: Stop | None = None
    left, whole = 1.0, 0.0
    for stop in stops(p, draft, b):
        if found is None:
            depth, index = number[stop.node]
            if stop.node < 0 or noise.uniform(b, depth, "accept", index) < stop.keep:
                found = stop
        whole += left * stop.keep if stop.whole else 0.0
        left *= 1.0 - stop.keep
    assert found is not None
    path = draft.path_to(found.node)
    u = noise.uniform(b, len(path) + 1, "final")
    drawn = c.draw_plain(c.as_weights(found.distribution), u)
    return path, c.final_token(drawn, p, draft.row(b, found.node), u, b), found.whole, c.clamp01(1.0 - whole)


def _numbers(draft: Draft, b: int) -> dict[int, tuple[int, int]]:
    """For every node of sequence b its depth and its number among the nodes of that depth: the index of its coin."""
    out: dict[int, tuple[int, int]] = {-1: (0, 0)}
    seen: dict[int, int] = {}
    for k in draft.nodes(b):
        depth = out[draft.parent[k]][0] + 1
        out[k] = depth, seen.get(depth, 0)
        seen[depth] = out[k][1] + 1
    return out


def stops(p: Float[Tensor, "M V"], draft: Draft, b: int) -> Iterator[Stop]:
    """The nodes of sequence b in verification order, each as if all before it had been refused."""
    yield from _visit(p, draft, b, -1, 1.0)


def _visit(p: Tensor, draft: Draft, b: int, node: int, w: float) -> Iterator[Stop]:
    """The subtree of `node`, which carries w: its children in draw order, then itself."""
    row = draft.row(b, node)
    here = p[row : row + 1].double()
    owed = here * w
    distributions = SiblingDistributions(draft.q)
    children = draft.children(b, node)
    for k in children:
        x, at = draft.tokens[k], distributions.row_of(k)
        qx, px = distributions.at(at, x), float(owed[0, x])
        has_q = c.is_positive(qx)
        yield from _visit(p, draft, b, k, (1.0 if px >= qx else px / qx) if has_q else c.clamp01(px))
        owed = owed.clone()
        if has_q:
            c.subtract(owed, distributions.now(at), distributions.support)
            distributions.drawn(at, x)
        else:
            owed[0, x] = 0
        rest = float(c.row_sums(owed))
        refused = rest + 1.0 - w
        if (not c.is_drawable(rest) and node < 0) or refused <= 0.0:
            owed, w = here, 1.0  # refused with probability zero up to rounding: start again from p
        else:
            owed, w = owed / refused, c.clamp01(rest / refused)
    yield Stop(node, w, owed, not children)

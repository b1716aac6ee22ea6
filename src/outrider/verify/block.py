"""Block verification: a chain is judged as a whole, so a doubtful token may stand on what came before and after it.

With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)) along the draft x_1 .. x_g, the longest prefix i is kept whose coin
is below h_i, where S_i = sum (w_i p - q)_+ over the laws below prefix i, h_i = S_i / (S_i + 1 - w_i) and h_g = w_g. The next
token comes from (w_i p - q)_+, or from p behind a draft that was kept whole (Sun et al., ICLR 2025, arXiv 2403.10444).
P(at least i are kept | x_1 .. x_i) = w_i, never less than the product of min(1, p / q) that token by token gives.

A point mass is the law that has only its token: w_i = w_{i-1} p(x_i), and the residual is w p without that token. Where a
draft ends may depend on the tokens before its end, as for every rule: each prefix hands on exactly the mass w that it got.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import CapabilityError
from outrider.noise import Noise
from outrider.types import Draft, Verdict
from outrider.verify import native
from outrider.verify import numerics as c
from outrider.verify.chain import judging_rows, probs_of_tokens


class BlockVerification:
    """Block verification of chains. Lossless if the laws a draft declares are true; it may declare none (q=None).

    Accepts at least as many tokens as speculative sampling on average, from the same draft and the same forward; one pass over
    the laws of all drafted positions instead of the judged ones.

    Ledger: risk is the sum of S over the drafted positions. Each S is the probability that drawing the next token takes away
    from w, so risk minus rejections is a martingale over draws and coins: E[w_i | x_1 .. x_{i-1}] = w_{i-1} - S_{i-1}, and the
    draft is kept whole with probability w_g. spread is the predictable variance of both. A point mass is not drawn, so there
    the loss w_{i-1} - w_i is certain and adds nothing to spread.
    """

    name = "block"
    lossless = True
    trees = False
    lane = "draft"
    limit = 0.0

    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: laws of the B anchors, then of the K nodes; rows finite, not negative, sum one.

        Reads noise lanes `accept` (every depth) and `final`. Raises RequestError if a law to draw from has no mass, and
        CapabilityError for a tree.
        """
        if not draft.is_chain:
            raise CapabilityError(
                "rule 'block' judges chains only: use 'speculative_sampling', or a drafter without branching"
            )
        rows = judging_rows(draft)
        px, qx = probs_of_tokens(p, draft, rows)
        keep = _keep(px, qx, draft)
        lost, variance = _lost(p, draft, rows, px, qx, keep)
        paths, tokens, risk, spread = [], [], [], []
        for b, low in enumerate(draft.offsets[:-1]):
            nodes = range(low, low + draft.counts[b])
            taken = _longest(nodes, keep, lost, noise, b)
            whole = keep[nodes[-1]] if nodes else 1.0
            paths.append(tuple(nodes[:taken]))
            tokens.append(_last(p, draft, noise, b, taken, keep, qx))
            risk.append(sum(lost[k] for k in nodes))
            spread.append(sum(variance[k] for k in nodes) + whole * (1.0 - whole))
        judged = tuple(min(len(path) + 1, n) for path, n in zip(paths, draft.counts, strict=True))
        return Verdict(tuple(paths), tuple(tokens), judged, tuple(risk), tuple(spread), (0.0,) * len(paths))


def _keep(px: list[float], qx: list[float], draft: Draft) -> list[float]:
    """w of every node: the probability, given the tokens down to it, that the path reaches at least so far."""
    out: list[float] = []
    for low, n in zip(draft.offsets, draft.counts, strict=False):
        w = 1.0
        for k in range(low, low + n):
            w = c.unit(w * px[k] / qx[k]) if c.is_mass(qx[k]) else c.unit(w * px[k])
            out.append(w)
    return out


def _above(keep: list[float], draft: Draft) -> list[float]:
    """w of every node's parent; one for the anchors."""
    return [keep[up] if up >= 0 else 1.0 for up in draft.parent]


def _lost(
    p: Tensor, draft: Draft, rows: list[int], px: list[float], qx: list[float], keep: list[float]
) -> tuple[list[float], list[float]]:
    """For every node S of its parent, and the variance of w that drawing its token adds. Laws are read one at a time."""
    above = _above(keep, draft)
    lost = [w - k for w, k in zip(above, keep, strict=True)]  # point masses: what is lost is known
    variance = [0.0] * len(lost)
    for k in (k for k in range(len(lost)) if c.is_mass(qx[k])):
        assert draft.q is not None
        law = draft.q.row[k]
        here, q, support = p[rows[k] : rows[k] + 1], draft.q.probs[law : law + 1], draft.q.support
        found = None if support is not None else native.overlap(here, q, above[k])
        common, loss, square = found or overlap_sums(here * above[k], q, support)
        lost[k], variance[k] = c.unit(loss), max(square - common * common, 0.0)
    return lost, variance


def overlap_sums(here: Float[Tensor, "1 V"], q: Float[Tensor, "1 S"], support: Tensor | None) -> native.Overlap:
    """Sums of min(wp, q), of (wp - q)_+ and of min(wp, q)^2 / q, from weights wp."""
    share = here if support is None else here.index_select(1, support)
    rest = c.row_sums((share - q).clamp_(min=0))
    if support is not None:
        rest += c.row_sums(here) - c.row_sums(share)  # what the draft can never propose is never handed on
    common = torch.minimum(share, q)
    mean = c.row_sums(common)
    square = c.row_sums(common.square_().div_(q.clamp(min=torch.finfo(q.dtype).tiny)))
    return native.Overlap(float(mean), float(rest), float(square))


def _longest(nodes: range, keep: list[float], lost: list[float], noise: Noise, b: int) -> int:
    """The longest prefix whose coin says so. All coins are looked at: a later one may outvote an earlier refusal."""
    for i in range(len(nodes), 0, -1):
        w = keep[nodes[i - 1]]
        rest = lost[nodes[i]] if i < len(nodes) else 0.0
        top, bottom = (w, 1.0) if i == len(nodes) else (rest, rest + 1.0 - w)
        if noise.uniform(b, i, "accept") * bottom < top or bottom <= 0.0:
            return i
    return 0


def _last(p: Tensor, draft: Draft, noise: Noise, b: int, taken: int, keep: list[float], qx: list[float]) -> int:
    """The token behind the kept prefix: from p after the whole draft, else from (w p - q)_+."""
    low, n = draft.offsets[b], draft.counts[b]
    row = b if taken == 0 else len(draft.counts) + low + taken - 1
    u = noise.uniform(b, taken + 1, "final")
    if taken == n:
        return c.draw_row(p, row, u, b)
    k = low + taken
    if c.is_mass(qx[k]) and draft.q is not None:
        token, total = c.draw_residual(p[row : row + 1], draft.q, draft.q.row[k], keep[k - 1] if taken else 1.0, u)
    else:
        token, total = c.draw_without(p[row : row + 1], draft.tokens[k], u)
    return token if c.is_total(total) else c.draw_row(p, row, u, b)

"""Block verification: a chain is verified as a whole, so an unlikely token may be kept because of the tokens around it.

With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)) along the draft x_1 .. x_g, the longest prefix i is kept whose coin
is below h_i, where S_i = sum (w_i p - q)_+ over the distributions below prefix i, h_i = S_i / (S_i + 1 - w_i) and h_g = w_g. The
next token comes from (w_i p - q)_+, or from p after a draft that was kept whole (Sun et al., ICLR 2025, arXiv 2403.10444).
P(at least i are kept | x_1 .. x_i) = w_i, never less than the product of min(1, p / q) of token-by-token verification.

A point mass is a distribution on one token: w_i = w_{i-1} p(x_i), and the residual is w p without that token. The length of a
draft may depend on its tokens, as for every rule: each prefix passes on exactly the mass w that it received.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.deprecated import Renamed
from outrider.errors import CapabilityError
from outrider.noise import Noise
from outrider.types import Draft, Verdict
from outrider.verify import device, native
from outrider.verify import numerics as c
from outrider.verify.chain import last_token, probs_of_tokens


class BlockVerification:
    """Block verification of chains. Lossless if the distributions a draft declares are true; it may declare none (q=None).

    Accepts at least as many tokens as speculative sampling on average, from the same draft and the same forward; it reads the
    distributions of all drafted positions, not only of the judged ones.

    Ledger: risk is the sum of S over the drafted positions. Each S is the expected loss of w when the next token is drawn,
    so risk minus rejections is a martingale over draws and coins: E[w_i | x_1 .. x_{i-1}] = w_{i-1} - S_{i-1}, and the
    draft is kept whole with probability w_g. spread is the predictable variance of both. A point mass is not drawn, so there
    the loss w_{i-1} - w_i is certain and adds nothing to spread.
    """

    name = "block"
    lossless = True
    trees = False
    lane = "draft"
    reads_below = True  # a decision about one node looks at the drafts below it
    tv_limit = 0.0
    limit = Renamed("tv_limit")

    def launch(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> transfer.Pending[Verdict]:
        """The same verdict, decided on the device of p and not yet read. Raises CapabilityError for a tree."""
        _check_chain(draft)
        return device.block(p, draft, noise, verdict_of)

    @device.launched_by(launch)
    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: distributions of the B anchors, then of the K nodes; rows finite, not negative, sum one.

        Reads noise lanes `accept` (every depth) and `final`. Raises RequestError if a distribution to draw from has no mass, and
        CapabilityError for a tree.
        """
        _check_chain(draft)
        if transfer.on_host(p):
            found = native.block(p, draft, noise)
            return verify_plain(p, draft, noise) if found is None else _verdict(draft, found)
        return transfer.fetch(self.launch(p, draft, noise))[0]


def _check_chain(draft: Draft) -> None:
    if not draft.is_chain:
        raise CapabilityError(
            "rule 'block' verifies chains only: use 'speculative_sampling', or a drafter without branching"
        )


def _verdict(draft: Draft, found: native.BlockResult) -> Verdict:
    if found.broken >= 0:
        raise c.no_distribution(found.broken)
    taken, counts, offsets = found.taken, draft.counts, draft.offsets
    return Verdict(
        tuple(tuple(range(at, at + n)) for at, n in zip(offsets, taken, strict=False)),
        tuple(found.next),
        tuple(min(n + 1, count) for n, count in zip(taken, counts, strict=True)),
        tuple(found.risk),
        tuple(found.spread),
        (0.0,) * len(taken),
    )


def verify_plain(p: Float[Tensor, "M V"], draft: Draft, noise: Noise) -> Verdict:
    """Sequence by sequence, a few passes over the vocabulary each: the plain twin of `native.block`."""
    px, qx = probs_of_tokens(p, draft)
    keep = _keep(px, qx, draft)
    lost, variance = _lost(p, draft, qx, keep)
    taken, tokens = [], []
    for b in range(len(draft.counts)):
        nodes = draft.nodes(b)
        taken.append(_longest(nodes, keep, lost, noise, b))
        w = keep[nodes[taken[b] - 1]] if taken[b] else 1.0
        tokens.append(last_token(p, draft, noise, b, taken[b], w, qx))
    return verdict_of(draft, taken, tokens, keep, lost, variance)


def verdict_of(
    draft: Draft,
    taken: Sequence[int],
    tokens: Sequence[int],
    keep: Sequence[float],
    lost: Sequence[float],
    variance: Sequence[float],
) -> Verdict:
    """The verdict of chains. taken: accepted nodes of each. keep, lost, variance: per node w, S of its parent, and what drawing
    its token adds to the variance of w."""
    paths, risk, spread = [], [], []
    for b, n in enumerate(taken):
        nodes = draft.nodes(b)
        whole = keep[nodes[-1]] if nodes else 1.0
        paths.append(tuple(nodes[:n]))
        risk.append(sum(lost[k] for k in nodes))
        spread.append(sum(variance[k] for k in nodes) + whole * (1.0 - whole))
    judged = tuple(min(n + 1, count) for n, count in zip(taken, draft.counts, strict=True))
    return Verdict(tuple(paths), tuple(tokens), judged, tuple(risk), tuple(spread), (0.0,) * len(paths))


def _keep(px: list[float], qx: list[float], draft: Draft) -> list[float]:
    """w of every node: the probability, given the tokens down to it, that the path reaches at least this node."""
    out: list[float] = []
    for b in range(len(draft.counts)):
        w = 1.0
        for k in draft.nodes(b):
            w = c.clamp01(w * px[k] / qx[k]) if c.is_positive(qx[k]) else c.clamp01(w * px[k])
            out.append(w)
    return out


def _lost(p: Tensor, draft: Draft, qx: list[float], keep: list[float]) -> tuple[list[float], list[float]]:
    """For every node S of its parent, and the variance of w that drawing its token adds. Distributions are read one at a time."""
    above = [keep[up] if up >= 0 else 1.0 for up in draft.parent]  # w of every node's parent; one for the anchors
    lost = [w - k for w, k in zip(above, keep, strict=True)]  # point masses: what is lost is known
    variance = [0.0] * len(lost)
    for k in (k for k in range(len(lost)) if c.is_positive(qx[k])):
        assert draft.q is not None
        distribution, row = draft.q.row[k], draft.parent_rows[k]
        here, q, support = p[row : row + 1], draft.q.probs[distribution : distribution + 1], draft.q.support
        found = None if support is not None else native.overlap(here, q, above[k])
        common, loss, square = found or overlap_sums(here * above[k], q, support)
        more = square - common * common
        lost[k], variance[k] = c.clamp01(loss), more if more > 0.0 else 0.0  # of NaN none, as `native.block` has it
    return lost, variance


def overlap_sums(here: Float[Tensor, "1 V"], q: Float[Tensor, "1 S"], support: Tensor | None) -> native.Overlap:
    """Sums of min(wp, q), of (wp - q)_+ and of min(wp, q)^2 / q, from weights wp: the plain twin of `native.overlap`."""
    return native.Overlap(*(float(x) for x in c.overlaps(here, q, support)))


def _longest(nodes: range, keep: list[float], lost: list[float], noise: Noise, b: int) -> int:
    """The longest prefix whose coin accepts it. All coins are used: a later one may accept despite an earlier refusal."""
    for i in range(len(nodes), 0, -1):
        w = keep[nodes[i - 1]]
        rest = lost[nodes[i]] if i < len(nodes) else 0.0
        top, bottom = (w, 1.0) if i == len(nodes) else (rest, rest + 1.0 - w)
        if noise.uniform(b, i, "accept") * bottom < top or bottom <= 0.0:
            return i
    return 0

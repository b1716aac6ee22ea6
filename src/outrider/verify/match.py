"""Match: accept the tokens that the target itself would draw with this request's noise.

At every position the target draws x = argmax p / e with unit exponentials e keyed by the request's seed and the
absolute position (lane `gumbel`), and the child with token x, if there is one, is accepted. Drafts only determine how
many of these draws fit into one step: the output is the same string as plain decoding, at any temperature and for any
drafter. A drafter that draws with the same noise (argmax q / e) matches with probability at least (1 - TV) / (1 + TV);
see Daliri et al. 2024 (arXiv 2408.07978) and Kobus and Gunduz 2025 (arXiv 2504.15475).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from outrider.deprecated import Renamed
from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft, Verdict
from outrider.verify import numerics as c


class Match:
    """Coupled-noise match on any forest. Lossless for every draft; the distributions it declares do not affect the output.

    Ledger: the probability of a rejection before the position's noise is read, for tokens chosen without reading it.
    Children that are point masses: 1 - sum of p over their distinct tokens. One child drawn with this noise from a
    declared distribution: 1 - `match_probability`, in O(V log V). Several children of which some have a distribution: they
    are ranks of the race itself, and a closed form would cost too much, so the noise counts as read: risk is the outcome,
    0 or 1, and spread is 0, which keeps risk - rejections a martingale but carries no information.
    """

    name = "match"
    lossless = True
    trees = True
    lane = "gumbel"
    tv_limit = 0.0
    limit = Renamed("tv_limit")

    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: distributions of the B anchors, then of the K nodes; rows finite, not negative.

        Reads the noise of accepted + 1 positions per sequence, but none for a distribution that is one-hot (temperature 0).
        Raises RequestError if a distribution to draw from has no mass.
        """
        paths, tokens, risks = [], [], []
        for b in range(len(draft.counts)):
            path, token, risk = _walk(p, draft, noise, b)
            paths.append(path)
            tokens.append(token)
            risks.append(risk)
        return c.verdict(paths, tokens, risks)


def _walk(p: Tensor, draft: Draft, noise: Noise, b: int) -> tuple[list[int], int, list[float]]:
    """Path, next token and risks of one sequence."""
    path: list[int] = []
    risks: list[float] = []
    here = p[b]
    while True:
        x = target_token(here, noise, b, len(path) + 1)
        children = draft.children(b, path[-1] if path else -1)
        if not children:
            return path, x, risks
        taken = next((k for k in children if draft.tokens[k] == x), None)
        risks.append(_risk(here, draft, children, taken is None))
        if taken is None:
            return path, x, risks
        path.append(taken)
        here = p[draft.row(b, taken)]


def target_token(p: Float[Tensor, "V"], noise: Noise, b: int, depth: int) -> int:
    """The target's draw from p at `depth` below the anchor of sequence b: argmax p / e, never a token without mass."""
    top = float(p.amax())
    if not c.is_positive(top):
        raise c.no_distribution(b)
    if top >= 1.0 and len(only := p.nonzero()) == 1:
        return int(only)
    score = p / noise.exponential(b, depth, p.shape[0], p.device)
    # the first largest, in two vectorised passes: argmax is many times slower on a long row on CPU
    return int((score == score.amax()).nonzero()[0])


def match_probability(p: Float[Tensor, "V"], q: Float[Tensor, "V"]) -> float:
    """Probability that argmax p / e and argmax q / e agree when both read the same unit exponentials e.

    sum_x 1 / sum_y max(p_y / p_x, q_y / q_x); the inner sum is split where q_y / p_y passes q_x / p_x, by one sort.
    """
    p, q = p.double(), q.double()
    some = (p > 0) | (q > 0)
    p, q = p[some], q[some]
    order = (q / p).argsort()
    p, q = p[order], q[order]
    smaller = p.cumsum(0) - p  # tokens y before x, where p_y / p_x is the larger of the two
    larger = q.flip(0).cumsum(0).flip(0)  # x and the tokens after it, where q_y / q_x is the larger
    both = (p > 0) & (q > 0)
    p, q, smaller, larger = p[both], q[both], smaller[both], larger[both]
    return float((p * q / (smaller * q + larger * p)).sum())


def _risk(p: Float[Tensor, "V"], draft: Draft, children: list[int], rejected: bool) -> float:
    """The probability that no child of this position is the target's draw."""
    rows = [POINT_MASS if draft.q is None else draft.q.row[k] for k in children]
    if all(row == POINT_MASS for row in rows):
        return c.clamp01(1.0 - sum(float(p[x]) for x in {draft.tokens[k] for k in children}))
    if len(children) == 1 and draft.q is not None:
        return c.clamp01(1.0 - match_probability(p, draft.q.dense(rows, p.shape[0])[0]))
    return float(rejected)

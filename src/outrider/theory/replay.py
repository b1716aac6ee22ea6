"""What speculative decoding would have done, from log-probabilities of the emitted text alone.

Let p be the target's law, q the draft's, and let exact speculative sampling emit the text x_1 .. x_N. At a position where a
draft was proposed, drawn from q, the rule emits y as an accepted draft with probability min(p, q)(y) and as a correction
with probability (p - q)_+(y); together p(y). Hence, given the text so far and that x_n sits at a judged position,

    P(x_n was drafted and accepted | x_n) = min(p, q)(x_n) / p(x_n) = min(1, q(x_n) / p(x_n)) =: a_n.            (1)

What comes after depends on the past through the text only, so the coins (1) along a given text are independent of each
other and of its rest: which tokens were accepted is a Markov chain on "place within the draft" with known probabilities,
and calls, rejections and acceptance length for *every* draft length follow from p(x_n) and q(x_n), logged once. Averaged
over texts of the target they are the engine's expectations; for rejections this is Yin et al., "A Theoretical Perspective
for Speculative Decoding Algorithm", NeurIPS 2024, Theorem 1, since E_{x~p} (1 - q/p)_+ = TV(p, q).

Greedy drafting proposes argmax q as a point mass: (1) becomes a_n = 1 if x_n is the draft's most likely token, else 0.

Block verification (Sun et al., "Block Verification Accelerates Speculative Decoding", ICLR 2025) judges a draft as a whole.
With L_j the product of q/p over the first j tokens of a draft that starts at x_n, P(at least k of them are kept, and the
text is emitted) is the text's probability times m_k = min(1, L_1, .., L_k): the rule stops behind i tokens with the mass
(m_i - L_(i+1))_+ = m_i - m_(i+1), which telescopes. So m_k takes the place of the product of (1), from the same logs.

How calls are counted is how an engine counts verdicts: the first token comes from the prompt's own call, without a draft
(`first_drafted` changes that); then every call scores `length` drafts and emits the accepted ones and one more. A draft is
cut so that it and its last token fit what may still be emitted: the last token of a text that ends at its limit is never a
judged draft, that of a text that ends with a stop token may be. Drafts behind a stop token are in no log and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import positive_int

Array = npt.NDArray[np.float64]
Drafting = Literal["sampled", "greedy"]
Verification = Literal["token", "block"]
GROUP = 64
"""Texts that share one padded array."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The log of one emitted text of N tokens; every array is [N].

    target, draft: natural log-probabilities of the emitted tokens under the laws that sampling used (after temperature,
        top-p and so on); target finite and <= 0, draft <= 0 or -inf where the draft could not propose the token.
    hit: whether the emitted token was the draft's most likely one; needed for greedy drafting.
    tv: TV(p, q) of the two laws at each position. risk: 1 - p(argmax q). Both optional: they lower the variance.
    stopped: whether the text ended with a stop token. limit: the most tokens it could have had; None: N, or unlimited for a
        text that was stopped.
    name, prompt, domain: texts of one prompt form one cluster of the intervals.
    """

    target: Array
    draft: Array
    hit: npt.NDArray[np.bool_] | None = None
    tv: Array | None = None
    risk: Array | None = None
    stopped: bool = False
    limit: int | None = None
    name: str = ""
    prompt: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        target, draft = np.asarray(self.target, np.float64), np.asarray(self.draft, np.float64)
        if target.ndim != 1 or not len(target):
            raise ValueError(f"target must have one log-probability per token, got shape {target.shape}")
        if draft.shape != target.shape:
            raise ValueError(f"draft must have {len(target)} log-probabilities as target has, got shape {draft.shape}")
        if not (np.isfinite(target) & (target <= 0)).all():
            raise ValueError(
                f"target must be finite and at most 0, got {target[~np.isfinite(target) | (target > 0)][0]:g}"
            )
        if not (draft <= 0).all():
            raise ValueError(f"draft must be at most 0 (or -inf), got {draft[~(draft <= 0)][0]:g}")
        for name, values in (("hit", self.hit), ("tv", self.tv), ("risk", self.risk)):
            if values is not None and np.shape(values) != target.shape:
                raise ValueError(f"{name} must have {len(target)} entries as target has, got shape {np.shape(values)}")
        if self.limit is not None and self.limit < len(target):
            raise ValueError(f"limit must be at least the {len(target)} tokens of the text, got {self.limit}")

    def __len__(self) -> int:
        return len(self.target)

    @property
    def most(self) -> float:
        """Most tokens the text could have had."""
        return self.limit if self.limit is not None else float("inf") if self.stopped else len(self)


def acceptance(text: Text, drafting: Drafting = "sampled") -> Array:
    """[N] probability that the emitted token, were it judged, was an accepted draft: formula (1) of the module.

    Raises ValueError for greedy drafting when the log does not say which tokens the draft would have proposed.

    >>> acceptance(Text(np.log([0.5, 0.8]), np.log([0.25, 0.9])))
    array([0.5, 1. ])
    """
    if drafting == "sampled":
        return np.exp(np.minimum(text.draft - text.target, 0.0))
    if drafting != "greedy":
        raise ValueError(f"drafting must be 'sampled' or 'greedy', got {drafting!r}")
    if text.hit is None:
        raise ValueError("hit must be logged for greedy drafting: whether each token was the draft's most likely one")
    return np.asarray(text.hit, np.float64)


def survival(text: Text, length: int, drafting: Drafting = "sampled", verification: Verification = "token") -> Array:
    """[N, length + 1]: entry (n, k) is P(at least k drafts of a call that starts at token n are kept | text).

    Behind the end of the text the last value is repeated.
    """
    size = len(text)
    out = np.ones((size, positive_int("length", length) + 1))
    if verification not in ("token", "block"):
        raise ValueError(f"verification must be 'token' or 'block', got {verification!r}")
    if drafting == "greedy" or verification == "token":  # a point mass is kept or not: both rules are the same
        steps = np.append(acceptance(text, drafting), np.ones(length))
        for k in range(length):
            out[:, k + 1] = out[:, k] * steps[k : k + size]
        return out
    ratio = np.append(text.draft - text.target, np.zeros(length))
    total, lowest = np.zeros(size), np.zeros(size)
    for k in range(length):
        total = total + ratio[k : k + size]
        lowest = np.minimum(lowest, total)
        out[:, k + 1] = np.exp(lowest)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Expected counts of T texts at one draft length, given the texts; arrays are [T] unless said otherwise.

    calls: target calls, with the variance the rule's coins give them. proposed, judged, accepted, rejected: drafts.
    risk: expected rejections with the coin averaged over the position's token, sum of P(judged) * TV: the same mean over
        texts of the target as `rejected`, with less variance; NaN where the log has no tv (risk for greedy drafting).
    judged_at, accepted_at: [T, length] by depth.
    """

    length: int
    tokens: Array
    calls: Array
    calls_variance: Array
    proposed: Array
    judged: Array
    accepted: Array
    rejected: Array
    rejected_variance: Array
    risk: Array
    judged_at: Array
    accepted_at: Array

    @property
    def acceptance_length(self) -> float:
        """Tokens per call, correction or bonus included, as a ratio of sums."""
        return float(self.tokens.sum() / self.calls.sum())

    @property
    def acceptance_at(self) -> Array:
        """[length] probability of acceptance at each depth given that it is judged; NaN where it never is."""
        judged = self.judged_at.sum(0)
        return np.divide(self.accepted_at.sum(0), judged, out=np.full(self.length, np.nan), where=judged > 0)


def replay(
    texts: Sequence[Text],
    length: int,
    drafting: Drafting = "sampled",
    verification: Verification = "token",
    *,
    first_drafted: bool = False,
) -> Replay:
    """Expected counts of every text at draft length `length` >= 1, exact given the text: see the module.

    One dynamic program over the start of calls, with first and second moments, O(N length) a text.

    >>> logs = Text(np.log([0.5, 0.5, 0.5, 0.5]), np.log([0.5, 0.25, 0.5, 0.1]))
    >>> once = replay([logs], 2)     # calls start at token 1 and 2, and at 3 or 4 unless their tokens were kept
    >>> round(float(once.calls[0]), 12), round(float(once.accepted[0] + once.calls[0]), 12)
    (2.5, 4.0)
    """
    if not texts:
        raise ValueError("texts must not be empty")
    positive_int("length", length)
    groups = [
        _Group(list(texts[i : i + GROUP]), length, drafting, verification, first_drafted).replay()
        for i in range(0, len(texts), GROUP)
    ]
    if len(groups) == 1:
        return groups[0]
    fields = [f for f in Replay.__dataclass_fields__ if f != "length"]
    return replace(groups[0], **{f: np.concatenate([getattr(g, f) for g in groups]) for f in fields})


def calls_pmf(
    text: Text,
    length: int,
    drafting: Drafting = "sampled",
    verification: Verification = "token",
    *,
    first_drafted: bool = False,
) -> Array:
    """[N + 1]: P(the text took k target calls | text), for k = 0 .. N. O(N^2 length).

    >>> calls_pmf(Text(np.log([0.5, 0.5, 0.5, 0.5]), np.log([0.5, 0.25, 0.5, 0.1])), 2).tolist()
    [0.0, 0.0, 0.5, 0.5, 0.0]
    """
    size, s = len(text), survival(text, length, drafting, verification)
    ends = np.append(s[:, :-1] - s[:, 1:], s[:, -1:], axis=1)
    if not first_drafted:
        ends[0] = np.eye(length + 1)[0]
    at = np.zeros((size + 1, size + 1))  # [token at which the next call starts, calls so far]
    at[0, 0] = 1.0
    for n in range(size):
        for k in range(length + 1):
            at[min(n + k + 1, size), 1:] += ends[n, k] * at[n, :-1]
    return at[size]


class _Group:
    """The texts of one padded array, and the dynamic program over them."""

    def __init__(
        self, texts: list[Text], length: int, drafting: Drafting, verification: Verification, first_drafted: bool
    ) -> None:
        self.texts, self.length, self.first = texts, length, first_drafted
        self.size = np.array([len(t) for t in texts])
        count, longest = len(texts), int(self.size.max())
        self.survival = np.ones((count, longest, length + 1))
        self.weight = np.full((count, longest), np.nan)
        for i, t in enumerate(texts):
            self.survival[i, : len(t)] = survival(t, length, drafting, verification)
            known = t.risk if drafting == "greedy" else t.tv if verification == "token" else None
            if known is not None:
                self.weight[i, : len(t)] = known
        if not first_drafted:
            self.survival[:, 0, 1:] = 0.0
        places = np.arange(longest)
        room = np.array([t.most for t in texts])[:, None] - places - 1
        self.proposed = np.where(places < self.size[:, None], np.clip(room, 0, length), 0.0)
        if not first_drafted:
            self.proposed[:, 0] = 0.0
        # of the proposed drafts those that lie within the text are what the log can speak of
        self.inside = np.minimum(self.proposed, np.maximum(self.size[:, None] - places, 0))

    def replay(self) -> Replay:
        length, s = self.length, self.survival
        starts, calls, rejected = self._moments()
        depth = np.arange(length)
        judged = starts[:, :, None] * s[:, :, :-1] * (depth < self.inside[:, :, None])
        accepted = starts[:, :, None] * s[:, :, 1:] * (depth < self.inside[:, :, None])
        reached = np.zeros((len(self.texts), s.shape[1] + length))
        for d in range(length):
            reached[:, d : d + s.shape[1]] += judged[:, :, d]
        reached = reached[:, : s.shape[1]]
        within = np.arange(s.shape[1]) < self.size[:, None]
        return Replay(
            length=length,
            tokens=self.size.astype(np.float64),
            calls=calls[0],
            calls_variance=np.maximum(calls[1] - calls[0] ** 2, 0.0),
            proposed=(starts * self.proposed).sum(1),
            judged=judged.sum((1, 2)),
            accepted=accepted.sum((1, 2)),
            rejected=rejected[0],
            rejected_variance=np.maximum(rejected[1] - rejected[0] ** 2, 0.0),
            risk=np.where(within, reached * self.weight, 0.0).sum(1),
            judged_at=judged.sum(1),
            accepted_at=accepted.sum(1),
        )

    def _moments(self) -> tuple[Array, Array, Array]:
        """P(a call starts at each token) [T, N]; first and second moments [2, T] of calls and of rejections."""
        count, longest, width = self.survival.shape
        # at[0]: probability; at[1:3]: moments of calls, at[3:5]: of rejections, each times that probability
        at = np.zeros((5, count, longest + width))
        at[0, :, 0] = 1.0
        ends = np.append(self.survival[..., :-1] - self.survival[..., 1:], self.survival[..., -1:], axis=2)
        depth = np.arange(width)
        for n in range(longest):
            now = at[:, :, n] * (n < self.size)
            # a call ends by a rejection unless its draft was kept whole (or was cut there by the end)
            failed = (depth < self.inside[:, n, None]).astype(np.float64)
            step = now[:, :, None] * ends[:, n]
            step[2] += 2 * step[1] + step[0]
            step[1] += step[0]
            step[4] += failed * (2 * step[3] + step[0])
            step[3] += failed * step[0]
            at[:, :, n + 1 : n + 1 + width] += step
        done = (np.arange(longest + width) >= self.size[:, None]).astype(np.float64)
        total = (at * done).sum(2)
        return at[0, :, :longest] * (np.arange(longest) < self.size[:, None]), total[1:3], total[3:5]

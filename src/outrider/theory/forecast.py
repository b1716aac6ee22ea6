"""From logs to a forecast: acceptance length, rejections and the best draft length, with intervals over prompts.

The samples of one prompt depend on each other and the tokens of one text even more, so every interval treats a prompt as
one observation: the delete-one-prompt jackknife of a ratio of sums, with Student's t of P - 1 degrees of freedom. An
interval over tokens would be several times too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from outrider.theory.checks import number, positive_int
from outrider.theory.replay import Array, Drafting, Replay, Text, Verification, acceptance, replay
from outrider.theory.speedup import BestLength, VerifyCost, call_cost

LENGTHS = tuple(range(1, 17))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval; the interval is NaN with fewer than two clusters."""

    value: float
    low: float
    high: float


def clustered_ratio(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, clusters: Sequence[str], level: float = 0.95
) -> Estimate:
    """sum(numerator) / sum(denominator) with its jackknife interval over clusters.

    Args:
        numerator, denominator: [T], one entry per text. clusters: the prompt of each text.
        level: coverage of the interval, in (0, 1).

    >>> e = clustered_ratio([2.0, 4.0, 3.0], [1.0, 2.0, 1.0], ["a", "b", "c"])
    >>> e.value, round(e.low, 3), round(e.high, 3)
    (2.25, 0.985, 3.515)
    """
    value, error, degrees = _jackknife(numerator, denominator, clusters)
    if not degrees:
        return Estimate(value, math.nan, math.nan)
    margin = error * float(stdtrit(degrees, 0.5 + 0.5 * number("level", level, 0.0, 1.0)))
    return Estimate(value, value - margin, value + margin)


def _sums(values: npt.ArrayLike, clusters: Sequence[str]) -> Array:
    """[P] sums of a per-text quantity over the texts of each cluster, in order of first appearance."""
    array = np.asarray(values, np.float64)
    if array.shape != (len(clusters),):
        raise ValueError(f"clusters must have one entry per text ({array.shape}), got {len(clusters)}")
    place = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    return np.bincount([place[c] for c in clusters], array, len(place)).astype(np.float64)


def _jackknife(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, clusters: Sequence[str]
) -> tuple[float, float, int]:
    """The ratio, its standard error and the degrees of freedom (0: no error can be given)."""
    top, bottom = _sums(numerator, clusters), _sums(denominator, clusters)
    if not bottom.sum() > 0:
        return math.nan, math.nan, 0
    value, count = float(top.sum() / bottom.sum()), len(top)
    left = bottom.sum() - bottom
    if count < 2 or not (left > 0).all():
        return value, math.nan, 0
    out = (top.sum() - top) / left
    return value, math.sqrt((count - 1) / count * ((out - out.mean()) ** 2).sum()), count - 1


@dataclass(frozen=True, slots=True)
class AtLength:
    """What one draft length would have done. Rejections are per text; `rejection` is the probability per judged draft.

    speedup: at the costs given; it inherits the interval of the acceptance length, none for the costs.
    """

    length: int
    acceptance_length: Estimate
    rejections: Estimate
    rejection: Estimate
    speedup: Estimate
    acceptance_at: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything the logs say about one way of drafting and verifying.

    rejections: per text when every draft reaches to its end and no token is a bonus, sum of TV: Yin et al., NeurIPS 2024,
    Theorem 1. acceptance: probability that a judged draft is accepted, averaged over all positions of the text.
    """

    drafting: Drafting
    verification: Verification
    texts: int
    prompts: int
    tokens: int
    acceptance: Estimate
    rejections: Estimate
    lengths: tuple[AtLength, ...]
    best: BestLength | None


def forecast(
    texts: Sequence[Text],
    drafting: Drafting = "sampled",
    verification: Verification = "token",
    *,
    lengths: Iterable[int] = LENGTHS,
    draft_cost: float | None = None,
    verify_cost: VerifyCost = 1.0,
    level: float = 0.95,
    first_drafted: bool = False,
) -> Forecast:
    """Replay the texts at every length and put intervals on what comes out.

    Args:
        draft_cost, verify_cost: of `outrider.theory.speedup`, in plain target forwards; None: speed-ups are NaN and there
            is no best length.

    >>> texts = [Text(np.log([0.5, 0.8, 0.9]), np.log([0.4, 0.9, 0.3]), prompt=str(i)) for i in range(3)]
    >>> f = forecast(texts, lengths=(1, 2), draft_cost=0.05)
    >>> [round(a.acceptance_length.value, 3) for a in f.lengths]
    [1.5, 1.5]
    """
    wanted = [positive_int("length", n) for n in lengths]
    if not wanted:
        raise ValueError("lengths must not be empty")
    clusters, sizes = [t.prompt for t in texts], np.array([len(t) for t in texts], np.float64)
    rows = []
    for n in wanted:
        r = replay(texts, n, drafting, verification, first_drafted=first_drafted)
        rows.append(
            _at_length(r, clusters, level, math.nan if draft_cost is None else call_cost(n, draft_cost, verify_cost))
        )
    top = max(rows, key=lambda row: row.speedup.value)
    best = BestLength(top.length, top.speedup.value) if top.speedup.value > 1 else BestLength(0, 1.0)
    losses = np.array([position_rejections(t, drafting).sum() for t in texts])
    per_token = clustered_ratio(losses, sizes, clusters, level)
    return Forecast(
        drafting=drafting,
        verification=verification,
        texts=len(texts),
        prompts=len(set(clusters)),
        tokens=int(sizes.sum()),
        acceptance=Estimate(1 - per_token.value, 1 - per_token.high, 1 - per_token.low),
        rejections=clustered_ratio(losses, np.ones(len(texts)), clusters, level),
        lengths=tuple(rows),
        best=None if draft_cost is None else best,
    )


def _at_length(r: Replay, clusters: list[str], level: float, cost: float) -> AtLength:
    length = clustered_ratio(r.tokens, r.calls, clusters, level)
    losses = expected_rejections(r)
    return AtLength(
        length=r.length,
        acceptance_length=length,
        rejections=clustered_ratio(losses, np.ones(len(losses)), clusters, level),
        rejection=clustered_ratio(losses, r.judged, clusters, level),
        speedup=Estimate(length.value / cost, length.low / cost, length.high / cost),
        acceptance_at=tuple(float(a) for a in r.acceptance_at),
    )


def expected_rejections(r: Replay) -> Array:
    """[T] expected rejections of each text: the variance-reduced number where the log has it for every text."""
    return r.rejected if np.isnan(r.risk).any() else r.risk


def position_rejections(text: Text, drafting: Drafting = "sampled") -> Array:
    """[N] probability that a draft judged at each position is rejected: TV or 1 - p(argmax q) if logged, else 1 - a_n.

    All three have the same mean over texts of the target (see `outrider.theory.replay`).
    """
    known = text.tv if drafting == "sampled" else text.risk
    return 1.0 - acceptance(text, drafting) if known is None else np.asarray(known, np.float64)


def by_domain(texts: Sequence[Text], drafting: Drafting = "sampled", level: float = 0.95) -> dict[str, Estimate]:
    """Rejection probability of each domain, in order of first appearance."""
    out = {}
    for domain in dict.fromkeys(t.domain for t in texts):
        mine = [t for t in texts if t.domain == domain]
        losses = [float(position_rejections(t, drafting).sum()) for t in mine]
        out[domain] = _unit(clustered_ratio(losses, [len(t) for t in mine], [t.prompt for t in mine], level))
    return out


def by_position(texts: Sequence[Text], drafting: Drafting = "sampled", level: float = 0.95) -> list[Estimate]:
    """Rejection probability at each position of the text, over the texts that reach it."""
    losses = [position_rejections(t, drafting) for t in texts]
    out = []
    for n in range(max(len(x) for x in losses)):
        here = [(float(x[n]), t.prompt) for x, t in zip(losses, texts, strict=True) if n < len(x)]
        out.append(_unit(clustered_ratio([v for v, _ in here], np.ones(len(here)), [c for _, c in here], level)))
    return out


def _unit(e: Estimate) -> Estimate:
    """The interval of a probability, cut to [0, 1]; NaN stays."""
    return Estimate(
        e.value, e.low if math.isnan(e.low) else max(e.low, 0.0), e.high if math.isnan(e.high) else min(e.high, 1.0)
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted and observed rejections of a run; `low` and `high` bound what an exact engine shows at this level."""

    predicted: float
    observed: float
    low: float
    high: float
    level: float

    @property
    def agrees(self) -> bool:
        return self.low <= self.observed <= self.high


def compare(
    texts: Sequence[Text],
    length: int,
    observed: float,
    tokens: float,
    prompts: int,
    drafting: Drafting = "sampled",
    *,
    verification: Verification = "token",
    same_prompts: bool = False,
    level: float = 0.99,
) -> Comparison:
    """Rejections of a run of `tokens` emitted tokens over `prompts` prompts, beside what the logs predict for it.

    predicted = tokens * (expected rejections per token of the logs). Both sides vary with the texts that were sampled, and
    the run with the coins of its rule, whose variance given the texts is exact.

    Args:
        verification: how the run judged its drafts: token by token, or as a block.
        same_prompts: the run decoded the logs' own prompts, equally often each. Then only the spread between the texts of
            one prompt counts, and the logs must hold at least two of each prompt. Otherwise the spread between prompts
            counts on both sides, and the interval is much wider.

    Raises:
        ValueError: when the logs hold too few prompts, or too few texts of a prompt, to estimate the spread.
    """
    r = replay(texts, length, drafting, verification)
    clusters, losses = [t.prompt for t in texts], expected_rejections(r)
    rate, error, degrees = _jackknife(losses, r.tokens, clusters)
    if not degrees:
        raise ValueError("texts must come from at least two prompts to give an interval")
    total, count = number("tokens", tokens, 0.0), positive_int("prompts", prompts)
    if same_prompts:
        within, degrees = _within(r.rejected - rate * r.tokens, clusters)
        size = float(r.tokens.mean())
        variance = within / size**2 * (1 / len(texts) + size / max(total, 1.0))
    else:
        spread = _sums(r.rejected - rate * r.tokens, clusters)
        variance = error**2 + float(spread.var(ddof=1)) / float(_sums(r.tokens, clusters).mean()) ** 2 / count
    coins = float(r.rejected_variance.sum() / r.tokens.sum()) / max(total, 1.0)
    middle, margin = rate * total, total * math.sqrt(variance + coins) * float(stdtrit(degrees, 0.5 + 0.5 * level))
    low = max(0.0, middle - margin)
    return Comparison(middle, number("observed", observed, 0.0), low, middle + margin, level)


def _within(values: Array, clusters: Sequence[str]) -> tuple[float, int]:
    """Pooled variance of values within clusters, and its degrees of freedom."""
    count = _sums(np.ones(len(values)), clusters)
    if (count < 2).any():
        raise ValueError("texts must hold at least two of every prompt to compare with a run on the same prompts")
    squares = _sums(values**2, clusters) - _sums(values, clusters) ** 2 / count
    degrees = int(count.sum()) - len(count)
    return float(squares.sum()) / degrees, degrees

"""The alternatives an audit bets on: what a generator would emit if it made a known mistake.

Each is a *direction*: a distribution over the vocabulary for every position, computed before the position's token is looked at,
from the target's and the draft's distributions there. A fault of strength w emits (1 - w) p + w a. With r the residual
max(p - q, 0), normalised, and m = sum min(p, q), speculative sampling emits min(p, q) + (1 - m) r = p; each mistake changes one of
these parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from outrider.evaluate.statistics.eprocess import Component
from outrider.params import SamplingParams
from outrider.sampling.pipeline import LogitsPipeline
from outrider.types import SequenceView

DistributionTensor = Float[Tensor, "n V"]

WORDS: dict[str, str] = {
    "leak": "drafts are kept too often: the distribution leaks toward the draft's",
    "residual from the target": "corrections are drawn from the target's distribution instead of the residual",
    "residual from the draft": "corrections are drawn from the draft's distribution instead of the residual",
    "residual argmax": "corrections are the most likely token of the residual instead of a draw from it",
    "greedy draft judged as sampled": "drafts are the draft's most likely token but are judged as if drawn from its distribution",
    "draft law unprocessed": "drafts are drawn from the raw draft distribution and judged by the processed one, or conversely",
    "lenience": "drafts are accepted at a multiple of p / q",
    "stale row": "tokens are judged by the target's distribution at the position before",
    "temperature": "the temperature is off",
    "greedy bias": "the most likely token comes too often",
    "truncation": "the tail is cut although nothing asked for it",
    "parameter ignored": "a sampling parameter of the request has no effect",
    "end suppressed": "the end-of-sequence token comes too rarely",
    "repeated noise": "samples that should be independent repeat each other",
    "shared noise": "tokens of low or high number come too often, as when draws share a random number",
    "unexplained": "tokens of some rank, or with some ratio of draft to target, come too often; no named fault fits better",
}
"""Families of alternatives in words. The families are keys of the audit's document and keep their names."""

NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": (),
}
"""Sampling parameters and the values at which they do nothing."""


@dataclass(slots=True)
class Scene:
    """All an alternative may look at: the positions of one text. n positions, V tokens.

    logits, draft: [n, V] logits of target and draft (None: no draft is known). prompt, output: the text.
    earlier: earlier samples of the same prompt. eos: tokens that end a text.
    """

    logits: DistributionTensor
    draft: DistributionTensor | None
    prompt: list[int]
    output: list[int]
    params: SamplingParams
    pipeline: LogitsPipeline
    earlier: list[list[int]] = field(default_factory=list)
    eos: tuple[int, ...] = ()

    def distributions(self, logits: DistributionTensor, params: SamplingParams) -> DistributionTensor:
        """float64 distributions of logits at these positions under some parameters; rows sum to one."""
        view = SequenceView(0, 0, self.prompt, len(self.prompt), 0, params)
        needs = params.edits or params.min_tokens > 0
        paths = [tuple(self.output[:i]) if needs else () for i in range(len(logits))]
        p = self.pipeline(logits, [view] * len(logits), paths).double()
        return p / p.sum(1, keepdim=True)


class Candidates:
    """The distributions of a scene, each computed when first asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @cached_property
    def p(self) -> DistributionTensor:
        """What the text should be drawn from."""
        return self.scene.distributions(self.scene.logits, self.scene.params)

    @cached_property
    def q(self) -> DistributionTensor:
        """The draft distribution under the same parameters."""
        assert self.scene.draft is not None
        return self.scene.distributions(self.scene.draft, self.scene.params)

    @cached_property
    def raw_q(self) -> DistributionTensor:
        """The draft distribution before any parameter."""
        assert self.scene.draft is not None
        return self.scene.draft.double().softmax(-1)

    @cached_property
    def both(self) -> DistributionTensor:
        """min(p, q)."""
        return torch.minimum(self.p, self.q)

    @cached_property
    def residual(self) -> DistributionTensor:
        """max(p - q, 0), normalised; p itself where nothing is left."""
        return normalised(self.p - self.q, self.p)


def normalised(weight: DistributionTensor, otherwise: DistributionTensor) -> DistributionTensor:
    """The positive part as a distribution; rows of `otherwise` where it has no mass."""
    weight = weight.clamp(min=0)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 1e-12, weight / total.clamp(min=1e-300), otherwise)


def point(index: Tensor, like: DistributionTensor) -> DistributionTensor:
    """Point masses at `index`."""
    return one_hot(index, like.shape[1]).to(like.dtype)


def judged(
    x: Candidates, drawn: DistributionTensor, declared: DistributionTensor, lenient: float = 1.0
) -> DistributionTensor:
    """What is emitted when drafts from `drawn` are accepted with min(1, p / (lenient * declared)), else max(p - declared, 0)."""
    accept = torch.where(declared > 0, x.p / (lenient * declared).clamp(min=1e-300), 1.0).clamp(max=1.0)
    kept = drawn * accept
    return kept + (1.0 - kept.sum(1, keepdim=True)).clamp(min=0) * normalised(x.p - declared, x.p)


def corrected(x: Candidates, correction: DistributionTensor) -> DistributionTensor:
    """min(p, q) plus a correction drawn from somewhere else than the residual."""
    return x.both + (1.0 - x.both.sum(1, keepdim=True)) * correction


def repeated(x: Candidates) -> DistributionTensor:
    """The token an earlier sample had here, where the two agree so far; p elsewhere."""
    out = x.p.clone()
    for other in x.scene.earlier[-1:]:
        for i in range(min(len(out), len(other))):
            out[i] = 0.0
            out[i, other[i]] = 1.0
            if other[i] != x.scene.output[i]:
                break
    return out


def stale(x: Candidates) -> DistributionTensor:
    """The target distribution at the position before."""
    return torch.cat([x.p[:1], x.p[:-1]])


def without_end(x: Candidates) -> DistributionTensor:
    """p without the tokens that end a text."""
    weight = x.p.clone()
    weight[:, list(x.scene.eos)] = 0.0
    return normalised(weight, x.p)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A direction with its name."""

    component: Component
    distribution: Callable[[Candidates], DistributionTensor]


def alternatives(params: SamplingParams, *, draft: bool, eos: Sequence[int], repeats: bool) -> list[Alternative]:
    """All that make sense for these parameters. draft: its distributions are known. repeats: prompts are sampled more than once."""
    out = [*of_target(params), *(of_draft(params) if draft else ())]
    if eos and not params.ignore_eos:
        out.append(_alternative("end suppressed", "never", without_end))
    if repeats:
        out.append(_alternative("repeated noise", "as the sample before", repeated))
    return out


def of_target(params: SamplingParams) -> list[Alternative]:
    """Mistakes that need no draft."""

    def under(**changes: object) -> Callable[[Candidates], DistributionTensor]:
        other = replace(params, **changes)
        return lambda x: x.scene.distributions(x.scene.logits, other)

    out = [
        _alternative("temperature", f"{f:g} times the stated one", under(temperature=params.temperature * f))
        for f in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0)
    ]
    out.append(_alternative("greedy bias", "the most likely token", lambda x: point(x.p.argmax(1), x.p)))
    out.append(_alternative("stale row", "one row late", stale))
    if params.top_p == 1.0:
        out += [_alternative("truncation", f"as by top_p {c:g}", under(top_p=c)) for c in (0.8, 0.9, 0.95)]
    if params.top_k == 0:
        out += [_alternative("truncation", f"as by top_k {k}", under(top_k=k)) for k in (5, 20, 50)]
    for name, neutral in NEUTRAL.items():
        if getattr(params, name) != neutral:
            out.append(_alternative("parameter ignored", name, under(**{name: neutral})))
    return out


def of_draft(params: SamplingParams) -> list[Alternative]:
    """Mistakes in how drafts are drawn, judged and corrected."""
    out = [
        _alternative("leak", "the draft distribution", lambda x: x.q),
        _alternative("residual from the target", "p", lambda x: corrected(x, x.p)),
        _alternative("residual from the draft", "q", lambda x: corrected(x, x.q)),
        _alternative("residual argmax", "argmax", lambda x: corrected(x, point(x.residual.argmax(1), x.p))),
        _alternative("greedy draft judged as sampled", "argmax q", lambda x: judged(x, point(x.q.argmax(1), x.p), x.q)),
    ]
    out += [_alternative("lenience", f"p / ({c:g} q)", lambda x, c=c: judged(x, x.q, x.q, c)) for c in (0.3, 0.5, 0.8)]
    if any(getattr(params, name) != neutral for name, neutral in NEUTRAL.items()):
        kind = "draft law unprocessed"
        out.append(_alternative(kind, "drawn processed, judged raw", lambda x: judged(x, x.q, x.raw_q)))
        out.append(_alternative(kind, "drawn raw, judged processed", lambda x: judged(x, x.raw_q, x.q)))
    return out


def _alternative(family: str, label: str, distribution: Callable[[Candidates], DistributionTensor]) -> Alternative:
    assert family in WORDS
    return Alternative(Component(family, label), distribution)


RANKS = (0, 1, 2, 5, 10, 20, 50)
RATIOS = (0.05, 0.2, 0.5, 0.8, 1.25, 2.0, 5.0, 20.0)


QUANTILES = 8


def quantile_cells(x: Candidates) -> Tensor:
    """[n, V] cell of each token by the middle of its piece of the cumulative distribution: where an inverse-CDF draw would land."""
    middle = x.p.cumsum(1) - 0.5 * x.p
    return (middle * QUANTILES).long().clamp(0, QUANTILES - 1)


def rank_cells(x: Candidates) -> Tensor:
    """[n, V] cell of each token by its rank under p: the first, the second, up to fifth, ..."""
    rank = x.p.argsort(dim=1, descending=True).argsort(dim=1)
    return torch.bucketize(rank, torch.tensor(RANKS[1:], device=rank.device), right=True)


def ratio_cells(x: Candidates) -> Tensor:
    """[n, V] cell of each token by q / p."""
    ratio = torch.where(x.p > 0, x.q / x.p.clamp(min=1e-300), 1.0)
    return torch.bucketize(ratio, torch.tensor(RATIOS, dtype=ratio.dtype, device=ratio.device))

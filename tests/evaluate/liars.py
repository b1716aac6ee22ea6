"""Engines that lie: toy targets behind the real engine, with one planted mistake each, for the audit to catch and name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.evaluate.audit.sources import Emission, Source, of_engine
from outrider.models.toy import TableTarget
from outrider.noise import Noise
from outrider.params import SamplingParams
from outrider.protocols import Rule
from outrider.types import Draft, Verdict

VOCAB, LENGTH, EOS = 24, 4, 3
TARGET = TableTarget.random(VOCAB, seed=5, sharp=1.5)
DRAFT = TARGET.perturbed(1.0, 6)
PLAIN = SamplingParams(max_tokens=50, ignore_eos=True)
PROMPTS = [[1 + i % (VOCAB - 1), (7 * i) % VOCAB] for i in range(20)]


def min_ratio(p: Tensor, q: Tensor, x: int) -> float:
    return min(1.0, float(p[x] / q[x]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


@dataclass(frozen=True)
class PlainRule:
    """Speculative sampling on chains, read slowly, with its parts exchangeable: honest as it stands."""

    accept: Callable[[Tensor, Tensor, int], float] = min_ratio
    correct: Callable[[Tensor, Tensor], Tensor] = residual
    stale: bool = False
    coin: str = "accept"
    name: str = "liar"
    lossless: bool = True
    trees: bool = False
    lane: str = "draft"
    tv_limit: float = 0.0

    def __call__(self, p: Tensor, draft: Draft, noise: Noise, allowance: Sequence[float] | None = None) -> Verdict:
        b_count = len(draft.counts)
        paths, last, judged = [], [], []
        for b in range(b_count):
            path, row, weight, depth = [], p[b], None, 0
            for d in range(draft.counts[b]):
                k, depth = draft.offsets[b] + d, d + 1
                q = (
                    onehot(draft.tokens[k])
                    if draft.q is None
                    else draft.q.dense([draft.q.row[k]], p.shape[1])[0].to(p.dtype)
                )
                if noise.uniform(b, depth, self.coin) >= self.accept(row, q, draft.tokens[k]):
                    weight = self.correct(row, q)
                    break
                path.append(k)
                row = p[b] if self.stale else p[b_count + k]
            weight = row if weight is None else weight
            u = noise.uniform(b, len(path) + 1, "final" if self.coin == "accept" else self.coin)
            cumulative = weight.double().cumsum(0)
            last.append(int(torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp(max=len(row) - 1)))
            paths.append(tuple(path))
            judged.append(depth if depth else 0)
        zeros = (0.0,) * b_count
        return Verdict(tuple(paths), tuple(last), tuple(judged), zeros, zeros, zeros)


def engine(rule: Rule, *, sample: str = "sampled", eos: tuple[int, ...] = (), target=TARGET, draft=DRAFT) -> Engine:
    drafter = ModelDrafter(draft, LENGTH, sample=sample)
    return Engine(target, drafter, rule, Fixed(LENGTH), slots=16, max_length=128, eos=eos)


def onehot(i: int) -> Tensor:
    out = torch.zeros(VOCAB, dtype=torch.float64)
    out[i] = 1.0
    return out


@dataclass(frozen=True)
class Liar:
    """What it does wrong, the family that must be named, and how the text was asked for."""

    name: str
    family: str
    source: Callable[[SamplingParams], Source]
    params: SamplingParams = PLAIN
    eos: tuple[int, ...] = ()
    also: tuple[str, ...] = field(default=())


def ruled(**parts: object) -> Callable[[SamplingParams], Source]:
    return lambda params: of_engine(engine(PlainRule(**parts)), params)  # type: ignore[arg-type]


def asked(**changes: object) -> Callable[[SamplingParams], Source]:
    """An honest engine that runs with other parameters than it was asked for."""
    return lambda params: of_engine(engine(PlainRule()), replace(params, **changes))


def same_seed(params: SamplingParams) -> Source:
    """Every second sample ignores its seed and repeats the first."""
    honest = of_engine(engine(PlainRule()), params)
    return lambda prompts, seeds: honest(prompts, [s - (s - 1) % 2 for s in seeds])


def greedy_drafts(params: SamplingParams) -> Source:
    """Drafts are the draft's most likely token, but declared as drawn from its distribution."""
    drafter = ModelDrafter(DRAFT, LENGTH)
    inner = drafter.draft

    def draft(evidence, budget):
        made = inner(evidence, budget)
        if made.q is None or not made.parent:
            return made
        token = made.q.probs[list(made.q.row)].argmax(-1)
        return replace(made, token=token)

    drafter.draft = draft  # type: ignore[method-assign]
    one = Engine(TARGET, drafter, PlainRule(), Fixed(1), slots=16, max_length=128)
    return of_engine(one, params)


def one_more(params: SamplingParams) -> Source:
    """Goes on behind the end token."""
    honest = of_engine(engine(PlainRule(), eos=(EOS,)), params)

    def run(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Emission]:
        return [Emission((*e.tokens, 1) if e.tokens[-1] == EOS else e.tokens) for e in honest(prompts, seeds)]

    return run


def blend(w: float) -> Callable[[Tensor, Tensor, int], float]:
    return lambda p, q, x: w + (1 - w) * min_ratio(p, q, x)


STOPPING = replace(PLAIN, ignore_eos=False)
LIARS = [
    Liar("keeps every draft", "leak", ruled(accept=lambda p, q, x: 1.0)),
    Liar("keeps refused drafts in one of five cases", "leak", ruled(accept=blend(0.2)), also=("lenience",)),
    Liar("correction from p", "residual from the target", ruled(correct=lambda p, q: p)),
    Liar("correction from q", "residual from the draft", ruled(correct=lambda p, q: q), also=("leak",)),
    Liar("correction is the residual's argmax", "residual argmax", ruled(correct=lambda p, q: onehot(int((p - q).argmax())))),
    Liar("accepts at twice the ratio", "lenience", ruled(accept=lambda p, q, x: min(1.0, float(2 * p[x] / q[x]))), also=("leak",)),
    Liar("greedy drafts, declared as sampled", "greedy draft judged as sampled", greedy_drafts),
    Liar("every node judged by the anchor's law", "stale row", ruled(stale=True), also=("leak", "unexplained")),
    Liar("temperature 0.8", "temperature", asked(temperature=0.8)),
    Liar("temperature 1.25", "temperature", asked(temperature=1.25)),
    Liar("top-p 0.9 though not asked", "truncation", asked(top_p=0.9)),
    Liar("top-k 5 though not asked", "truncation", asked(top_k=5)),
    Liar("top-k ignored", "parameter ignored", asked(top_k=0), replace(PLAIN, top_k=8)),
    Liar("penalty ignored", "parameter ignored", asked(repetition_penalty=1.0), replace(PLAIN, repetition_penalty=1.5)),
    Liar("one token in ten is greedy", "greedy bias", lambda params: greedy_sometimes(params)),
    Liar("second sample repeats the first", "repeated noise", same_seed),
    Liar("end token forbidden", "end suppressed", asked(logit_bias={EOS: -100.0}), STOPPING, (EOS,)),
    Liar("text behind the end", "", one_more, STOPPING, (EOS,)),
    Liar("acceptance and correction share a number", "shared noise", ruled(coin="final")),
]  # fmt: skip


def greedy_sometimes(params: SamplingParams) -> Source:
    """Draws from the target by hand; every tenth token is the most likely one."""

    def run(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Emission]:
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            noise, text = torch.Generator().manual_seed(seed), list(prompt)
            for _ in range(params.max_tokens):
                distribution = TARGET.distribution(text)
                greedy = float(torch.rand(1, generator=noise)) < 0.15
                text.append(
                    int(distribution.argmax()) if greedy else int(torch.multinomial(distribution, 1, generator=noise))
                )
            out.append(Emission(tuple(text[len(prompt) :])))
        return out

    return run


def src_honest(prompt: Sequence[int], seed: int, count: int) -> list[int]:
    """Draws from the target by hand, without the engine."""
    noise, text = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(count):
        text.append(int(torch.multinomial(TARGET.distribution(text), 1, generator=noise)))
    return text[len(prompt) :]

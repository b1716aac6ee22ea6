"""How many tokens a draft model should keep: what it costs in acceptance and gains in time, foretold from measurements.

Acceptance is computed, not guessed: on text of the target that the ranking of tokens has not seen, the mean of sum min(p, q) with
the draft's distribution over all tokens and over the kept ones alone. Tokens per step are those of `theory.replay` along that
text: where the text needs tokens that are not kept, several in a row are rejected, and a step there earns less than the mean
acceptance says. Times are measured on this machine: of forwards, and of what is done with as many probabilities as there are
tokens (a softmax and a draw for a drafted token, a softmax and a rule for a verification), which is the same for any part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from outrider.models.restricted import Restricted
from outrider.models.token_use import TokenUse, logits_on
from outrider.protocols import Target
from outrider.theory.replay import Drafting, Text, replay
from outrider.types import Draft, Rows

SMALLEST = 1024
"""The fewest tokens that `auto` considers."""
PAYS = 1.02
"""The least gain that `auto` takes: less is within what times of forwards vary by."""
ROUNDS = 7
"""Steps that are timed."""
READ = 16
"""Tokens in the cache of a timed forward."""
LEAST_LOG = -100.0
"""Of the probability of a token that was drawn: it is not zero, though a forward of the whole text may say so."""


@dataclass(frozen=True, slots=True)
class Earned:
    """What drafts earn. acceptance: at temperature 1. agreement: the same at temperature 0. sampled, greedy: tokens per step."""

    acceptance: float
    agreement: float
    sampled: float
    greedy: float


@dataclass(frozen=True, slots=True)
class Costs:
    """One vocabulary. kept: its tokens. seconds: of a token's draft."""

    kept: int
    earned: Earned
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What keeping fewer tokens is expected to do. target: seconds of a verification of `length` drafted tokens."""

    full: Costs
    reduced: Costs
    target: float
    length: int

    @property
    def gains(self) -> tuple[float, float]:
        """Tokens per second over those with all tokens, at temperatures 1 and 0."""
        ours, theirs = (self.target + self.length * c.seconds for c in (self.reduced, self.full))
        r, f = self.reduced.earned, self.full.earned
        return r.sampled / f.sampled * theirs / ours, r.greedy / f.greedy * theirs / ours

    def sentence(self, name: str) -> str:
        """For users."""
        f, r = self.full.earned, self.reduced.earned
        sampled, greedy = self.gains
        return (
            f"{name} drafts with {self.reduced.kept:,} of {self.full.kept:,} tokens: predicted acceptance {r.acceptance:.3f} "
            f"instead of {f.acceptance:.3f} ({r.agreement:.3f} instead of {f.agreement:.3f} at temperature 0), {r.sampled:.2f} "
            f"tokens a step instead of {f.sampled:.2f} ({r.greedy:.2f} instead of {f.greedy:.2f}), "
            f"{1e3 * self.reduced.seconds:.2f} ms a drafted token instead of {1e3 * self.full.seconds:.2f}, "
            f"{sampled:.2f} times the speed at length {self.length} ({greedy:.2f} at temperature 0), on text like that which "
            f"ranked the tokens"
        )


def choose(
    target: Target, draft: Target, use: TokenUse, wanted: int | None, length: int, name: str
) -> tuple[Restricted | None, Prediction]:
    """The draft with `wanted` tokens, or with the number that promises most (None); and what was predicted of it.

    The model is None where `wanted` is None and no number of tokens pays at both temperatures: the prediction is then of the best.
    Raises as `Restricted`.
    """
    order = use.order[use.order < min(draft.vocab_size, target.vocab_size)]
    sizes = [min(wanted, len(order))] if wanted is not None else sizes_of(len(order))
    probe = Restricted(draft, order[: sizes[0]], name)
    times = token_times(draft, probe, target, length, 1 if sizes[0] == len(order) else len(order) / sizes[0])
    found = curve(target, draft, use, [*sizes, len(order)], length)
    full = Costs(draft.vocab_size, found[-1], times.full)
    every = [
        Prediction(full, Costs(n, at, times.of(n / len(order))), times.target, length)
        for n, at in zip(sizes, found[:-1], strict=True)
    ]
    best = max(every, key=lambda p: min(p.gains))
    if wanted is None and min(best.gains) < PAYS:
        return None, best
    made = probe if best.reduced.kept == sizes[0] else Restricted(draft, order[: best.reduced.kept], name)
    again = times if made is probe else token_times(draft, made, target, length, 1)
    return made, replace(best, reduced=replace(best.reduced, seconds=again.part))


def sizes_of(vocab_size: int) -> list[int]:
    """Numbers of tokens that are compared: powers of two below the vocabulary; half of a small one."""
    found = [SMALLEST << k for k in range(20) if SMALLEST << k < vocab_size]
    return found or [max(1, vocab_size // 2)]


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Seconds of a drafted token with all tokens and with one `ratio`-th of them, and of a verification."""

    full: float
    part: float
    ratio: float
    target: float

    def of(self, share: float) -> float:
        """Seconds with a share of the tokens: a head's time is in proportion to its rows."""
        if self.ratio <= 1:
            return self.part
        slope = (self.full - self.part) / (1 - 1 / self.ratio)
        return self.part + slope * (share - 1 / self.ratio)


@torch.inference_mode()
def token_times(draft: Target, part: Target, target: Target, length: int, ratio: float) -> TokenTimes:
    """Measured with one sequence as in steps: a verification, then a draft of `length` tokens, whose weights the verification has
    driven out of the caches; the two drafts in turn, so that a busy moment does not decide. Medians."""
    verify = _timed(target, length + 1)
    full, reduced = (_timed(m, 1) for m in (draft, part))
    spent = np.array([[verify(), _total(full, length), verify(), _total(reduced, length)] for _ in range(ROUNDS + 1)])
    target_, whole, _, cut = np.median(spent[1:], 0).tolist()  # the first round prepares
    return TokenTimes(whole / length, cut / length, ratio, target_)


def _total(call: Callable[[], float], times: int) -> float:
    return sum(call() for _ in range(times))


def _timed(model: Target, rows: int) -> Callable[[], float]:
    """Makes a forward of so many scored rows behind READ tokens, does what follows it, and gives its seconds."""
    kv = model.new_kv(1, READ + rows)
    first = Rows.assemble([0], [[0] * READ], [0], Draft.empty(0, model.device), [False])
    model.forward(first, kv)
    kv.commit(first, [()])
    tree = Draft.join([([0] * (rows - 1), list(range(-1, rows - 2)))], device=model.device)
    asked = Rows.assemble([0], [[0]], [READ], tree)

    def call() -> float:
        began = time.perf_counter()
        _follow(model.forward(asked, kv).logits)
        spent = time.perf_counter() - began
        kv.truncate(0, READ)
        return spent

    return call


def _follow(logits: Float[Tensor, "n V"]) -> int:
    """As much work as drawing a drafted token is, of one row; of more rows as judging a draft of all but one of them is."""
    p = torch.softmax(logits, -1)
    if len(p) > 1:
        torch.minimum(p[1:], p[:-1]).sum(-1).tolist()
    return int(torch.searchsorted(p[-1].double().cumsum(-1), 0.5))  # tokens are drawn by running sums


@torch.inference_mode()
def curve(target: Target, draft: Target, use: TokenUse, sizes: Sequence[int], length: int) -> list[Earned]:
    """For every size what drafts of `length` earn with the first so many tokens of the ranking, on unseen text."""
    width = min(draft.vocab_size, target.vocab_size)
    order = use.order[use.order < width].to(target.device)
    place = torch.full((target.vocab_size,), len(order), device=target.device).index_copy_(
        0, order, torch.arange(len(order), device=target.device)
    )
    sums, positions = torch.zeros(len(sizes), 2, dtype=torch.float64), 0
    logs: list[list[Text]] = [[] for _ in sizes]
    for text in use.unseen:
        p = torch.softmax(logits_on(target, text, use.prompt), -1)
        logits = logits_on(draft, text, use.prompt)[:, :width].to(p.device)
        likeliest, emitted = p.argmax(-1), text[use.prompt :].to(p.device)
        known, at = _logs(p.gather(1, emitted[:, None])[:, 0]), place[emitted]
        p, logits = p[:, order], logits[:, order]
        for i, size in enumerate(sizes):
            q = torch.softmax(logits[:, :size], -1)
            sums[i, 0] += torch.minimum(p[:, :size], q).sum().item()
            hit = order[q.argmax(-1)] == likeliest
            sums[i, 1] += hit.sum().item()
            said = torch.where(at < size, q.gather(1, at.clamp(max=size - 1)[:, None])[:, 0], 0.0)
            logs[i].append(Text(known, _logs(said), hit.cpu().numpy(), limit=len(emitted) + length + 1))
        positions += len(p)
    return [
        Earned(a / positions, b / positions, _tokens(found, length, "sampled"), _tokens(found, length, "greedy"))
        for (a, b), found in zip(sums.tolist(), logs, strict=True)
    ]


def _logs(p: Float[Tensor, "n"]) -> np.ndarray:
    """Natural logarithms of probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(np.nan_to_num(p.double().cpu().numpy()).clip(max=1.0))


def _tokens(texts: list[Text], length: int, drafting: Drafting) -> float:
    """Tokens per step along these texts. Greedy drafts are judged by the target's likeliest tokens, on text that was drawn."""
    return replay(texts, length, drafting, "block", first_drafted=True).acceptance_length

"""How many tokens a draft model should keep: what it costs in acceptance and gains in time, foretold from measurements.

Acceptance is computed, not guessed: on text of the target that the ranking of tokens has not seen, the mean of sum min(p, q) with
the draft's distribution over all tokens and over the kept ones alone. Times are those of forwards on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from outrider.models.restricted import Restricted
from outrider.models.token_use import TokenUse, logits_on
from outrider.protocols import KVCache, Target
from outrider.theory import speedup
from outrider.types import Draft, Rows

SMALLEST = 1024
"""The fewest tokens that `auto` considers."""
PAYS = 1.02
"""The least gain that `auto` takes: less is within what times of forwards vary by."""
ROUNDS = 7
"""Forwards that are timed; the fastest counts."""
READ = 16
"""Tokens in the cache of a timed forward."""


@dataclass(frozen=True, slots=True)
class Costs:
    """One vocabulary. kept: its tokens. acceptance: at temperature 1. agreement: the same at temperature 0. seconds: of a token's
    draft."""

    kept: int
    acceptance: float
    agreement: float
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
        return self._gain("acceptance"), self._gain("agreement")

    def _gain(self, name: str) -> float:
        ours, theirs = (
            speedup.speedup(min(1.0, getattr(c, name)), self.length, c.seconds / self.target)
            for c in (self.reduced, self.full)
        )
        return ours / theirs

    def sentence(self, name: str) -> str:
        """For users."""
        f, r = self.full, self.reduced
        sampled, greedy = self.gains
        return (
            f"{name} drafts with {r.kept:,} of {f.kept:,} tokens: predicted acceptance {r.acceptance:.3f} instead of "
            f"{f.acceptance:.3f} ({r.agreement:.3f} instead of {f.agreement:.3f} at temperature 0), {1e3 * r.seconds:.2f} "
            f"ms a drafted token instead of {1e3 * f.seconds:.2f}, {sampled:.2f} times the speed at length {self.length} "
            f"({greedy:.2f} at temperature 0)"
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
    found = curve(target, draft, use, [*sizes, len(order)])
    full = Costs(draft.vocab_size, *found[-1], times.full)
    every = [
        Prediction(full, Costs(n, *at, times.of(n / len(order))), times.target, length)
        for n, at in zip(sizes, found[:-1], strict=True)
    ]
    best = max(every, key=lambda p: min(p.gains))
    if wanted is None and min(best.gains) < PAYS:
        return None, best
    made = probe if best.reduced.kept == sizes[0] else Restricted(draft, order[: best.reduced.kept], name)
    seconds = _seconds(made, made.new_kv(1, READ + length + 1), 1)
    return made, replace(best, reduced=replace(best.reduced, seconds=seconds))


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


def token_times(draft: Target, part: Target, target: Target, length: int, ratio: float) -> TokenTimes:
    """Measured with one sequence; the two drafts in turn, so that a busy moment does not decide."""
    room = READ + length + 1
    caches = [m.new_kv(1, room) for m in (draft, part)]
    pairs = [[_seconds(m, kv, 1, rounds=1) for m, kv in zip((draft, part), caches, strict=True)] for _ in range(ROUNDS)]
    full, reduced = (min(column) for column in zip(*pairs, strict=True))
    return TokenTimes(full, reduced, ratio, _seconds(target, target.new_kv(1, room), length + 1))


@torch.inference_mode()
def _seconds(model: Target, kv: KVCache, rows: int, rounds: int = ROUNDS) -> float:
    """Seconds of a forward of so many scored rows behind READ tokens, softmax included: the fastest of some."""
    if not kv.length[0]:
        first = Rows.assemble([0], [[0] * READ], [0], Draft.empty(0, model.device), [False])
        model.forward(first, kv)
        kv.commit(first, [()])
    tree = Draft.join([([0] * (rows - 1), list(range(-1, rows - 2)))], device=model.device)
    asked, spent = Rows.assemble([0], [[0]], [READ], tree), list[float]()
    for _ in range(rounds + 1):  # the first one prepares
        began = time.perf_counter()
        torch.softmax(model.forward(asked, kv).logits, -1).sum().item()
        spent.append(time.perf_counter() - began)
        kv.truncate(0, READ)
    return min(spent[1:])


@torch.inference_mode()
def curve(target: Target, draft: Target, use: TokenUse, sizes: Sequence[int]) -> list[tuple[float, float]]:
    """For every size the acceptance at temperatures 1 and 0 with the first so many tokens of the ranking, on unseen text."""
    width = min(draft.vocab_size, target.vocab_size)
    order = use.order[use.order < width].to(target.device)
    sums, positions = torch.zeros(len(sizes), 2, dtype=torch.float64), 0
    for text in use.unseen:
        p = torch.softmax(logits_on(target, text, use.prompt), -1)
        logits = logits_on(draft, text, use.prompt)[:, :width].to(p.device)
        likeliest, p = p.argmax(-1), p[:, order]
        logits = logits[:, order]
        for i, size in enumerate(sizes):
            q = torch.softmax(logits[:, :size], -1)
            sums[i, 0] += torch.minimum(p[:, :size], q).sum().item()
            sums[i, 1] += (order[q.argmax(-1)] == likeliest).sum().item()
        positions += len(p)
    return [(a / positions, b / positions) for a, b in sums.tolist()]

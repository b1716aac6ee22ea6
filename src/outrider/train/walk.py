"""Replays the decoding of finished text: the slots of a block drafter that would have been accepted, round by round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from outrider.drafters.dflash.network import DFlashNetwork

Accepts = Callable[
    [Float[Tensor, "n S V"], Int[Tensor, "n S"], Int[Tensor, "n S"], Int[Tensor, "n"]], Bool[Tensor, "n S"]
]
"""(logits, tokens of the text, their positions, rows) -> the slots that are accepted if those before them are."""


def most_likely(logits: Tensor, labels: Tensor, position: Tensor, row: Tensor) -> Tensor:
    """Greedy proposals: accepted where they equal the target's text, at any temperature of the text."""
    return logits.argmax(-1) == labels


def sampled(log_p: Float[Tensor, "r L"], uniform: Float[Tensor, "r L"]) -> Accepts:
    """Sampled proposals, given the resulting text: token x was accepted with probability min(1, q(x) / p(x)).

    Speculative sampling emits x as an accepted proposal with probability min(p(x), q(x)), and emits it with p(x) in all. log_p: of
    every token under the target at temperature 1. uniform: one number in (0, 1) for each; equal ones pair different drafters.
    """

    def accepts(logits: Tensor, labels: Tensor, position: Tensor, row: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
        at = row[:, None], position
        return uniform[at].log() + log_p[at] < log_q

    return accepts


@torch.no_grad()
def walk(
    model: DFlashNetwork,
    tokens: Int[Tensor, "r L"],
    taps: Float[Tensor, "r L T H"],
    first: int,
    accepts: Accepts,
    *,
    slots: int | None = None,
) -> list[list[int]]:
    """Replay finished rows: accepted tokens of every round of each row, without rounds that reach beyond the row.

    first: position of the first anchor, the first token that was written. slots: of a block, see `DFlashNetwork.blocks`. With
    `most_likely` on greedy text these are exactly the rounds of the engine; on sampled text, and with `sampled`, they have the
    distribution of the engine's rounds, because a drafter never changes the distribution of the text.
    """
    size, length = slots or model.config.block, tokens.shape[1]
    keys = model.inject(taps)
    runs: list[list[int]] = [[] for _ in tokens]
    at = torch.full((len(tokens),), first, dtype=torch.int64)
    while len(live := (at + size <= length).nonzero()[:, 0]):
        mine = [(k[live], v[live]) for k, v in keys] if len(live) < len(tokens) else keys
        place = at[live]
        logits = model.blocks(mine, tokens[live, place][:, None], place[:, None], slots=size)[:, 0]
        position = place[:, None] + torch.arange(1, size)
        good = accepts(logits, tokens[live[:, None], position], position, live)
        run = good.int().cumprod(1).sum(1)
        at[live] = place + run + 1
        for row, accepted in zip(live.tolist(), run.tolist(), strict=True):
            runs[row].append(accepted)
    return runs

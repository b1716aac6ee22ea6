"""Decoding of text that is finished already: what a block drafter would have had accepted there, round by round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from outrider.drafters.dflash.network import DFlashNetwork

Accepts = Callable[
    [Float[Tensor, "n S V"], Int[Tensor, "n S"], Int[Tensor, "n S"], Int[Tensor, "n"]], Bool[Tensor, "n S"]
]
"""(logits, tokens of the text, their positions, rows) -> which slots are accepted, given that those before them are."""


def most_likely(logits: Tensor, labels: Tensor, position: Tensor, row: Tensor) -> Tensor:
    """Greedy proposals: accepted where they are what the target wrote, at any temperature it wrote at."""
    return logits.argmax(-1) == labels


def sampled(log_p: Float[Tensor, "r L"], uniform: Float[Tensor, "r L"]) -> Accepts:
    """Sampled proposals, given the text that came of it: token x was accepted with probability min(1, q(x) / p(x)).

    Speculative sampling emits x as an accepted proposal with probability min(p(x), q(x)), and emits it with p(x) in all. log_p: of
    every token under the target at temperature 1. uniform: one number in (0, 1) for each; the same ones pair different drafters.
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
    """Decode rows that are written already: accepted tokens of every round of each row, rounds that leave the row left out.

    first: position of the first anchor, the first token that was written. slots: of a block, see `DFlashNetwork.blocks`. With
    `most_likely` on greedy text these are the very rounds of the engine; on sampled text, and with `sampled`, they have
    the distribution of the engine's: the text is what the target would have written, and a drafter never changes it.
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

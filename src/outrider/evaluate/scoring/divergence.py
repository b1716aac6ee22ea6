"""Are two greedy texts the same, and if not, was it rounding? The certificate of the first divergence (EX-6).

In bfloat16 a position scored alone and scored beside drafts may round differently, and where the two best logits are closer
than that rounding either token is a correct greedy choice. So a divergence is certified when, at its first position, the gap
between the two tokens' logits is at most twice the largest difference that batching makes on this model and machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.evaluate.scoring.score import first_difference
from outrider.protocols import Target
from outrider.types import Draft, Rows


@dataclass(frozen=True, slots=True)
class Divergence:
    """First position at which two outputs differ. gap: logit difference of the two tokens; delta: rounding by batching."""

    position: int
    tokens: tuple[int, int]
    gap: float
    delta: float

    @property
    def certified(self) -> bool:
        return self.gap <= 2 * self.delta


@torch.inference_mode()
def certify(
    target: Target, prompt: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], width: int = 5
) -> Divergence | None:
    """None if the greedy outputs agree; otherwise the first divergence with its margin.

    width: rows of a verification (draft length + 1). Logits at the position are taken in three ways: the way plain decoding
    does (one row behind a cached text), as the first and as the last row of `width` rows.
    """
    t = first_difference(a, b)
    if t is None:
        return None
    text = [*prompt, *a[:t]]
    views = [score_last(target, text, 1), score_last(target, text, min(width, len(text)))]
    views.append(score_last(target, [*text, *([a[t]] * (width - 1))], width, row=0))
    stacked = torch.stack(views)
    delta = float((stacked - stacked[0]).abs().max())
    gap = float(min((v[a[t]] - v[b[t]]).abs() for v in views))
    return Divergence(t, (a[t], b[t]), gap, delta)


def score_last(target: Target, text: list[int], width: int, *, row: int = -1, chunk: int = 256) -> torch.Tensor:
    """Logits [V] of one of the last `width` rows of `text`, scored together behind a cache that holds the rest."""
    kv = target.new_kv(1, len(text))
    head = len(text) - width
    for start in range(0, head, chunk):
        part = text[start : min(start + chunk, head)]
        rows = Rows.assemble([0], [part], [start], Draft.empty(0, target.device), [False])
        target.forward(rows, kv)
        kv.commit(rows, [[]])
    nodes = torch.tensor(text[head + 1 :], dtype=torch.int64, device=target.device)
    draft = Draft(nodes, tuple(range(-1, width - 2)), (width - 1,))
    rows = Rows.assemble([0], [[text[head]]], [head], draft)
    return target.forward(rows, kv).logits[row]

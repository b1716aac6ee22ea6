"""Catch up, then propose: a model's own cache, the tokens in it, and what they share with the true history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.protocols import Target
from outrider.types import Rows, Segment, SequenceView

STAND_IN = 0
"""What a model reads for a token it does not know."""


class TokenCache:
    """A model's KV cache together with the tokens it holds, slot by slot: history first, then drafts not yet judged.

    model: scores rows. slots, capacity: sequences and tokens of each. limit: most history tokens the model may be fed.

    A token that the model has no embedding for (of a target with a larger one) is kept as what it is and fed as STAND_IN: the
    model's view of the text is a little off, and what it declares of its drafts is true all the same.
    """

    def __init__(self, model: Target, slots: int, capacity: int, limit: int) -> None:
        self.model, self.limit = model, limit
        self.kv = model.new_kv(slots, capacity)
        self._ruler = torch.arange(max(capacity, slots), dtype=torch.int64, device=model.device)
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._sure = [0] * slots  # how many held tokens were seen to be history when last looked at

    def rewind(self, view: SequenceView) -> None:
        """Forget what is no history before its last token. Looks only at tokens that are new since the last call.

        The last token is left to be fed: a drafter needs the logits after it.
        """
        held, tokens, n = self.held[view.slot], view.tokens, self._sure[view.slot]
        if n > len(tokens) or (n and held[n - 1] != tokens[n - 1]):
            n = 0  # not the sequence it was: start over rather than draft from another one's text
        end = min(len(held), len(tokens) - 1)
        n = min(n, end)
        while n < end and held[n] == tokens[n]:
            n += 1
        if n < len(held):
            del held[n:]
            self.kv.truncate(view.slot, n)
        self._sure[view.slot] = n

    def ingest(self, views: Sequence[SequenceView], goal: Sequence[int], chunk: int) -> None:
        """Feed history in full chunks while a sequence lacks more than a chunk of its first `goal[i]` tokens."""
        while True:
            behind = [
                v for v, g in zip(views, goal, strict=True) if min(g, self.limit) - len(self.held[v.slot]) > chunk
            ]
            if not behind:
                return
            at = [len(self.held[v.slot]) for v in behind]
            pieces = [v.tokens[n : n + chunk] for v, n in zip(behind, at, strict=True)]
            self.append([v.slot for v in behind], pieces, scored=False)

    def append(
        self, slots: Sequence[int], pieces: Sequence[Sequence[int]], scored: bool = True
    ) -> Float[Tensor, "n V"]:
        """Feed and keep `pieces`, one per slot; the logits after the last token of each (no rows if not `scored`)."""
        rows = self._rows(slots, pieces, scored)
        logits = self.model.forward(rows, self.kv).logits
        self.kv.commit(rows, [()] * len(pieces))
        for slot, piece in zip(slots, pieces, strict=True):
            self.held[slot] += piece
        return logits

    def _rows(self, slots: Sequence[int], pieces: Sequence[Sequence[int]], scored: bool) -> Rows:
        """`Rows.assemble` for sequences without nodes. Cuts of a ruler spare the one-sequence case small tensors."""
        segments: list[Segment] = []
        token: list[int] = []
        for slot, piece in zip(slots, pieces, strict=True):
            segments.append(Segment(slot, len(token), len(self.held[slot]), len(piece), (), scored))
            token += piece
        n, rows, start = len(segments), len(token), segments[0].cached
        if n == 1:
            position, last = self._ruler[start : start + rows], self._ruler[rows - 1 : rows]
        else:
            position = self._tensor([p for s in segments for p in range(s.cached, s.cached + s.fed)])
            last = self._ruler[:n] if n == rows else self._tensor([s.first + s.fed - 1 for s in segments])
        return Rows(self._tensor(self.known(token)), position, tuple(segments), last if scored else last[:0])

    def known(self, tokens: list[int]) -> list[int]:
        """The tokens as the model can read them."""
        size = self.model.vocab_size
        return tokens if max(tokens, default=0) < size else [t if t < size else STAND_IN for t in tokens]

    def _tensor(self, x: list[int]) -> Int[Tensor, "n"]:
        return torch.tensor(x, dtype=torch.int64, device=self.model.device)

    def score(self, rows: Rows) -> Float[Tensor, "M V"]:
        """Logits of rows that start again at the last held token of each slot; their nodes are forgotten afterwards."""
        for s in rows.segments:
            self.kv.truncate(s.slot, s.cached)
        logits = self.model.forward(rows, self.kv).logits
        self.kv.commit(rows, [()] * len(rows.segments))
        return logits

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.kv.release(slots)
        for slot in slots:
            self.held[slot] = []
            self._sure[slot] = 0

"""A draft model's KV cache, the tokens in it, and how many of them agree with the sequence's history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.nn.ahead import Ahead
from outrider.protocols import Target
from outrider.types import Rows, Segment, SequenceView

CHUNK = 256
"""Most history tokens of one sequence that one draft forward catches up on."""
STAND_IN = 0
"""The token that a model reads in place of one outside its vocabulary."""


class TokenCache:
    """A model's KV cache together with the tokens it holds, slot by slot: history first, then drafts not yet verified.

    model: scores rows. slots, capacity: sequences and tokens of each. limit: most history tokens the model may be fed. memory:
    bytes that its pages may take; None: as many as there are.

    A token that the model has no embedding for (the target's vocabulary may be larger) is stored unchanged and fed as STAND_IN: the
    model reads a slightly different text, but the distributions it declares are still those its drafts were drawn from.
    """

    def __init__(self, model: Target, slots: int, capacity: int, limit: int, memory: int | None = None) -> None:
        self.model, self.limit = model, limit
        self.kv = model.new_kv(slots, capacity, **({} if memory is None else {"memory": memory}))
        self._shares = hasattr(self.kv, "share") and getattr(model, "uniform_rows", 0) >= CHUNK
        self._ruler = torch.arange(max(capacity, slots), dtype=torch.int64, device=model.device)
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._checked = [0] * slots  # how many held tokens were found equal to the history at the last check

    def rewind(self, view: SequenceView) -> None:
        """Drop held tokens that differ from the history before its last token. Checks only tokens new since the last call.

        The last token stays to be fed, since a drafter needs the logits after it. What the history holds is shared with the other
        slots: pages that they have of it are used, and its own are made known.
        """
        self._rewind(view)
        if self._shares and view.shares:
            held, salt = self.held[view.slot], view.params.cache_salt
            self.kv.publish(view.slot, view.tokens, salt)  # type: ignore[attr-defined]
            if len(view.tokens) - len(held) > 1:
                held += view.tokens[len(held) : self.kv.share(view.slot, view.tokens[: self.limit], salt)]  # type: ignore[attr-defined]

    def _rewind(self, view: SequenceView) -> None:
        held, tokens, n = self.held[view.slot], view.tokens, self._checked[view.slot]
        if n > len(tokens) or (n and held[n - 1] != tokens[n - 1]):
            n = 0  # another sequence: start over instead of drafting from the previous one's text
        end = min(len(held), len(tokens) - 1)
        n = min(n, end)
        while n < end and held[n] == tokens[n]:
            n += 1
        if n < len(held):
            del held[n:]
            self.kv.truncate(view.slot, n)
        self._checked[view.slot] = n

    @property
    def forks(self) -> bool:
        """Whether a slot can begin with what another one holds."""
        return hasattr(self.kv, "fork")

    def fork(self, source: int, goal: int, length: int) -> None:
        """Let a slot begin with up to `length` tokens of what another one holds; what it held is dropped."""
        held = self.held[source][:length]
        self.kv.fork(source, goal, len(held))  # type: ignore[attr-defined]
        self.held[goal], self._checked[goal] = held, min(self._checked[source], len(held))

    def affordable(self, views: Sequence[SequenceView], depths: Sequence[int], more: int) -> list[int | None]:
        """The same depths; None for sequences for which pages are lacking, whose own are given up: others can use them.

        more: rows behind a sequence's last token that a draft needs.
        """
        if not hasattr(self.kv, "lacking"):
            return list(depths)
        out: list[int | None] = []
        promised = 0
        for view, depth in zip(views, depths, strict=True):
            end = min(len(view.tokens) + more if depth else view.cached, self.kv.capacity)
            lacking = self.kv.lacking(view.slot, end)  # type: ignore[attr-defined]
            fits = promised + lacking <= self.kv.spare  # type: ignore[attr-defined]
            promised += lacking if fits else 0
            if not fits:
                self.release([view.slot])
            out.append(depth if fits else None)
        return out

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

    def ahead(self, slots: Sequence[int], more: Sequence[int]) -> Ahead | None:
        """Forwards that append more[i] tokens to the i-th of some slots, level by level; None where the model has none.
        `done` of the result keeps what was fed."""
        make = getattr(self.model, "ahead", None)

        def done(fed: list[list[int]]) -> None:
            for slot, piece in zip(slots, fed, strict=True):
                self.held[slot] += piece
                self.kv.length[slot] += len(piece)

        return None if make is None else make(self.kv, slots, more, done)

    def _rows(self, slots: Sequence[int], pieces: Sequence[Sequence[int]], scored: bool) -> Rows:
        """`Rows.assemble` for sequences without nodes. With one sequence, slices of `_ruler` save small tensors."""
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
        """Logits of rows that start again at the last held token of each slot; their nodes are dropped afterwards."""
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
            self._checked[slot] = 0

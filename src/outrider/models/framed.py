"""A target that writes images and nothing else: of its vocabulary, only image codes can be drawn, and marks where a row ends.

A model of text and images is trained to write codes where an image has begun, but gives other tokens some probability. Transformers
masks those in its own generation; here the mask is a part of the target, so that every rule, drafter and audit sees one
distribution.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from outrider.errors import RequestError
from outrider.protocols import KVCache, Target
from outrider.transfer import upload
from outrider.types import Rows, Scores

NEVER = torch.finfo(torch.float32).min
"""Logit of what cannot be drawn; finite, so that differences of logits stay numbers."""


def unbegun(mark: int) -> RequestError:
    """What is said of a text without the mark behind which an image begins."""
    return RequestError(f"no image begins in this text: end the prompt with token {mark}, as the model's own")


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """What an image is made of. codes: [V], whether a token is an image code. height, width: codes.

    row_end: the token behind every row of codes, None: none. begin: the token behind which an image begins, needed with row_end.
    """

    codes: Bool[Tensor, "V"]
    height: int
    width: int
    row_end: int | None = None
    begin: int | None = None

    @property
    def line(self) -> int:
        """Tokens of a row."""
        return self.width + (self.row_end is not None)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.height * self.line

    def codes_of(self, values: list) -> list:
        """Of one value for every token of an image, or of its beginning, those of codes."""
        return [value for place, value in enumerate(values) if place % self.line < self.width]


class Framed:
    """`inner` inside an image: implements `protocols.Target`.

    Where rows end with a mark, a cache must read its prompts itself (`prefix_cache=False`): the mark behind which an image begins
    is looked for among the rows.
    """

    def __init__(self, inner: Target, frame: Frame) -> None:
        self.inner, self.frame = inner, frame
        self.vocab_size, self.hidden_size, self.layers = inner.vocab_size, inner.hidden_size, inner.layers
        self.max_length, self.trees, self.rewinds = inner.max_length, inner.trees, inner.rewinds
        self.dtype, self.device, self.notices = inner.dtype, inner.device, inner.notices
        self.token_bytes = getattr(inner, "token_bytes", 0)
        self._codes = frame.codes.to(inner.device)
        self._begin: MutableMapping[KVCache, dict[int, int]] = WeakKeyDictionary()

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        """See `protocols.Target`."""
        return self.inner.new_kv(slots, length, **({} if memory is None else {"memory": memory}))

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`. Raises RequestError for a text in which no image begins."""
        found = self.inner.forward(rows, kv, layers=layers)
        logits = found.logits.where(self._allowed(rows, kv), NEVER)
        return Scores(logits, found.hidden, found.replayed)

    def _allowed(self, rows: Rows, kv: KVCache) -> Bool[Tensor, "M V"]:
        """What may follow each scored row."""
        frame = self.frame
        if frame.row_end is None:
            return self._codes[None]
        begins = self._begin.setdefault(kv, {})
        for s in rows.segments:
            if s.cached == 0:  # another text than the one that had the slot before
                begins.pop(s.slot, None)
            places = (rows.token[s.first : s.first + s.fed] == frame.begin).nonzero()
            if len(places):
                begins[s.slot] = int(rows.position[s.first + int(places[-1])]) + 1
        if any(s.scored and s.slot not in begins for s in rows.segments):
            raise unbegun(frame.begin or 0)
        first = [begins.get(s.slot, 0) for s in rows.segments for _ in range(s.count)]
        behind = rows.position + 1 - upload(first, torch.int64, rows.position.device)
        ends = behind[rows.scored] % frame.line == frame.width
        mark = torch.arange(self.vocab_size, device=self.device) == frame.row_end
        return torch.where(ends[:, None], mark[None], self._codes[None])

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        """See `protocols.Target`."""
        return self.inner.embed(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """See `protocols.Target`: without the mask, which a place decides."""
        return self.inner.unembed(hidden)

"""A draft model that scores a part of its vocabulary: its head has the rows of the kept tokens alone.

With a vocabulary of 100,000 tokens and more most of a small draft model's pass is its head. Tokens that the target hardly uses
cost as much as the others, and are hardly ever accepted; without their rows the pass is shorter. Its distributions are those of the
kept tokens alone, and declared so, and the output keeps the target distribution; what the target puts on other tokens cannot
be accepted (FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import KVCache, OpenTarget, Target
from outrider.types import Rows, Scores

Head = Callable[[Float[Tensor, "n H"]], Float[Tensor, "n K"]]
"""Logits of the kept tokens, in order, from normed hidden states."""


class Restricted:
    """`model` with logits of the tokens `kept` only: implements `protocols.Target`; those of other tokens are minus infinity.

    kept: [K] different tokens, any order. It reads every token. A model that has `head_of` gives its head's rows; of any other one
    with an open head the whole head is computed and columns are picked, which saves nothing.
    predicted: what was foretold of it (`vocabulary_choice.Prediction`), if anything was.
    Raises CapabilityError for a model without an open head, ConfigError for tokens that it does not have.
    """

    def __init__(self, model: Target, kept: Int[Tensor, "K"], name: str = "the draft") -> None:
        if isinstance(model, Restricted):
            raise CapabilityError(f"{name} has a restricted vocabulary already: restrict the model itself")
        if not isinstance(model, OpenTarget):
            raise CapabilityError(
                f"the head of {name} cannot be cut, since a {type(model).__name__} does not show it: leave draft_vocabulary out"
            )
        tokens = kept.to(model.device, torch.int64)
        if (
            not len(tokens)
            or len(tokens.unique()) != len(tokens)
            or tokens.min() < 0
            or tokens.max() >= model.vocab_size
        ):
            raise ConfigError(
                f"the kept tokens must be different ones of the {model.vocab_size:,} of {name}, at least one"
            )
        self.model, self.kept, self.vocab_size = model, tokens, model.vocab_size
        self.hidden_size, self.layers, self.max_length = model.hidden_size, model.layers, model.max_length
        self.trees, self.rewinds, self.dtype, self.device = model.trees, model.rewinds, model.dtype, model.device
        self.uniform_rows, self.token_bytes = getattr(model, "uniform_rows", 0), getattr(model, "token_bytes", 0)
        self.notices: tuple[str, ...] = ()
        self.predicted: object | None = None
        make = getattr(model, "head_of", None)
        self._head: Head = (lambda normed: model.head(normed)[:, tokens]) if make is None else make(tokens)

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        return self.model.new_kv(slots, length, **({} if memory is None else {"memory": memory}))

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """As the model's, which computes no logits of its own: the last block's hidden states of the scored rows go to the head."""
        plain = tuple(replace(s, scored=False) if s.scored else s for s in rows.segments)
        unscored = replace(rows, segments=plain, scored=rows.scored[:0])
        if not len(rows.scored):
            return self.model.forward(unscored, kv, layers=layers)
        scores = self.model.forward(unscored, kv, layers=(*layers, self.layers))
        last = scores.hidden[-1]
        whole = len(rows.scored) == len(last) == 1
        return Scores(self.unembed(last if whole else last[rows.scored]), scores.hidden[:-1], scores.replayed)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self.model.embed(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        found = self._head(self.model.norm(hidden))  # type: ignore[attr-defined]
        out = found.new_full((len(found), self.vocab_size), -torch.inf)
        return out.index_copy_(1, self.kept, found)

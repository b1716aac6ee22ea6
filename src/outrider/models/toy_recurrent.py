"""A toy target with a state that cannot be cut, and an exactly known distribution.

It is a `toy.TableTarget` that reads the history through a state as models of transformers keep it: the newest tokens in a
tensor that is overwritten in place, all of them in a tensor that grows, and a number beside them. So a snapshot that was not
taken, was taken too late, or shares what is overwritten, shows in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapabilityError
from outrider.models.states import StateCaches
from outrider.models.toy import TableTarget
from outrider.protocols import KVCache
from outrider.types import Rows, Scores

GROWING = {(0, "text"): 0}


class State:
    """What the toy keeps of a text: its newest tokens, all of them, and how many there are."""

    def __init__(self, order: int) -> None:
        self.newest = torch.zeros(order, dtype=torch.int64)
        self.text: Tensor = torch.zeros(0, dtype=torch.int64)
        self.count = 0

    def read(self, token: int) -> list[int]:
        """Add a token; returns the newest of the text, oldest first, 0 where it had not begun. The last but one is taken from the
        text, the others from `newest`."""
        self.newest.copy_(self.newest.roll(-1))
        self.newest[-1] = token
        self.text = torch.cat([self.text, self.newest[-1:]])
        self.count += 1
        history = self.newest.tolist()
        if len(history) > 1 and self.count > 1:
            history[-2] = int(self.text[-2])
        return history


class RecurrentTarget:
    """`table` with a recurrent state: implements `protocols.Target` for chains.

    by_token: it continues a state by one token a call, as some models do. calls: how often a state was read on so far.
    """

    trees, rewinds, layers = False, True, 1
    notices: tuple[str, ...] = ()

    def __init__(self, table: TableTarget, *, by_token: bool = False) -> None:
        self.table, self.by_token, self.calls = table, by_token, 0
        self.vocab_size = self.hidden_size = table.vocab_size
        self.max_length, self.dtype, self.device = table.max_length, table.dtype, table.device

    def distribution(self, history: Sequence[int]) -> Float[Tensor, "V"]:
        """The exact next-token distribution after `history`."""
        return self.table.distribution(history)

    def perturbed(self, scale: float, seed: int) -> TableTarget:
        """See `TableTarget.perturbed`: a related model without a state."""
        return self.table.perturbed(scale, seed)

    def new_kv(self, slots: int, length: int) -> KVCache:
        return StateCaches(slots, length, GROWING)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        assert isinstance(kv, StateCaches)
        kv.replayed = 0
        token, found = rows.token.tolist(), list[Tensor]()
        for s in rows.segments:
            mine = token[s.first : s.first + s.count]
            for behind, piece in kv.calls(s, mine, self.by_token):
                logits = self._read(kv, s.slot, behind + mine[piece])
                found += logits[len(behind) :]
        every = torch.stack(found)
        taps = {0: self.embed(rows.token), 1: every}
        return Scores(every[rows.scored], tuple(taps[i] for i in layers), kv.replayed)

    def _read(self, kv: StateCaches, slot: int, tokens: list[int]) -> list[Tensor]:
        """The logits after each of these tokens, which go through the slot's state."""
        out: list[Tensor] = []

        def read(state: State | None) -> State:
            state = State(self.table.order) if state is None else state
            for token in tokens:
                history = state.read(token)
                out.append(self.table.table[(min(state.count, len(self.table.table)) - 1, *history)])
            return state

        self.calls += 1
        kv.advance(slot, read, len(tokens))
        return out

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self.table.embed(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return hidden

    def first_layers(self, layers: int) -> RecurrentTarget:
        """See `protocols.OpenTarget`: its state belongs to all layers together."""
        raise CapabilityError(
            "a target whose state cannot be cut cannot be run in part: use a separate draft model, or 'ngram'"
        )

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        return hidden

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return normed

"""One forward of sequential heads: by the compiled decoder, or its twin in torch's operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.nn.ahead import Ahead
from outrider.nn.held import Rounding, library_for
from outrider.nn.linear import with_fast_linears
from outrider.nn.sequential import NativeSequence


@runtime_checkable
class Forward(Protocol):
    """A level: `forward` of its tokens, behind hidden states of the target (the first level) or states of the level above."""

    def forward(
        self,
        token: Sequence[int],
        *,
        taps: Float[Tensor, "K n H"] | None = None,
        state: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V"]]:
        """States of the rows, and logits behind their tokens."""
        ...


def forward_of(model: SequentialNetwork, rounding: Rounding | None = None) -> Forward:
    """The fastest forward here. rounding: of matrices, where they are multiplied natively."""
    library = library_for(model.fc.weight)
    return TorchForward(model) if library is None else NativeForward(library, model, rounding=rounding)


class NativeForward:
    """Compiled heads. narrow: products in bfloat16."""

    def __init__(
        self, library: ctypes.CDLL, model: SequentialNetwork, *, narrow: bool = True, rounding: Rounding | None = None
    ) -> None:
        c = model.config
        blocks = [
            (b.norm.weight, torch.cat([b.mlp.gate_proj.weight, b.mlp.up_proj.weight]), b.mlp.down_proj.weight)  # type: ignore[union-attr]
            for b in model.layers
        ]
        table = torch.cat([model.rows(part) for part in torch.arange(c.vocab_size).split(1 << 12)])
        self._run = NativeSequence(
            library, model.fc.weight, table, blocks, model.norm.weight, model.lm_head.weight, len(c.taps), c.eps,  # type: ignore[arg-type]
            narrow=narrow, rounding=rounding,
        )  # fmt: skip

    def forward(
        self,
        token: Sequence[int],
        *,
        taps: Float[Tensor, "K n H"] | None = None,
        state: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V"]]:
        return self._run.forward(token, taps=taps, state=state)

    def ahead(self, state: Float[Tensor, "n D"]) -> Ahead:
        """Forwards of a chain's levels, see `nn.sequential.NativeSequence.ahead`."""
        return self._run.ahead(state)


class TorchForward:
    """The twin: rows of tokens in a table, products packed."""

    def __init__(self, model: SequentialNetwork) -> None:
        vocab, device = model.config.vocab_size, model.fc.weight.device
        self._model, self._dtype = with_fast_linears(model), model.fc.weight.dtype
        self._tokens = model.rows(torch.arange(vocab, device=device))
        del self._model.embed_tokens, self._model.token  # what they give is in the table

    def forward(
        self,
        token: Sequence[int],
        *,
        taps: Float[Tensor, "K n H"] | None = None,
        state: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V"]]:
        if taps is not None:
            state = self._model.read(taps.transpose(0, 1).to(self._dtype))
        assert state is not None
        state = self._model.level(self._tokens[torch.tensor(token, device=state.device)], state)
        return state, self._model.logits(state)

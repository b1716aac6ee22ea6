"""One forward of an EAGLE network: by the compiled decoder, or its twin in torch's operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.eagle.network import EagleNetwork
from outrider.nn import rope
from outrider.nn.ahead import Ahead
from outrider.nn.attention import attend
from outrider.nn.draft_heads import NativeHeads
from outrider.nn.drafts import NativeLayers, Rows
from outrider.nn.held import Rounding, library_for
from outrider.nn.layers import FusedLayer
from outrider.nn.linear import with_fast_linears
from outrider.nn.masks import ancestor_mask
from outrider.nn.row_cache import RowCache


@runtime_checkable
class Forward(Protocol):
    """dtype: of the cache's keys and values."""

    @property
    def dtype(self) -> torch.dtype: ...

    def forward(
        self,
        rows: Rows,
        cache: RowCache,
        *,
        taps: Sequence[Tensor] = (),
        tap_rows: Sequence[int] = (),
        feature: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "m V"]]:
        """States of all rows and logits of the scored ones, see `nn.drafts.NativeLayers`."""
        ...

    def logits(self, state: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits after rows with these states: the same as those of their forward."""
        ...


def forward_of(model: EagleNetwork, length: int, rounding: Rounding | None = None) -> Forward:
    """The fastest forward here. length: rows of a slot. rounding: of matrices, where they are multiplied natively."""
    library = library_for(model.fc.weight)
    if library is None or not model.shape.fits:
        return TorchForward(model, length)
    return NativeForward(library, model, rounding=rounding)


class NativeForward:
    """Compiled layers and head."""

    def __init__(
        self, library: ctypes.CDLL, model: EagleNetwork, *, narrow: bool = True, rounding: Rounding | None = None
    ) -> None:
        c, (norm, head, support) = model.config, model.output
        table = model.embed_tokens.weight
        self._layers = NativeLayers(
            library, model.shape, list(model.layers), table, norm, head, model.features, support,
            narrow=narrow, rounding=rounding,
        )  # fmt: skip
        self._head = NativeHeads(library, norm, c.eps, [()], [self._layers.head], c.vocab_size, support, narrow=narrow)
        self.dtype, self._width = self._layers.dtype, c.hidden

    def forward(
        self,
        rows: Rows,
        cache: RowCache,
        *,
        taps: Sequence[Tensor] = (),
        tap_rows: Sequence[int] = (),
        feature: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "m V"]]:
        state = torch.empty(len(rows.token), self._width)
        return state, self._layers.forward(rows, cache, taps=taps, tap_rows=tap_rows, feature=feature, out=state)

    def logits(self, state: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        return self._head(state)[0]

    def ahead(
        self,
        cache: RowCache,
        slots: Sequence[int],
        position: Sequence[int],
        states: Sequence[Float[Tensor, "D"]],
        logits: Float[Tensor, "r V"],
    ) -> Ahead:
        """Forwards of a chain's levels, see `nn.drafts.NativeLayers.ahead`. Their rows are the draft's: nothing is kept."""
        return self._layers.ahead(cache, slots, position, states, logits)


class TorchForward:
    """The twin: weights fused for serving, positions in a table, attention per sequence."""

    def __init__(self, model: EagleNetwork, length: int) -> None:
        c, device = model.config, model.fc.weight.device
        self.config, self.model, self.layer = c, with_fast_linears(model), FusedLayer.of(model.layers[0])
        self.dtype, self.logits = model.fc.weight.dtype, self.model.logits
        self._tokens = model.rows(torch.arange(c.vocab_size, device=device))
        del self.model.embed_tokens  # what they give is in the table
        self._turns = rope.table(rope.frequencies(c.head_dim, c.rope_theta, device), length).to(self.dtype)

    def forward(
        self,
        rows: Rows,
        cache: RowCache,
        *,
        taps: Sequence[Tensor] = (),
        tap_rows: Sequence[int] = (),
        feature: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "m V"]]:
        if feature is None:
            feature = self.model.read(tapped(taps, tap_rows).to(self.dtype))
        residual, q, k, v = self._enter(rows, feature)
        state = self.layer.leave(attend_rows(rows, cache, q, k, v), residual)
        scored = list(rows.scored)
        return state, self.logits(state if scored == list(range(len(state))) else state[scored])

    def _enter(self, rows: Rows, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`EagleNetwork.enter` for flat rows."""
        c, device = self.config, g.device
        token, position = torch.tensor(rows.token, device=device), torch.tensor(rows.position, device=device)
        residual, x = self.model.join(self._tokens[token], g)
        x = self.layer.qkv(x).view(len(token), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = x.split((c.heads + c.kv_heads, c.kv_heads), 1)
        if self.layer.qk_norm is not None:
            qk = self.layer.qk_norm(qk)
        q, k = rope.rotate(qk, *rope.angles(self._turns, position)).split((c.heads, c.kv_heads), 1)
        return residual, q, k, v


def tapped(taps: Sequence[Tensor], tap_rows: Sequence[int]) -> Float[Tensor, "n K H"]:
    """The rows of the target's hidden states that are read, K side by side."""
    hidden = torch.stack(list(taps), 1)
    every = list(tap_rows) == list(range(len(hidden)))
    return hidden if every else hidden[list(tap_rows)]


def attend_rows(
    rows: Rows,
    cache: RowCache,
    q: Float[Tensor, "n h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    scale: float | None = None,
) -> Float[Tensor, "n A"]:
    """Write the rows' keys and values and let every row see its sequence's cached ones and its own ancestors."""
    seen, first = [], 0
    for slot, cached, fed, parents, skipped in rows.segments:
        n = fed + len(parents) - skipped
        mine, start = slice(first, first + n), cached + skipped
        keys, values = cache.write(0, slot, start, k[mine], v[mine])
        seen.append(_attend(q[mine], keys, values, _mask(n, cached, list(parents), q.device), scale))
        first += n
    return seen[0] if len(seen) == 1 else torch.cat(seen)


def _mask(n: int, cached: int, parents: list[int], device: torch.device) -> Tensor | None:
    """What the last n rows see: a chain behind cached rows, or nodes; None for all."""
    if not parents:
        return ancestor_mask(n, (), cached).to(device) if n > 1 else None
    if n == 1 and parents == list(range(-1, len(parents) - 1)):
        return None
    return ancestor_mask(0, parents, cached, last=n).to(device)


def _attend(
    q: Float[Tensor, "n h d"],
    keys: Float[Tensor, "g m d"],
    values: Float[Tensor, "g m d"],
    see: Tensor | None,
    scale: float | None,
) -> Float[Tensor, "n A"]:
    return attend(q.transpose(0, 1), keys, values, see, scale=scale).transpose(0, 1).reshape(len(q), -1)

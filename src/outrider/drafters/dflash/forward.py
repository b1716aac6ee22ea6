"""Forwards of a block drafter's network: by the compiled decoder, or their twin in torch's operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.dflash.network import DFlashNetwork
from outrider.nn.attention import attend
from outrider.nn.drafts import DraftShape, Features, Join, NativeLayers, Rows
from outrider.nn.held import Rounding, library_for
from outrider.nn.layers import FusedLayer
from outrider.nn.linear import draft_linear, with_fast_linears
from outrider.nn.rope import frequencies, turn
from outrider.nn.row_cache import RowCache


@runtime_checkable
class Forward(Protocol):
    """dtype: of the cache's keys and values."""

    @property
    def dtype(self) -> torch.dtype: ...

    def inject(self, rows: Rows, cache: RowCache, taps: Sequence[Tensor], tap_rows: Sequence[int]) -> None:
        """Write the keys and values of rows `tap_rows` of the target's hidden states; tokens of the rows are not read."""
        ...

    def block(self, rows: Rows, cache: RowCache) -> Float[Tensor, "m V"]:
        """Logits of the scored rows; a segment is a block, whose rows see each other and the injected ones."""
        ...


def forward_of(model: DFlashNetwork, length: int, rounding: Rounding | None = None) -> Forward:
    """The fastest forward here. length: rows of a slot. rounding: of matrices, where they are multiplied natively."""
    library = library_for(model.fc.weight)
    if library is None or not shape_of(model).fits:
        return TorchForward(model, length)
    return NativeForward(library, model, rounding=rounding)


def shape_of(model: DFlashNetwork) -> DraftShape:
    """Its sizes as the compiled decoder knows them."""
    c = model.config
    theta = frequencies(c.head_dim, c.rope_theta)
    return DraftShape(c.vocab_size, c.hidden, c.heads, c.kv_heads, c.head_dim, c.inner, c.eps, theta)


class NativeForward:
    """Compiled layers and head."""

    def __init__(
        self, library: ctypes.CDLL, model: DFlashNetwork, *, narrow: bool = True, rounding: Rounding | None = None
    ) -> None:
        c = model.config
        features = Features(len(c.taps), c.hidden, Join.ALONE, model.fc.weight, fused_norm=model.hidden_norm.weight)
        table, head = model.embed_tokens.weight, model.lm_head.weight
        self._layers = NativeLayers(
            library, shape_of(model), list(model.layers), table, model.norm.weight, head, features,
            narrow=narrow, rounding=rounding,
        )  # fmt: skip
        self.dtype = self._layers.dtype

    def inject(self, rows: Rows, cache: RowCache, taps: Sequence[Tensor], tap_rows: Sequence[int]) -> None:
        self._layers.forward(rows, cache, taps=taps, tap_rows=tap_rows)

    def block(self, rows: Rows, cache: RowCache) -> Float[Tensor, "m V"]:
        return self._layers.forward(rows, cache)


class TorchForward:
    """The twin: fused layers, angles in a table, attention per sequence."""

    def __init__(self, model: DFlashNetwork, length: int) -> None:
        attention: list[Any] = [layer.self_attn for layer in model.layers]
        self._model, self._net, self.dtype = model, with_fast_linears(model), model.fc.weight.dtype
        self._layers = [FusedLayer.of(layer) for layer in model.layers]
        self._k_norms = [a.k_norm for a in attention]
        self._inject = draft_linear(torch.cat([w for a in attention for w in (a.k_proj.weight, a.v_proj.weight)]))
        self._device = model.fc.weight.device
        self._angles = model.rotation(torch.arange(length, device=self._device))

    def inject(self, rows: Rows, cache: RowCache, taps: Sequence[Tensor], tap_rows: Sequence[int]) -> None:
        c, hidden = self._model.config, torch.stack(list(taps), 1)[list(tap_rows)].flatten(1)
        context = self._net.hidden_norm(self._net.fc(hidden.to(self.dtype)))
        kv = self._inject(context).view(len(context), c.layers, 2, c.kv_heads, c.head_dim)
        turns = self._turns(rows.position)
        for n, norm in enumerate(self._k_norms):
            kv[:, n, 0] = turn(norm(kv[:, n, 0]), *turns)
        first = 0
        for slot, cached, fed, _, _ in rows.segments:
            k, v = kv[first : first + fed].unbind(2)
            for n in range(c.layers):
                cache.write(n, slot, cached, k[:, n], v[:, n])
            first += fed

    def block(self, rows: Rows, cache: RowCache) -> Float[Tensor, "m V"]:
        turns, x = self._turns(rows.position), self._model.embed_tokens(self._long(rows.token))
        for n, layer in enumerate(self._layers):
            x = self._layer(n, layer, x, turns, rows, cache)
        return self._net.lm_head(self._net.norm(x[list(rows.scored)]))

    def _layer(
        self, n: int, layer: FusedLayer, x: Tensor, turns: tuple[Tensor, Tensor], rows: Rows, cache: RowCache
    ) -> Float[Tensor, "m H"]:
        c = self._model.config
        qkv = layer.qkv(layer.norm1(x)).view(len(x), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = qkv.split((c.heads + c.kv_heads, c.kv_heads), 1)
        qk = qk if layer.qk_norm is None else layer.qk_norm(qk)
        q, k = turn(qk, *turns).split((c.heads, c.kv_heads), 1)
        seen, first = [], 0
        for slot, cached, fed, _, _ in rows.segments:
            own = slice(first, first + fed)
            keys, values = cache.write(n, slot, cached, k[own], v[own])
            out = attend(q[own].transpose(0, 1), keys, values)
            seen.append(out.transpose(0, 1).reshape(fed, -1))
            first += fed
        return layer.leave(seen[0] if len(seen) == 1 else torch.cat(seen), x)

    def _turns(self, position: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions."""
        at = self._long(position)
        cos, sin = self._angles
        return cos[at], sin[at]

    def _long(self, x: Sequence[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int64, device=self._device)

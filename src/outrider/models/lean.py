"""Our own decoder runtime for the families of `families.py`: the fast twin of `models/hf/target.py`.

Weights that share an input are fused, linear layers are packed for few rows, keys and values lie in a static cache,
rotary tables are static, rows are flat. If the native decoder (`models/native`) can be built, it scores short segments,
and only long prompts go through the layers here, one at a time: so a sequence's numbers do not depend, bit for bit, on
the other sequences.

The formulas are those of transformers' modelling files, with grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.errors import CapabilityError, RequestError
from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights, unpacked
from outrider.models.expert_use import ExpertUse
from outrider.models.native import load_native
from outrider.nn import rope
from outrider.nn.ahead import Ahead
from outrider.nn.attention import AttentionPlan, capped
from outrider.nn.experts import SparseLayer, expert_mlp
from outrider.nn.kv import PagedKV, page_limit
from outrider.nn.layers import FusedLayer, Norm, of_rows, rms_norm
from outrider.nn.linear import Linear, has_fast_matmul, make_linear
from outrider.nn.row_parts import check_prefix, run_parts
from outrider.nn.stored import Stored, entry_bytes, stored_as
from outrider.protocols import KVCache
from outrider.types import Rows, Scores

TIED_COPY_BYTES = 64 << 20
"""Largest tied embedding of which the head gets a separate packed copy."""


class LeanTarget:
    """Implements `protocols.Target` over `DecoderWeights`, for chains and trees.

    config:   the decoder's shape. weights: its weights, or a function that reads them: then no other code holds the plain
              ones while they are packed, and at most one block is in memory twice. Weights in blocks are multiplied by the compiled
              decoder alone; without it their values are, in their dtype.
    native:   whether to use the compiled decoder if available; float64 weights never do.
    notices:  sentences for the user about how this target was loaded.
    row_work: of a mixture of experts: a number of rows -> what they read relative to one row, measured while it decodes.
    """

    trees = True
    rewinds = True

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights | Callable[[], DecoderWeights],
        *,
        native: bool = True,
    ) -> None:
        w = weights() if callable(weights) else weights
        del weights
        self.config = config
        self.vocab_size, self.hidden_size, self.layers = config.vocab_size, config.hidden, config.layers
        self.max_length, self.dtype, self.device = config.max_length, w.dtype, w.norm.device
        self.stored: Stored = stored_as("auto", self.dtype, config.head_dim)
        self.views = not any(config.window)  # a window is counted in positions, which a view leaves out
        self.native, found = load_native(config, w) if native else (None, [])
        self.notices: tuple[str, ...] = tuple(found)
        self.row_work = self._use_of_experts()
        # if PyTorch only emulates products of this dtype (bfloat16 on AVX2), the native decoder takes long prompts too
        self._native_rows = (
            self.native.max_rows if self.native and has_fast_matmul(self.dtype, self.device) else sys.maxsize
        )
        self._norm, self._ropes = _norm(config, w.norm, self.dtype), self._rope_tables(1)
        self._blocks: list[FusedLayer | SparseLayer] = []
        if w.packed and self.native is not None:
            self._rows, self._head = self.native.weights.embedding.rows, self.native.weights.head
            self._native_rows = sys.maxsize
            widened = sorted(set().union(*(linear.widened for linear in self.native.weights.linears)))
            if widened:
                why = f"weights of type {', '.join(widened)} have no products of their own here and are kept in float32"
                self.notices += (f"{why} (more memory, slower): take a file with bf16, q8_0, q6_k or q4_k",)
            return
        w = unpacked(w) if w.packed else w
        embedding, head = cast(Tensor, w.embedding), cast(Tensor, w.head)
        self._rows = lambda token: F.embedding(token, embedding)
        pack = self.native is None  # the native decoder reads the plain weights in place, and long prompts share them
        copy = head is not embedding or head.nbytes <= TIED_COPY_BYTES
        self._head = make_linear(head, pack=pack and copy)
        left = list(w.layers)
        del w
        while left:
            self._blocks.append(_block(config, len(self._blocks), left.pop(0), self.dtype, pack))

    @property
    def uniform_rows(self) -> int:
        """Forwards of up to so many rows per segment give every row the same bits, whatever is fed with it."""
        return self._native_rows if self.native else 0

    @property
    def step_bytes(self) -> tuple[float, float] | None:
        """Bytes of weights that a step of one row reads, and of keys and values for each cached token. None where the compiled
        decoder does not run, for experts, and for weights in blocks: there no time follows from them that was measured."""
        if self.native is None or self.config.experts is not None or not self._blocks:
            return None
        c = self.config
        numbers = self.layers * c.block_numbers + c.vocab_size * c.hidden
        return float(self.dtype.itemsize * numbers), float(self.token_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of a cached token's keys and values."""
        return 2 * self.layers * self.config.kv_heads * entry_bytes(self.stored, self.config.head_dim)

    def storing(self, kv_dtype: str) -> LeanTarget:
        """The same weights with keys and values stored as one of `nn.stored.KV_DTYPES`: another model, where that rounds them.
        Raises ConfigError for an unknown name and for heads that it does not fit."""
        other = copy.copy(self)
        other.stored = stored_as(kv_dtype, self.dtype, self.config.head_dim)
        return other

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> PagedKV:
        """A cache for `slots` sequences of `length` tokens each, drafts included. CapacityError if not even one of them fits.

        memory: bytes that it may take; None: what it could fill, or 90% of what is free, if that is less.
        """
        c = self.config
        limit = page_limit(slots, length, self.token_bytes, self.device, memory)
        self._grow_rope(length)
        sizes = c.layers, slots, c.kv_heads, length, c.head_dim
        return PagedKV(*sizes, self.dtype, self.device, limit=limit, stored=self.stored)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`. Raises CapabilityError for a layer that does not exist, CapacityError and RequestError for
        rows that do not fit the cache or the vocabulary.

        With the native decoder a mixed forward is split, short segments together and every long one alone, so that a
        sequence's numbers never depend on the others.
        """
        if not isinstance(kv, PagedKV):
            raise CapabilityError(f"LeanTarget cannot read a {type(kv).__name__}: make the cache with its new_kv()")
        if any(not 0 <= i <= self.layers for i in layers):
            raise CapabilityError(
                f"layers {layers} were asked for, this model has blocks 1 to {self.layers} (0: embeddings)"
            )
        kv.reserve(rows)
        cache, native = kv, self.native
        if native is None:
            return self._torch_forward(rows, cache, layers)
        long = [i for i, s in enumerate(rows.segments) if s.count > self._native_rows]
        if not long:
            scores = native.forward(rows, cache, layers)
            if self.row_work is not None and len(rows.segments) == 1:
                self.row_work.learn(rows.count, native.touched)
            return scores
        if len(rows.segments) == 1:
            return self._torch_forward(rows, cache, layers)
        groups = [([i], lambda part: self._torch_forward(part, cache, layers)) for i in long]
        short = [i for i, s in enumerate(rows.segments) if s.count <= self._native_rows]
        if short:
            groups.append((short, lambda part: native.forward(part, cache, layers)))
        return run_parts(rows, groups)

    def ahead(
        self, kv: KVCache, slots: Sequence[int], more: Sequence[int], done: Callable[[list[list[int]]], None]
    ) -> Ahead | None:
        """Forwards that append more[i] tokens to the i-th of some slots, level by level, see `NativeDecoder.ahead`; None without
        it."""
        if self.native is None or self.row_work is not None or not isinstance(kv, PagedKV):
            return None
        return self.native.ahead(kv, slots, more, done)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self._embedding(token).to(self.dtype)

    def _embedding(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        rows, scale = self._rows(token), self.config.scale_of_embeddings(self.dtype)
        return rows if scale == 1 else rows * scale

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """Final norm and output head, in float32 (float64 if the model is)."""
        return self.head(self.norm(hidden))

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """The final norm, in the model's dtype."""
        return self._norm(hidden.to(self.dtype))

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """The output head, in float32 (float64 if the model is)."""
        return self._logits(self._head, normed)

    def head_of(self, kept: Int[Tensor, "K"]) -> Callable[[Float[Tensor, "n H"]], Float[Tensor, "n K"]]:
        """`head` for the tokens `kept` alone, on a copy of their rows (of packed weights: of their values): a smaller product."""
        if self.native is not None:
            return partial(self._logits, self.native.head_of(kept))
        unit = torch.eye(self.hidden_size, dtype=self.dtype, device=self.device)
        return partial(self._logits, make_linear(self._head(unit).T[kept].to(self.dtype).contiguous()))

    def _logits(self, product: Linear, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n K"]:
        c, logits = self.config, product(normed.to(self.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if c.logit_scale == 1 else logits * c.logit_scale
        return capped(logits, c.logit_cap) if c.logit_cap else logits

    def first_layers(self, layers: int) -> LeanTarget:
        """See `protocols.OpenTarget`."""
        check_prefix(layers, self.layers)
        other = copy.copy(self)
        other.config = self.config.first_layers(layers)
        other.layers, other._blocks = layers, self._blocks[:layers]
        other.native = self.native and self.native.first_layers(other.config)
        other.row_work = other._use_of_experts()
        return other

    def _use_of_experts(self) -> ExpertUse | None:
        e = self.config.experts
        share = None if e is None or self.native is None else self.native.weights.expert_share(e.used, e.count)
        return ExpertUse.of(self.config, share)

    @torch.no_grad()
    def _torch_forward(self, rows: Rows, kv: PagedKV, layers: tuple[int, ...]) -> Scores:
        """All rows in one pass through PyTorch's operators.

        The blocks run in inference mode, where views cost half; the outputs are made outside of it, as ordinary tensors.
        """
        self._grow_rope(kv.capacity)
        with torch.inference_mode():
            x, taps = self._run_blocks(rows, kv, layers)
        return Scores(self.unembed(x.index_select(0, rows.scored)), tuple(taps[i].clone() for i in layers))

    def _run_blocks(
        self, rows: Rows, kv: PagedKV, layers: tuple[int, ...]
    ) -> tuple[Float[Tensor, "N H"], dict[int, Tensor]]:
        c = self.config
        n, turned = rows.count, c.heads + c.kv_heads
        attend = AttentionPlan(rows, kv, c.heads, c.window, scale=c.attention_scale, cap=c.attention_cap)
        angles = [rope.angles(table, rows.position) for table in self._ropes]
        x = self._embed_rows(rows)
        taps = {0: x}
        for i, block in enumerate(self._blocks):
            qkv = block.qkv(block.norm1(x)).view(n, turned + c.kv_heads, c.head_dim)
            qk, v = qkv.split((turned, c.kv_heads), 1)
            if block.qk_norm is not None:
                qk = block.qk_norm(qk)
            if c.clip:
                qk, v = qk.clamp(-c.clip, c.clip), v.clamp(-c.clip, c.clip)
            turn = c.turn_of(i)
            q, k = (qk if turn < 0 else rope.rotate(qk, *angles[turn])).split((c.heads, c.kv_heads), 1)
            x = block.leave(attend(i, q, k, v, block.sinks), x)
            if layers:
                taps[i + 1] = x
        return x, taps

    def _embed_rows(self, rows: Rows) -> Float[Tensor, "N H"]:
        try:
            return self._embedding(rows.token)
        except IndexError:
            raise RequestError(
                f"a token is not in the model's vocabulary of {self.vocab_size}: check the tokenizer"
            ) from None

    def _grow_rope(self, length: int) -> None:
        """Rotary tables for as many positions as a cache has places: a long context costs nothing until it is used."""
        if self._ropes[0].shape[0] < length:
            self._ropes = self._rope_tables(length)

    def _rope_tables(self, length: int) -> list[Float[Tensor, "L DD"]]:
        """Computed in float32 on the CPU for every dtype of the model, as in transformers."""
        c = self.config
        frequencies = [c.inv_freq] if c.local_freq is None else [c.inv_freq, c.local_freq]
        tables = [rope.table(f.float().cpu(), length, c.rope_scale) for f in frequencies]
        return [table.to(device=self.device, dtype=self.dtype) for table in tables]


def _norm(config: DecoderConfig, weight: Tensor, dtype: torch.dtype) -> Norm:
    return rms_norm(weight if config.wide_norms else weight.to(dtype), config.eps, of=dtype)


def _block(config: DecoderConfig, i: int, w: LayerWeights, dtype: torch.dtype, pack: bool) -> FusedLayer | SparseLayer:
    c = config

    def linear(weight: object, bias: Tensor | None = None) -> Linear:
        return make_linear(cast(Tensor, weight), bias, pack=pack)

    def norm(weight: Tensor | None) -> Norm | None:
        return None if weight is None else _norm(c, weight, dtype)

    qk_norm = None
    if w.q_norm is not None and w.k_norm is not None:
        if w.q_norm.shape[0] == c.head_dim:
            qk_norm = norm(torch.cat([w.q_norm.expand(c.heads, -1), w.k_norm.expand(c.kv_heads, -1)]))
        else:
            qk_norm = of_rows(_norm(c, w.q_norm, dtype), _norm(c, w.k_norm, dtype), c.heads)
    if c.experts is not None and c.experts.sparse[i]:
        e, router, gate_up, down = c.experts, *(cast(Tensor, m) for m in (w.router, w.gate_up, w.down))
        biases = None if w.router_bias is None else cast(Any, (w.router_bias, w.gate_up_bias, w.down_bias))
        shared = None if w.shared_gate is None else cast(Any, (w.shared_gate_up, w.shared_down, w.shared_gate))
        return SparseLayer(
            norm1=norm(w.norm1) or nn.Identity(),
            qkv=linear(w.qkv, w.qkv_bias),
            qk_norm=qk_norm,
            o=linear(w.o, w.o_bias),
            norm2=norm(w.norm2) or nn.Identity(),
            experts=expert_mlp(
                router,
                gate_up,
                down,
                biases,
                used=e.used,
                normalised=e.normalised,
                pack=pack,
                limit=e.limit,
                gain=e.gain,
                shared=shared,
            ),
            sinks=w.sinks,
        )
    return FusedLayer(
        norm1=norm(w.norm1) or nn.Identity(),
        qkv=linear(w.qkv, w.qkv_bias),
        qk_norm=qk_norm,
        o=linear(w.o, w.o_bias),
        norm2=norm(w.norm2) or nn.Identity(),
        gate_up=linear(w.gate_up),
        down=linear(w.down),
        post1=norm(w.post1),
        post2=norm(w.post2),
        act=F.silu if c.activation == "silu" else partial(F.gelu, approximate="tanh"),
        scale=c.residual_scale,
        sinks=w.sinks,
    )

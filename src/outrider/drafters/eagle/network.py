"""Shared by EAGLE's networks: one decoder layer over pairs (feature of a token, the token after it).

A context row is a pair (the target's feature at position t, token t + 1), a draft row a pair (the drafter's own output, the token
drafted from it): Li et al. 2024 (EAGLE) and 2025 (EAGLE-3). A subclass defines the feature, how it is joined with the token, and
the logits: `read`, `rows`, `join` and `logits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.nn.drafts import DraftShape, Features
from outrider.nn.level_attention import attend
from outrider.nn.rope import frequencies, rotation, turn


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """hidden: the drafter's width. target_hidden: the target's. taps: blocks whose outputs are read (0: the embeddings).

    vocab_size: the target's. draft_vocab: tokens that are drafted, 0 for all. norm_before_residual: whether the residual
    stream of an EAGLE-3 layer starts from the normed features.
    """

    hidden: int
    target_hidden: int
    taps: tuple[int, ...]
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float = 1e-6
    rope_theta: float = 10000.0
    norm_before_residual: bool = False
    draft_vocab: int = 0


class Attention(nn.Module):
    """The projections; the attention itself differs between training and serving. bias, norms: of
    queries, keys and values; of the heads of queries and of keys."""

    def __init__(self, c: EagleConfig, inputs: int, *, bias: bool = False, norms: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, c.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(inputs, c.kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(inputs, c.kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        if norms:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, c.eps) for _ in range(2))


class EagleNetwork(nn.Module, ABC):
    """A network with `embed_tokens`, `fc` and one layer with `self_attn`, `post_attention_layernorm` and `mlp`."""

    embed_tokens: nn.Embedding
    fc: nn.Linear
    layers: nn.ModuleList

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config

    # ------------------------------------------------------------------ what a drafter adds
    @abstractmethod
    def read(self, taps: Float[Tensor, "*n K H"]) -> Float[Tensor, "*n D"]:
        """Features of positions from the target's hidden states there, after the blocks `config.taps`."""

    @abstractmethod
    def rows(self, token: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """The token input of `join`; it depends on the token alone, so serving keeps it for the whole vocabulary."""

    @abstractmethod
    def join(self, row: Float[Tensor, "*n D"], g: Float[Tensor, "*n D"]) -> tuple[Tensor, Tensor]:
        """Residual stream [*n, D] and input of the attention's projections, from tokens' rows and features."""

    @abstractmethod
    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """Logits over the target's vocabulary after a row's state."""

    def feed(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """The feature of a draft row from the state of the row above it: the state itself, unless a subclass says otherwise."""
        return state

    @property
    @abstractmethod
    def features(self) -> Features:
        """`read`, `rows` and `join` as the compiled decoder knows them."""

    @property
    @abstractmethod
    def output(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """What `logits` consists of: norm, matrix, and the tokens of its outputs; None for no norm, for all tokens."""

    @property
    def shape(self) -> DraftShape:
        """Its sizes as the compiled decoder knows them."""
        c = self.config
        theta = frequencies(c.head_dim, c.rope_theta)
        return DraftShape(c.vocab_size, c.hidden, c.heads, c.kv_heads, c.head_dim, c.inner, c.eps, theta)

    # ------------------------------------------------------------------ the pieces, shared by training and serving
    def enter(
        self, token: Int[Tensor, "*n"], g: Float[Tensor, "*n D"], position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual [*n, D] and rotated queries [*n, heads, d], keys and values [*n, kv_heads, d] of rows (g, token)."""
        c, attn = self.config, self._layer.self_attn
        residual, x = self.join(self.rows(token), g)
        q = attn.q_proj(x).unflatten(-1, (c.heads, c.head_dim))
        k = attn.k_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        v = attn.v_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        cos, sin = self.rotation(position)
        return residual, turn(q, cos, sin), turn(k, cos, sin), v

    def leave(self, residual: Float[Tensor, "*n D"], seen: Float[Tensor, "*n A"]) -> Float[Tensor, "*n D"]:
        """The layer's output: the feature of the next draft row."""
        layer = self._layer
        x = residual + layer.self_attn.o_proj(seen)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*n, 1, head_dim] of rotary positions, in the module's dtype."""
        c = self.config
        cos, sin = rotation(position, frequencies(c.head_dim, c.rope_theta, position.device))
        return cos.to(self.fc.weight.dtype), sin.to(self.fc.weight.dtype)

    @property
    def _layer(self) -> Any:
        return self.layers[0]

    # ------------------------------------------------------------------ training
    def states(self, tokens: Int[Tensor, "r L"], g: Float[Tensor, "r t D"], steps: int) -> list[Float[Tensor, "r t D"]]:
        """Outputs of `steps` draft levels from every position; each level reads the outputs of the previous one.

        tokens: [r, L] with features g of positions 0 .. t - 1, t <= L - steps. Entry s, column i: the row of level s at column
        i has position i + s and sees the context up to i and its own rows of levels 1 .. s (EAGLE-3, section 3.2).
        """
        c, length = self.config, g.shape[1]
        g = g.to(self.fc.weight.dtype)  # under autocast the residual stream stays as wide as the weights
        ruler = torch.arange(length, device=tokens.device)
        keys, values, out = [], [], []
        for s in range(steps):
            residual, q, k, v = self.enter(tokens[:, 1 + s : 1 + s + length], g, ruler + s)
            repeat = c.heads // c.kv_heads
            keys.append(k.repeat_interleave(repeat, -2) if repeat > 1 else k)
            values.append(v.repeat_interleave(repeat, -2) if repeat > 1 else v)
            seen = attend(q, keys, values, c.head_dim**-0.5)
            out.append(self.leave(residual, seen.flatten(2)))
            g = self.feed(out[-1])
        return out

    def unroll(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r T K H"], steps: int
    ) -> list[Float[Tensor, "r t V"]]:
        """Logits of `states`: entry s, column i gives the draft distribution of token i + s + 2 after tokens 0 .. i + s + 1, with
        hidden states up to i."""
        return [self.logits(state) for state in self.states(tokens, self.read(taps), steps)]

    def unrolled(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r t K H"], steps: int
    ) -> tuple[list[Float[Tensor, "r t D"]], Float[Tensor, "V D"]] | None:
        """What `unroll`'s logits are made of: rows, and the matrix they meet; None for a head of a part of the vocabulary."""
        norm, matrix, support = self.output
        if support is not None:
            return None
        c, states = self.config, self.states(tokens, self.read(taps), steps)
        return [s if norm is None else F.rms_norm(s, (c.hidden,), norm, c.eps) for s in states], matrix

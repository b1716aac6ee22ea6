"""A decoder in float64 by the formulas alone, without a cache: what the native one is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from outrider.models.decoder import DecoderConfig, DecoderWeights, Experts, LayerWeights


def reference(config: DecoderConfig, weights: DecoderWeights, path: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [V] behind the last token of `path` and the hidden states [H] of that token after each block, all in float64."""
    c, n = config, len(path)
    d = lambda t: t.double()  # noqa: E731
    norm = lambda x, w: x if w is None else x / (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt() * d(w)  # noqa: E731
    capped = lambda x, cap: x if not cap else cap * torch.tanh(x / cap)  # noqa: E731
    x = d(weights.embedding)[path] * c.scale_of_embeddings(weights.dtype)
    hidden = [x[-1]]
    act = torch.nn.functional.silu if c.activation == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")
    for i, (w, window) in enumerate(zip(weights.layers, c.window, strict=True)):
        rope = rotation(c, n, c.turn_of(i))
        qkv = norm(x, w.norm1) @ d(w.qkv).T + (0 if w.qkv_bias is None else d(w.qkv_bias))
        sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        parts = list(qkv.split(sizes, -1))
        for j, weight in enumerate((w.q_norm, w.k_norm)):
            if weight is not None:
                parts[j] = norm(parts[j].view(n, -1, len(weight)), weight).reshape(n, -1)
        parts = [part.clamp(-c.clip, c.clip) if c.clip else part for part in parts]
        q, k, v = (t.view(n, -1, c.head_dim).transpose(0, 1) for t in parts)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 0) for t in (rope(k), v))
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        score = capped(rope(q) @ k.transpose(1, 2) * scale, c.attention_cap)
        age = torch.arange(n)[:, None] - torch.arange(n)
        seen = (age >= 0) & (age < window if window else torch.ones(n, n, dtype=torch.bool))
        score = score.masked_fill(~seen, -torch.inf)
        if w.sinks is not None:
            score = torch.cat([score, d(w.sinks)[:, None, None].expand(-1, n, 1)], -1)
        mixed = score.softmax(-1)[..., :n] @ v
        part = mixed.transpose(0, 1).reshape(n, -1) @ d(w.o).T + (0 if w.o_bias is None else d(w.o_bias))
        x = x + c.residual_scale * norm(part, w.post1)
        if w.router is not None:
            x = x + mixture(c.experts, norm(x, w.norm2), w)
            hidden.append(x[-1])
            continue
        gate, up = (norm(x, w.norm2) @ d(w.gate_up).T).chunk(2, -1)
        x = x + c.residual_scale * norm((act(gate) * up) @ d(w.down).T, w.post2)
        hidden.append(x[-1])
    logits = norm(x, weights.norm)[-1] @ d(weights.head).T
    return capped(c.logit_scale * logits, c.logit_cap), hidden


def mixture(e: Experts, x: Tensor, w: LayerWeights) -> Tensor:
    """Every expert on every row, weighted; those not chosen with weight 0."""
    d = lambda bias: 0.0 if bias is None else bias.double()  # noqa: E731
    share = (x @ w.router.double().T + d(w.router_bias)).softmax(-1)
    weight = torch.zeros_like(share).scatter(1, share.topk(e.used, -1).indices, 1.0) * share
    weight = weight / weight.sum(-1, keepdim=True) if e.normalised else weight
    out = torch.zeros_like(x)
    gates, ups = w.gate_up.double().view(2, e.count, e.inner, -1)
    none = w.gate_up_bias is None
    own = torch.zeros(2, e.count, e.inner) if none else w.gate_up_bias.double().view(2, e.count, e.inner)
    last = torch.zeros(e.count, x.shape[1]) if none else w.down_bias.double().view(e.count, -1)
    for i, down in enumerate(w.down.double().view(e.count, -1, e.inner)):
        gate, up = x @ gates[i].T + own[0, i], x @ ups[i].T + own[1, i]
        if e.limit:
            gate = gate.clamp(max=e.limit)
            units = gate * torch.sigmoid(e.gain * gate) * (up.clamp(-e.limit, e.limit) + 1)
        else:
            units = torch.nn.functional.silu(gate) * up
        out += weight[:, i, None] * (units @ down.T + last[i])
    return out


def rotation(c: DecoderConfig, n: int, turn: int) -> Callable[[Tensor], Tensor]:
    """Turns queries or keys [heads, n, head_dim] of positions 0 .. n - 1."""
    if turn < 0:
        return lambda x: x
    inv_freq = c.local_freq if turn and c.local_freq is not None else c.inv_freq
    angle = torch.arange(n).double()[:, None] * inv_freq.double()
    cos, sin = c.rope_scale * torch.cat([angle, angle], -1).cos(), c.rope_scale * torch.cat([angle, angle], -1).sin()
    half, size = len(inv_freq), 2 * len(inv_freq)

    def turned(x: Tensor) -> Tensor:
        front = x[..., :size]
        return torch.cat(
            [front * cos + torch.cat([-front[..., half:], front[..., :half]], -1) * sin, x[..., size:]], -1
        )

    return turned

"""Attention of the levels of a training-time test: a row sees the text up to its column, and its own rows of the levels above.

Forward and gradients of one row of text at a time, whose weights then stay in the processor's cache; PyTorch's operators pass over
the weights of the whole batch a dozen times in each direction. `plain` is the twin, in those operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

Heads = Float[Tensor, "r t h d"]


def attend(q: Heads, keys: Sequence[Heads], values: Sequence[Heads], scale: float) -> Heads:
    """Outputs of the newest level, in q's dtype: column i sees columns 0 .. i of keys[0], and column i of each of keys[1:].

    Computed in float32 (float64 if q is). The gradient is not differentiable.
    """
    return _Attend.apply(scale, len(keys), q, *keys, *values)


def plain(q: Heads, keys: Sequence[Heads], values: Sequence[Heads], scale: float) -> Heads:
    """`attend` in operators."""
    length = q.shape[1]
    closed = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    past = torch.einsum("rihd,rjhd->rhij", q, keys[0]).masked_fill(closed, float("-inf"))
    own = [(q * key).sum(-1).transpose(1, 2)[..., None] for key in keys[1:]]
    weight = torch.softmax(torch.cat([past, *own], -1) * scale, -1)
    seen = torch.einsum("rhij,rjhd->rihd", weight[..., :length], values[0])
    for n, value in enumerate(values[1:]):
        seen = seen + weight[..., length + n].transpose(1, 2)[..., None] * value
    return seen


def rounding(device: torch.device) -> torch.dtype | None:
    """The type of autocast's products on a device where it is on."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def unrounded(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, where it is on."""
    return nullcontext() if rounding(device) is None else torch.autocast(device.type, enabled=False)


class _Attend(torch.autograd.Function):
    """Value and gradient by hand: with weights W, outputs O and their gradient G, dS = W (G V^T - rowsum(G O))."""

    @staticmethod
    def forward(ctx, scale: float, levels: int, q: Tensor, *pairs: Tensor) -> Tensor:  # type: ignore[override]
        length, kind = q.shape[1], torch.promote_types(q.dtype, torch.float32)
        with unrounded(q.device):
            x, *inner = (t.detach().to(kind).transpose(1, 2).contiguous() for t in (q, *pairs))  # [r, h, t, d]
            keys, values = inner[:levels], inner[levels:]
            ceiling = torch.full((length, length), float("-inf"), dtype=kind, device=q.device).triu(1)
            out, kept = torch.empty_like(x), []
            for part in _parts(x):
                past = torch.baddbmm(ceiling, _flat(x[part]), _flat(keys[0][part]).mT, alpha=scale)
                own = [_flat((x[part] * key[part]).sum(-1, keepdim=True)) * scale for key in keys[1:]]
                weight = torch.softmax(torch.cat([past, *own], -1), -1)
                seen = (weight[..., :length] @ _flat(values[0][part])).view(out[part].shape)
                for n, value in enumerate(values[1:]):
                    seen.addcmul_(weight[..., length + n].view(*seen.shape[:3], 1), value[part])
                out[part] = seen
                kept.append(weight)
        ctx.save_for_backward(x, out, *inner, *kept)
        ctx.made = scale, levels, [t.dtype for t in (q, *pairs)]
        return out.transpose(1, 2).to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        scale, levels, kinds = ctx.made
        x, out, *rest = ctx.saved_tensors
        keys, values, kept = rest[:levels], rest[levels : 2 * levels], rest[2 * levels :]
        length, g = x.shape[2], grad.to(x.dtype).transpose(1, 2).contiguous()
        of_q, of_keys, of_values = (torch.empty_like(x) for _ in range(3))
        more_keys, more_values = ([torch.empty_like(x) for _ in range(levels - 1)] for _ in range(2))
        for part, weight in zip(_parts(x), kept, strict=True):
            flat, to = _flat(g[part]), g[part].shape
            mean = (g[part] * out[part]).sum(-1, keepdim=True)
            past = weight[..., :length]
            slope = (flat @ _flat(values[0][part]).mT).sub_(_flat(mean)).mul_(past).mul_(scale)
            of_values[part] = (past.mT @ flat).view(to)
            of_keys[part] = (slope.mT @ _flat(x[part])).view(to)
            of_q[part] = (slope @ _flat(keys[0][part])).view(to)
            for n in range(levels - 1):
                w = weight[..., length + n].view(*to[:3], 1)
                s = ((g[part] * values[n + 1][part]).sum(-1, keepdim=True) - mean) * w * scale
                more_values[n][part] = w * g[part]
                more_keys[n][part] = s * x[part]
                of_q[part].addcmul_(s, keys[n + 1][part])
        found = (of_q, of_keys, *more_keys, of_values, *more_values)
        return None, None, *(t.transpose(1, 2).to(kind) for t, kind in zip(found, kinds, strict=True))


def _parts(x: Tensor) -> list[slice]:
    """Rows of text that are computed together: one on a processor, all elsewhere."""
    return [slice(i, i + 1) for i in range(len(x))] if x.device.type == "cpu" else [slice(0, len(x))]


def _flat(x: Tensor) -> Tensor:
    """[r, h, t, d] as [r h, t, d]."""
    return x.flatten(0, 1)

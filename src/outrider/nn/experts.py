"""A mixture of SwiGLUs by PyTorch's operators: what the native decoder's `experts.h` computes, as a plain twin.

Every expert that some row chose is multiplied once, with all rows that chose it. (Shazeer et al. 2017, arXiv:1701.06538; routing by
the softmax over all experts as in Fedus et al. 2021, arXiv:2101.03961, of the `used` best.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from outrider.nn.layers import Norm
from outrider.nn.linear import Linear, make_linear


@dataclass(frozen=True, slots=True)
class Expert:
    """One SwiGLU, or its bounded kind. Its weights are views of those of all experts, unless they are packed."""

    gate: Linear
    up: Linear
    down: Linear
    limit: float = 0.0
    gain: float = 1.0

    def __call__(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        gate, up = self.gate(x), self.up(x)
        if not self.limit:
            return self.down(F.silu(gate).mul_(up))
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down(gate * torch.sigmoid(gate * self.gain) * (up + 1))


def choose(
    logits: Float[Tensor, "n E"], used: int, normalised: bool
) -> tuple[Int[Tensor, "n U"], Float[Tensor, "n U"]]:
    """The experts of every row and their weights, float32 (float64 for such logits); see `models.decoder.Experts`."""
    share = logits.softmax(-1, dtype=None if logits.dtype is torch.float64 else torch.float32)
    weight, expert = share.topk(used, -1)
    return expert, weight / weight.sum(-1, keepdim=True) if normalised else weight


def expert_mlp(
    router: Float[Tensor, "E H"],
    gate_up: Float[Tensor, "G H"],
    down: Float[Tensor, "D I"],
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    used: int,
    normalised: bool,
    pack: bool,
    limit: float = 0.0,
    gain: float = 1.0,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """The mixture [n, H] -> [n, H] with weights as in `models.decoder.LayerWeights`; pack: as in `nn.linear.make_linear`. The
    router is multiplied in its own type. biases: of router, gates and ups, downs. limit, gain: see `models.decoder.Experts`.
    shared: gates and ups, downs, and the weight's gate of an expert that every row uses."""
    count = router.shape[0]
    gates, downs = gate_up.unflatten(0, (2, count, -1)), down.unflatten(0, (count, -1))
    parts: list[tuple[Tensor, Tensor | None]] = [(w, None) for w in (*gates, downs)]
    if biases is not None:
        parts = list(
            zip((*gates, downs), (*biases[1].unflatten(0, (2, count, -1)), biases[2].view(count, -1)), strict=True)
        )

    def expert(i: int) -> Expert:
        gate, up, down = (make_linear(w[i], None if b is None else b[i], pack=pack) for w, b in parts)
        return Expert(gate, up, down, limit, gain)

    experts = [expert(i) for i in range(count)]
    route = make_linear(router, None if biases is None else biases[0].to(router.dtype), pack=False)

    every = None if shared is None else _shared(*shared, pack=pack)

    def mixture(x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        out = _mixed(x, experts, *choose(route(x.to(router.dtype)), used, normalised))
        return (out if every is None else out + every(x)).to(x.dtype)

    return mixture


def _shared(gate_up: Tensor, down: Tensor, gate: Tensor, *, pack: bool) -> Callable[[Tensor], Tensor]:
    """sigmoid(gate x) times a SwiGLU that every row uses, in float32 at least (Qwen2-MoE)."""
    gates, ups = gate_up.chunk(2)
    expert = Expert(make_linear(gates, pack=pack), make_linear(ups, pack=pack), make_linear(down, pack=pack))
    weigh = make_linear(gate, None, pack=False)
    wide = lambda x: x if x.dtype is torch.float64 else x.float()  # noqa: E731
    return lambda x: torch.sigmoid(wide(weigh(x.to(gate.dtype)))) * expert(x)


def _mixed(
    x: Float[Tensor, "n H"], experts: Sequence[Expert], chosen: Int[Tensor, "n U"], weight: Float[Tensor, "n U"]
) -> Float[Tensor, "n H"]:
    out = torch.zeros_like(x, dtype=weight.dtype)
    for i in chosen.unique().tolist():  # ascending: a row's sum has one order
        row, place = (chosen == i).nonzero(as_tuple=True)
        out[row] += experts[i](x[row]) * weight[row, place, None]
    return out


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """`nn.layers.FusedLayer` with a mixture of experts in the place of its SwiGLU. sinks: see `nn.attention.attend`."""

    norm1: Norm
    qkv: Linear
    qk_norm: Norm | None
    o: Linear
    norm2: Norm
    experts: Callable[[Tensor], Tensor]
    sinks: Tensor | None = None

    def leave(self, seen: Float[Tensor, "n A"], residual: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """The layer's output from the attention's output and the layer's input."""
        x = self.o.add(seen, residual)
        return x + self.experts(self.norm2(x))

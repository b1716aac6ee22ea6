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
    """One SwiGLU. Its weights are views of those of all experts, unless they are packed."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


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
    *,
    used: int,
    normalised: bool,
    pack: bool,
) -> Callable[[Tensor], Tensor]:
    """The mixture [n, H] -> [n, H] with weights as in `models.decoder.LayerWeights`; pack: as in `nn.linear.make_linear`. The router is
    multiplied in its own type."""
    count = router.shape[0]
    gates, downs = gate_up.unflatten(0, (2, count, -1)), down.unflatten(0, (count, -1))
    experts = [Expert(*(make_linear(w[i], pack=pack) for w in (*gates, downs))) for i in range(count)]
    route = make_linear(router, pack=False)

    def mixture(x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        return _mixed(x, experts, *choose(route(x.to(router.dtype)), used, normalised))

    return mixture


def _mixed(
    x: Float[Tensor, "n H"], experts: Sequence[Expert], chosen: Int[Tensor, "n U"], weight: Float[Tensor, "n U"]
) -> Float[Tensor, "n H"]:
    out = torch.zeros_like(x, dtype=weight.dtype)
    for i in chosen.unique().tolist():  # ascending: a row's sum has one order
        row, place = (chosen == i).nonzero(as_tuple=True)
        out[row] += experts[i](x[row]) * weight[row, place, None]
    return out.to(x.dtype)


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """`nn.layers.FusedLayer` with a mixture of experts in the place of its SwiGLU."""

    norm1: Norm
    qkv: Linear
    qk_norm: Norm | None
    o: Linear
    norm2: Norm
    experts: Callable[[Tensor], Tensor]

    def leave(self, seen: Float[Tensor, "n A"], residual: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """The layer's output from the attention's output and the layer's input."""
        x = self.o.add(seen, residual)
        return x + self.experts(self.norm2(x))

"""Matrices of a learned drafter as serving multiplies by them: packed once, in bfloat16 where the processor has such products.

A drafter's pass is bound by reading its weights, and folders hold them in bfloat16 anyway; the rows between the products stay as
they are. What comes out is another law than that of a float32 product by a rounding, and the one that is declared: exactness
does not depend on it.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from outrider.nn.linear import Linear, can_pack, make_linear

M = TypeVar("M", bound=nn.Module)


def product(weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> Linear:
    """The fastest product with this weight for the few rows of a draft; rows go in and come out in the weight's dtype."""
    if weight.dtype is torch.float32 and can_pack(narrow := weight.bfloat16()):
        return _Narrow(make_linear(narrow, None if bias is None else bias.bfloat16()))
    return make_linear(weight, bias)


def served(model: M) -> M:
    """`model` with a `product` in the place of every `nn.Linear` of its own; all else is shared with it, and it is not changed.

    Linear layers within its parts stay: whoever serves those puts several of them side by side.
    """
    other = copy.copy(model)
    swap = lambda part: _Product(part) if isinstance(part, nn.Linear) else part  # noqa: E731
    other._modules = {name: swap(part) for name, part in model._modules.items()}
    return other


class _Narrow:
    """Rows of float32 through a product of bfloat16."""

    def __init__(self, inner: Linear) -> None:
        self._inner = inner

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        return self._inner(x.bfloat16()).float()

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return self(x).add_(residual)


class _Product(nn.Module):
    """A `product` that stands where a linear layer stood, and takes rows of any shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = product(linear.weight, linear.bias)

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

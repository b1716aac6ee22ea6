"""Linear layers with weights packed once for the few rows of a decoding step.

On the CPU a plain matrix product reads [out, in] weights at less than half the speed of packed ones, and in float32
two to four rows cost two to three times one row, which would make speculation useless. oneDNN's packed product is
flat to about eight rows. It is a private operator of PyTorch, so every use of it is here, with a plain twin for
platforms without it (another device, float64, an old processor); a test compares the two.

Learned drafters multiply in bfloat16 if the processor has such products (`draft_linear`, `with_fast_linears`): their pass is
bound by reading weights, and folders store them in bfloat16 anyway; the rows between the products keep their dtype. The draft
distribution then differs from that of float32 products by rounding, and it is the one declared: exactness does not depend on it.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outrider.errors import ConfigError

M = TypeVar("M", bound=nn.Module)
_BATCH_HINT = 4
_FEW = 16
"""Rows up to which a product has its exact size; larger ones are padded (see `filled`)."""
_SMALL = 1 << 18
"""Float32 weights of fewer numbers stay plain: a packed product costs some 20 microseconds to start, a plain one 5."""


@runtime_checkable
class Linear(Protocol):
    """y = x W^T + b for x [n, in]; rows of x may be any number."""

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]: ...

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        """residual + y, in one pass if the library supports it."""
        ...


def make_linear(
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None = None,
    *,
    pack: bool = True,
) -> Linear:
    """The fastest layer for this weight; pack=False keeps the weight as it is (no copy)."""
    if pack and can_pack(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def draft_linear(weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> Linear:
    """The fastest product with this weight for the few rows of a draft; input and output have the weight's dtype."""
    if weight.dtype is torch.float32 and can_pack(narrow := weight.bfloat16()):
        return _Narrow(make_linear(narrow, None if bias is None else bias.bfloat16()))
    return make_linear(weight, bias)


def with_fast_linears(model: M) -> M:
    """A copy of `model` with a `draft_linear` for each of its direct `nn.Linear`s; everything else is shared, and `model` is not
    changed.

    Linear layers inside its submodules stay: serving fuses several of them.
    """
    other = copy.copy(model)
    swap = lambda part: _Product(part) if isinstance(part, nn.Linear) else part  # noqa: E731
    other._modules = {name: swap(part) for name, part in model._modules.items()}
    return other


class PlainLinear:
    """The twin: PyTorch's own product over the [out, in] weight, which is shared and not copied."""

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._prepares = weight.device.type == "cpu" and weight.dtype not in (torch.float32, torch.float64)

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        if not self._prepares:
            return F.linear(x, self.weight, self.bias)
        return F.linear(filled(x), self.weight, self.bias)[: x.shape[0]]

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return residual + self(x)


class PackedLinear:
    """oneDNN's product over a weight reordered once. Holds its own copy: the plain weight can be freed."""

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> None:
        operators = _operators()
        if operators is None:
            raise ConfigError("this build of PyTorch has no packed linear operator: use PlainLinear")
        self._run, self._run_add, reorder = operators
        self._weight, self._bias = reorder(weight.contiguous(), _BATCH_HINT), bias

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        return self._run(filled(x), self._weight, self._bias, "none", [], "")[: x.shape[0]]

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return self._run_add(filled(x), filled(residual), self._weight, self._bias, "add")[: x.shape[0]]


class _Narrow:
    """Rows of float32 through a product of bfloat16."""

    def __init__(self, inner: Linear) -> None:
        self._inner = inner

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        return self._inner(x.bfloat16()).float()

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return self(x).add_(residual)


class _Product(nn.Module):
    """A `draft_linear` that replaces a linear layer and takes rows of any shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = draft_linear(linear.weight, linear.bias)

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product supports this weight on this processor, and is faster than the plain one."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return (weight.dtype is torch.bfloat16 or weight.numel() >= _SMALL) and _packs(weight.dtype)


def has_fast_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has a fast matrix product for this dtype here; without AVX512 the one for bfloat16 is ten times slower."""
    return device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or _packs(torch.bfloat16)


def filled(x: Float[Tensor, "n I"]) -> Float[Tensor, "m I"]:
    """The rows, padded with zeros to a multiple of 8 (of 16 above 64 rows) if there are more than a few.

    oneDNN prepares and caches a product for every number of rows, up to a thousand of them with 0.6 to 0.9 MB each. Prompts of
    all lengths would take some hundred MB that are never freed, and every new length the time of the preparation.
    """
    n = x.shape[0]
    missing = -n % (8 if n <= 64 else 16)
    return F.pad(x, (0, 0, 0, missing)) if missing and n > _FEW else x


@cache
def _operators() -> tuple | None:
    """The packed product, the same with a fused addition, and the packing; None if PyTorch does not have them."""
    try:
        pointwise = torch.ops.mkldnn._linear_pointwise
        return pointwise.default, pointwise.binary, torch.ops.mkldnn._reorder_linear_weight.default
    except (AttributeError, RuntimeError):
        return None


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Tried once on a small weight: a processor without the instructions raises an error."""
    if _operators() is None or not torch.backends.mkldnn.is_available():
        return False
    weight, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
    try:
        packed = PackedLinear(weight)
        return torch.equal(packed(x), x) and torch.equal(packed.add(x, x), x + x)
    except (RuntimeError, TypeError):
        return False

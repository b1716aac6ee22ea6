"""Linear layers with weights packed once for the few rows of a decoding step.

On the CPU a plain matrix product reads [out, in] weights at less than half the speed of packed ones, and in float32
two to four rows cost two to three times one row, which would make speculation useless. oneDNN's packed product is
flat to about eight rows. It is a private operator of PyTorch, so every use of it is here, with a plain twin for
platforms without it (another device, float64, an old processor); a test compares the two.

Weight-only int8 and int4 are for drafts: they change the draft distribution, and speculation is lossless for any of them.

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

from outrider.errors import ConfigError, unknown_name

M = TypeVar("M", bound=nn.Module)
QUANTIZE = ("int8", "int4")
INT4_GROUP = 32
_INT4_OUTPUTS = 16
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
    quantize: str | None = None,
    pack: bool = True,
) -> Linear:
    """The fastest layer for this weight. quantize: None, "int8" or "int4"; pack=False keeps the weight as it is (no copy)."""
    if quantize is not None:
        return _quantized(weight, bias, quantize)
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


class Int8Linear:
    """Symmetric int8 weights, one scale per output: a quarter of float32's bytes.

    PyTorch's CPU kernel reads bfloat16 rows (its float32 branch is scalar and slow); elsewhere the weight is widened per call.
    """

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> None:
        scale = weight.abs().amax(1).float().clamp(min=1e-12) / 127
        self._weight = (weight.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self._kernel = weight.device.type == "cpu" and weight.shape[1] % 16 == 0
        self._scale = scale.bfloat16() if self._kernel else scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        if self._kernel:
            y = torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._scale).to(x.dtype)
        else:
            y = F.linear(x, self._weight.to(x.dtype)) * self._scale
        return y if self._bias is None else y + self._bias

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return residual + self(x)


class Int4Linear:
    """Asymmetric int4 weights in groups of 32 inputs: weight = (code - 8) * scale + zero, an eighth of float32's bytes.

    Only on the CPU and with a multiple of 32 inputs; `make_linear` takes int8 elsewhere.
    """

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> None:
        self._out, size = weight.shape
        padded = F.pad(weight.float(), (0, 0, 0, -self._out % _INT4_OUTPUTS))
        grouped = padded.view(-1, size // INT4_GROUP, INT4_GROUP)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-9)
        code = ((grouped - low[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.int32).view(-1, size)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code, 1)
        self._scale_zero = torch.stack([scale.t(), (low + 8 * scale).t()], -1).bfloat16().contiguous()
        self._bias = bias

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(x.bfloat16(), self._weight, INT4_GROUP, self._scale_zero)[:, : self._out].to(x.dtype)
        return y if self._bias is None else y + self._bias

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return residual + self(x)


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


def _quantized(weight: Tensor, bias: Tensor | None, quantize: str) -> Linear:
    if quantize not in QUANTIZE:
        raise ConfigError(unknown_name("quantize", quantize, QUANTIZE))
    fits = weight.device.type == "cpu" and weight.shape[1] % INT4_GROUP == 0
    return Int4Linear(weight, bias) if quantize == "int4" and fits else Int8Linear(weight, bias)


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

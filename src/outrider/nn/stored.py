"""How a cache stores keys and values: as plain numbers of a type, or as codes of 8 bits with a scale for each token and head.

An entry of codes is [head_dim codes, int8][scale, float32]; a number is its code times the scale. Scales lie behind their codes, so
whoever moves, shares or copies entries moves them along and need not know what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from outrider.errors import ConfigError, unknown_name

KV_DTYPES = ("auto", "float32", "bfloat16", "int8")
"""What `--kv-dtype` takes; "auto": the type of the model's weights."""
SCALE = 4
"""Bytes of a scale."""
LEAST = 1e-30
"""Largest number of an entry up to which it is stored as zeros."""


@runtime_checkable
class Stored(Protocol):
    """How an entry of `head_dim` numbers is stored. dtype: of its items. name: of the type, as `--kv-dtype` has it."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def items(self, head_dim: int) -> int:
        """Items of an entry."""
        ...

    def pack(self, x: Float[Tensor, "*n D"]) -> Shaped[Tensor, "*n items"]:
        """Numbers as they are stored."""
        ...

    def unpack(self, stored: Shaped[Tensor, "*n items"], dtype: torch.dtype) -> Float[Tensor, "*n D"]:
        """What is stored as numbers of a type; no copy where it is their type."""
        ...

    def query(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """Queries as they meet what is stored, in their own type: rounded as the compiled decoder rounds them."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers of one type."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def items(self, head_dim: int) -> int:
        return head_dim

    def pack(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return x.to(self.dtype)

    def unpack(self, stored: Float[Tensor, "*n D"], dtype: torch.dtype) -> Float[Tensor, "*n D"]:
        return stored.to(dtype)

    def query(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return x.to(self.dtype).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes of 8 bits, -127 .. 127, rounded to nearest even, and their scale. The compiled decoder's are the same to the bit."""

    name: str = "int8"
    dtype: torch.dtype = torch.int8

    def items(self, head_dim: int) -> int:
        return head_dim + SCALE

    def pack(self, x: Float[Tensor, "*n D"]) -> Shaped[Tensor, "*n items"]:
        """An entry with a number that is not finite is all NaN, so that its sequence is found to be broken."""
        x = x.float()
        top = x.abs().amax(-1, keepdim=True)
        finite = top <= torch.finfo(torch.float32).max
        told = finite & (top > LEAST)
        zero = torch.zeros_like(top)
        scale = torch.where(told, top / 127, torch.where(finite, zero, torch.nan))
        code = torch.where(told, (x * torch.where(told, 127 / top, zero)).round(), 0.0)
        return torch.cat([code.to(torch.int8), scale.contiguous().view(torch.int8)], -1)

    def unpack(self, stored: Shaped[Tensor, "*n items"], dtype: torch.dtype) -> Float[Tensor, "*n D"]:
        scale = stored[..., -SCALE:].contiguous().view(torch.float32)
        return (stored[..., :-SCALE].float() * scale).to(dtype)

    def query(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return x.to(torch.bfloat16).to(x.dtype)


def stored_as(name: str, weights: torch.dtype, head_dim: int) -> Stored:
    """What one of KV_DTYPES stands for beside weights of a type. Raises ConfigError for another name, or heads it does not fit."""
    if name not in KV_DTYPES:
        raise ConfigError(unknown_name("type of keys and values", name, KV_DTYPES))
    if name == "int8" and head_dim % 4:
        raise ConfigError(
            f"keys and values in int8 need heads of a multiple of 4 numbers, this model's have {head_dim}: leave kv_dtype out"
        )
    if name == "int8":
        return Coded()
    return Plain(weights if name == "auto" else getattr(torch, name))


def entry_bytes(stored: Stored, head_dim: int) -> int:
    """Bytes of a key or value of one head."""
    return stored.items(head_dim) * stored.dtype.itemsize

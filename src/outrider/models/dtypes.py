"""The type and the device that a model is computed in: asked for by name, or what the machine and the checkpoint suggest."""

from __future__ import annotations

from pathlib import Path

import torch

from outrider import isa, options
from outrider.errors import ConfigError, unknown_name
from outrider.models.native.build import load_library

FLOAT16 = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})
"""Instructions with products of float16."""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in options.DTYPES.items()}


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise ConfigError(unknown_name("dtype", name, ["auto", *DTYPES]))
    return DTYPES.get(name)


def choose_dtype(name: str, stored: object, device: torch.device, *, lean: bool) -> torch.dtype:
    """lean: our runtime may have the native decoder, which always computes with bfloat16 weights in float32."""
    named = named_dtype(name)
    if named is not None:
        return named
    if device.type != "cpu":
        return DTYPES.get(str(stored), torch.bfloat16)
    halves = lean and DTYPES.get(str(stored)) is torch.bfloat16 and load_library() is not None
    return torch.bfloat16 if isa.multiplies_bfloat16() or halves else torch.float32


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has no products of this type, so that PyTorch converts every number first."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if dtype is torch.bfloat16:
        return not isa.multiplies_bfloat16()
    return not isa.chosen().native or FLOAT16.isdisjoint(isa.cpu_flags())


def dtype_notices(folder: Path, dtype: torch.dtype, device: torch.device, native: bool) -> tuple[str, ...]:
    """Whether the type is slow in PyTorch on this machine. native: the native decoder is used, where it is not."""
    if native or not is_emulated(dtype, device):
        return ()
    name = str(dtype).removeprefix("torch.")
    return (f"{folder.name} runs in {name}, which this CPU only emulates (slower): choose --dtype float32",)


def device_named(name: str) -> torch.device:
    """ "auto" (a GPU if there is one) or a PyTorch device. Raises ConfigError for one that is unknown or not there."""
    options.check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, there = torch.device(name), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        if not there:
            raise ConfigError(f"device {name!r} is not there (PyTorch sees no GPU); use 'auto' or 'cpu'")
        raise ConfigError(f"device {name!r} is not there: the last GPU that PyTorch sees is 'cuda:{there - 1}'")
    return device

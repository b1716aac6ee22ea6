"""The CPU instructions that the native kernels use, and how to limit them: the environment variable `OUTRIDER_ISA`.

`OUTRIDER_ISA=avx2` simulates a machine without AVX-512: the libraries are compiled (or chosen) for AVX2, and PyTorch is limited
to it, if `outrider` is imported before it. A name after `prebuilt:` uses the library from the wheel, as if there were no
compiler. Imports nothing heavy: it must run before torch is imported, and when a wheel is built.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass

from outrider.errors import ConfigError

VARIABLE = "OUTRIDER_ISA"
PREBUILT = "prebuilt:"


@dataclass(frozen=True)
class Level:
    """A set of instructions that one build of our kernels is for.

    name: in OUTRIDER_ISA and in file names. kind: its name in the decoder's `outrider_kind`. flags: for the compiler. needs: the
    operating system's names of the instructions. torch: variables that limit PyTorch and its libraries to them.
    """

    name: str
    kind: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    torch: tuple[tuple[str, str], ...] = ()


def _torch(aten: str, onednn: str, mkl: str) -> tuple[tuple[str, str], ...]:
    return ("ATEN_CPU_CAPABILITY", aten), ("ONEDNN_MAX_CPU_ISA", onednn), ("MKL_ENABLE_INSTRUCTIONS", mkl)


_V3 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
X86 = (
    Level("generic", "generic", (), torch=_torch("default", "SSE41", "SSE4_2")),
    Level("avx2", "AVX2", ("-march=x86-64-v3",), _V3, _torch("avx2", "AVX2", "AVX2")),
    Level(
        "avx_vnni", "AVX-VNNI", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}, _torch("avx2", "AVX2_VNNI", "AVX2")
    ),
    Level("avx512", "AVX-512", ("-march=x86-64-v4",), _V4, _torch("avx512", "AVX512_CORE", "AVX512")),
    Level(
        "avx512_vnni", "AVX-512 VNNI", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"},
        _torch("avx512", "AVX512_CORE_VNNI", "AVX512"),
    ),
    Level(
        "avx512_bf16", "AVX-512 BF16", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        _V4 | {"avx512_vnni", "avx512_bf16"}, _torch("avx512", "AVX512_CORE_BF16", "AVX512"),
    ),
)  # fmt: skip
"""From the least to the most; versions 3 and 4 of x86-64 have no sums of byte products and no bfloat16 ones, hence builds with
them. A CPU may lack a level below another that it has."""
ARM = (
    Level("neon", "NEON", ("-march=armv8-a",)),
    Level("neon_dot", "NEON dotprod", ("-march=armv8.2-a+dotprod",), frozenset({"asimddp"})),
)
LEVELS = {"x86_64": X86, "aarch64": ARM}
"""By machine, as Linux calls it."""


@dataclass(frozen=True)
class Choice:
    """level: the instructions to use, None if this system does not report them. native: use all of them, since nothing was
    requested. prebuilt: use only libraries from the wheel."""

    level: Level | None
    native: bool
    prebuilt: bool


def machine() -> str:
    """This CPU's architecture as Linux names it: x86_64, aarch64, ..."""
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instructions that Linux names in /proc/cpuinfo; none on other systems."""
    try:
        with open("/proc/cpuinfo") as info:
            line = next((line for line in info if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def levels() -> tuple[Level, ...]:
    """The levels this CPU can run, from the least to the most; empty if the system does not report them."""
    flags = cpu_flags()
    return tuple(level for level in LEVELS.get(machine(), ()) if flags and level.needs <= flags)


def chosen() -> Choice:
    """The choice made by `OUTRIDER_ISA`, by default everything this CPU has. Raises ConfigError for an unsupported value."""
    text = os.environ.get(VARIABLE, "").strip() or "native"
    name, have = text.removeprefix(PREBUILT), levels()
    if name == "native":
        return Choice(have[-1] if have else None, True, text.startswith(PREBUILT))
    for level in have:
        if level.name == name:
            return Choice(level, level is have[-1], text.startswith(PREBUILT))
    names = ", ".join(["native", *(level.name for level in have)])
    every = {level.name for levels in LEVELS.values() for level in levels}
    what = "instructions that this CPU lacks" if name in every else "no set of instructions"
    raise ConfigError(
        f"{VARIABLE}={text!r} names {what}: use {names} (or one of them behind '{PREBUILT}'), or unset it"
    )


def unused(kind: str) -> str | None:
    """A notice if a library for the instructions `kind` leaves faster ones of this CPU unused."""
    choice, have = chosen(), levels()
    if not have or kind == have[-1].kind:
        return None
    best, what = have[-1].kind, f"decoding uses {kind} instructions though this CPU has {have[-1].kind}"
    if choice.level is not None and choice.level.kind == kind:
        late = any(name not in os.environ for name, _ in choice.level.torch)
        alone = " (and PyTorch, which was imported before outrider, is not held to it)" if late else ""
        return f"{what}: {VARIABLE}={choice.level.name} asks for it{alone}; unset it"
    return f"{what}: no compiler here knows {best}; install a newer g++ or clang++, or a wheel with prebuilt libraries"


def multiplies_bfloat16() -> bool:
    """Whether the processor may use bfloat16 products (Linux says so; elsewhere float32 is the safe choice)."""
    return chosen().native and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_flags())


def limit_torch() -> bool:
    """Limit PyTorch to the instructions that OUTRIDER_ISA names; False if nothing was requested or torch is already imported."""
    try:
        choice = chosen()
    except ConfigError:  # reported as a sentence when a library is loaded
        return False
    if choice.native or choice.level is None or "torch" in sys.modules:
        return False
    for name, value in choice.level.torch:
        os.environ.setdefault(name, value)
    return True

"""Machines and models by name: the numbers a roofline needs, with where each is from.

Rates are the vendors' peak rates for dense bfloat16 (no sparsity), bytes and operations per second of one device; what
software reaches is less. One entry was measured instead and says so. Models are public architectures, named by their size;
any other size is a scaled one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from outrider.theory.checks import named, number
from outrider.theory.experts import Routing


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. bandwidth: bytes/s of its memory; compute: dense bf16 operations/s; memory: bytes.

    measured: whether the rates were taken on such a machine; otherwise they are peak rates of `source`.
    """

    name: str
    bandwidth: float
    compute: float
    memory: float
    measured: bool
    source: str

    def __post_init__(self) -> None:
        for field in ("bandwidth", "compute", "memory"):
            if number(field, getattr(self, field)) <= 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field):g}")


def _geforce(name: str, bandwidth: float, shader: float, memory: float, generation: str) -> Hardware:
    """A GeForce card. shader: float32 operations/s; bf16 products that are summed in float32 run at twice that rate there."""
    source = f"NVIDIA GeForce {name} specifications; {generation} whitepaper: bf16 with float32 sums at twice the shader rate"
    return Hardware(f"NVIDIA GeForce {name}", bandwidth, 2 * shader, memory, False, source)


HARDWARE: dict[str, Hardware] = {
    "zen5-2": Hardware(
        "2 cores of an AMD EPYC (Zen 5) virtual machine",
        75e9,
        0.89e12,
        24 * 2**30,
        True,
        "measured: reading 512 MB with two threads; oneDNN bf16 products of 1024 to 4096",
    ),
    "a100": Hardware("NVIDIA A100 SXM 80GB", 2.039e12, 312e12, 80e9, False, "NVIDIA A100 Tensor Core GPU data sheet"),
    "h100": Hardware("NVIDIA H100 SXM", 3.35e12, 989e12, 80e9, False, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": Hardware("NVIDIA H200 SXM", 4.8e12, 989e12, 141e9, False, "NVIDIA H200 Tensor Core GPU data sheet"),
    "m3-max": Hardware(
        "Apple M3 Max, 40 GPU cores, 128 GB",
        400e9,
        14e12,
        128e9,
        False,
        "Apple, MacBook Pro (2023) technical specifications; arithmetic is not published: 40 cores x 128 lanes x 2 x 1.4 GHz",
    ),
    "m4-max": Hardware(
        "Apple M4 Max, 40 GPU cores, 128 GB",
        546e9,
        16e12,
        128e9,
        False,
        "Apple, MacBook Pro (2024) technical specifications; arithmetic is not published: 40 cores x 128 lanes x 2 x 1.6 GHz",
    ),
    "l4": Hardware(
        "NVIDIA L4", 300e9, 121e12, 24e9, False, "NVIDIA L4 Tensor Core GPU data sheet, half of the sparse rate"
    ),
    "l40s": Hardware("NVIDIA L40S", 864e9, 362e12, 48e9, False, "NVIDIA L40S data sheet"),
    "rtx-3060": _geforce("RTX 3060 12GB", 360e9, 12.7e12, 12e9, "Ampere"),
    "rtx-3090": _geforce("RTX 3090", 936e9, 35.6e12, 24e9, "Ampere"),
    "rtx-4060": _geforce("RTX 4060", 272e9, 15.1e12, 8e9, "Ada"),
    "rtx-4070": _geforce("RTX 4070", 504e9, 29.1e12, 12e9, "Ada"),
    "rtx-4090": _geforce("RTX 4090", 1.008e12, 82.6e12, 24e9, "Ada"),
    "rtx-5090": _geforce("RTX 5090", 1.792e12, 104.8e12, 32e9, "Blackwell"),
    "rx-7900-xtx": Hardware(
        "AMD Radeon RX 7900 XTX", 960e9, 122.8e12, 24e9, False, "AMD Radeon RX 7900 XTX specifications"
    ),
    "m1": Hardware(
        "Apple M1, 8 GPU cores, 16 GB", 68e9, 2.6e12, 16e9, False, "Apple, M1 press release (2020): 2.6 teraflops"
    ),
    "m2": Hardware(
        "Apple M2, 10 GPU cores, 24 GB", 100e9, 3.6e12, 24e9, False, "Apple, M2 press release (2022): 3.6 teraflops"
    ),
    "m2-ultra": Hardware(
        "Apple M2 Ultra, 76 GPU cores, 192 GB",
        800e9,
        27.2e12,
        192e9,
        False,
        "Apple, M2 Ultra press release (2023): 27.2 teraflops",
    ),
    "m4": Hardware(
        "Apple M4, 10 GPU cores, 32 GB",
        120e9,
        4.1e12,
        32e9,
        False,
        "Apple, M4 technical specifications (2024); arithmetic is not published: 10 cores x 128 lanes x 2 x 1.6 GHz",
    ),
    "m4-pro": Hardware(
        "Apple M4 Pro, 20 GPU cores, 64 GB",
        273e9,
        8.2e12,
        64e9,
        False,
        "Apple, M4 Pro technical specifications (2024); arithmetic is not published: 20 cores x 128 lanes x 2 x 1.6 GHz",
    ),
    "ryzen-ai-max": Hardware(
        "AMD Ryzen AI Max+ 395, 40 GPU cores, 128 GB",
        256e9,
        59e12,
        128e9,
        False,
        "AMD specifications: LPDDR5X-8000 x 256 bit; arithmetic: 40 cores x 512 x 2.9 GHz",
    ),
    "laptop-ddr4": Hardware(
        "a laptop's processor, 4 cores, two channels of DDR4-3200, 16 GB",
        51.2e9,
        0.38e12,
        16e9,
        False,
        "JEDEC DDR4-3200, 2 x 64 bit; arithmetic assumed: float32, 4 cores x 32 operations (AVX2) x 3 GHz",
    ),
    "laptop-ddr5": Hardware(
        "a laptop's processor, 8 cores, two channels of DDR5-5600, 32 GB",
        89.6e9,
        0.77e12,
        32e9,
        False,
        "JEDEC DDR5-5600, 2 x 64 bit; arithmetic assumed: float32, 8 cores x 32 operations (AVX2) x 3 GHz",
    ),
}


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a model: `count` in a layer, `used` of them by a row, and the parameters of all experts of all layers."""

    count: int
    used: int
    parameters: float

    def read(self, rows: float) -> float:
        """Parameters of the experts that so many rows touch: at most these, as rows that choose alike touch fewer."""
        return self.parameters * Routing.uniform(self.count, self.used).touched(rows) / self.count


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder's size: parameters, layers, query heads, key/value heads, head dimension.

    source: the public configuration it is, or how it was scaled. mixture: its experts, if it has any; they are among `parameters`.
    """

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    source: str
    mixture: Mixture | None = None

    def kv_bytes(self, element: float = 2.0) -> float:
        """Bytes of keys and values per token: 2 layers kv_heads head_dim, times the bytes of an element.

        >>> MODELS["70b"].kv_bytes()
        327680.0
        """
        return 2.0 * self.layers * self.kv_heads * self.head_dim * element

    def weight_bytes(self, element: float = 2.0) -> float:
        """Bytes of the weights."""
        return self.parameters * element

    def read_bytes(self, element: float = 2.0, rows: float = 1) -> float:
        """Bytes of the weights that a forward of so many rows reads: of experts only those that some row chose.

        >>> [round(MODELS["30b-a3b"].read_bytes(rows=n) / 1e9, 1) for n in (1, 4)]
        [6.7, 16.3]
        """
        return element * (self._dense + (self.mixture.read(rows) if self.mixture else 0.0))

    @property
    def active(self) -> float:
        """Parameters that a row is multiplied with."""
        return self._dense + (self.mixture.parameters * self.mixture.used / self.mixture.count if self.mixture else 0.0)

    @property
    def _dense(self) -> float:
        return self.parameters - (self.mixture.parameters if self.mixture else 0.0)

    @property
    def attention_operations(self) -> float:
        """Operations per token and token of context: scores and weighted sum, 4 layers heads head_dim."""
        return 4.0 * self.layers * self.heads * self.head_dim


MODELS: dict[str, Model] = {
    "0.5b": Model("0.5b", 0.494e9, 24, 14, 2, 64, "Qwen2.5-0.5B"),
    "0.6b": Model("0.6b", 0.596e9, 28, 16, 8, 128, "Qwen3-0.6B"),
    "1b": Model("1b", 1.236e9, 16, 32, 8, 64, "Llama 3.2 1B"),
    "3b": Model("3b", 3.213e9, 28, 24, 8, 128, "Llama 3.2 3B"),
    "7b": Model("7b", 6.738e9, 32, 32, 32, 128, "Llama 2 7B"),
    "8b": Model("8b", 8.030e9, 32, 32, 8, 128, "Llama 3.1 8B"),
    "13b": Model("13b", 13.016e9, 40, 40, 40, 128, "Llama 2 13B"),
    "14b": Model("14b", 14.770e9, 48, 40, 8, 128, "Qwen2.5-14B"),
    "32b": Model("32b", 32.764e9, 64, 40, 8, 128, "Qwen2.5-32B"),
    "70b": Model("70b", 70.554e9, 80, 64, 8, 128, "Llama 3.1 70B"),
    "7b-a1b": Model("7b-a1b", 6.919e9, 16, 16, 16, 128, "OLMoE-1B-7B", Mixture(64, 8, 6.442e9)),
    "30b-a3b": Model("30b-a3b", 30.532e9, 48, 32, 4, 128, "Qwen3-30B-A3B", Mixture(128, 8, 28.991e9)),
    "47b-a13b": Model("47b-a13b", 46.703e9, 32, 32, 8, 128, "Mixtral 8x7B", Mixture(8, 2, 45.097e9)),
    "405b": Model("405b", 405.853e9, 126, 128, 8, 128, "Llama 3.1 405B"),
}

_UNIT = {"m": 1e6, "b": 1e9, "t": 1e12, "": 1.0}


def hardware(name: str) -> Hardware:
    """A machine of the table by name, in any case; ValueError lists the names.

    >>> hardware("H100").bandwidth
    3350000000000.0
    """
    return named("hardware", name, HARDWARE)


def own(base: Hardware, bandwidth: float | None, compute: float | None, memory: float | None) -> Hardware:
    """`base` with your own figures where they are given: bytes/s, operations/s, bytes. ValueError for one that is not positive.

    >>> own(HARDWARE["m4"], 60e9, None, None).bandwidth
    60000000000.0
    """
    given = {"bandwidth": bandwidth, "compute": compute, "memory": memory}
    mine = {name: value for name, value in given.items() if value is not None}
    if not mine:
        return base
    told = f"own figures of {', '.join(mine)}" + (
        "" if len(mine) == len(given) else f"; the rest of {base.name}: {base.source}"
    )
    name = "your machine" if len(mine) == len(given) else f"a machine like {base.name}"
    return replace(base, **mine, name=name, measured=base.measured and not mine, source=told)


def model(name: str) -> Model:
    """A model of the table by its size, or one scaled to a number of parameters: "160m", "1.7b", "3e9".

    A free size takes the nearest size of the table that shares key/value heads and scales layers and width by the third root
    of the ratio, as both grow together in published families. ValueError for anything that is no size.

    >>> model("8B").kv_heads, model("160m").source
    (8, 'scaled from Qwen2.5-0.5B')
    """
    key = name.strip().lower()
    if key in MODELS:
        return MODELS[key]
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([mbt]?)", key)
    size = float(match.group(1)) * _UNIT[match.group(2)] if match else 0.0
    if not 1e5 <= size <= 1e14:
        raise ValueError(
            f"model {name!r} is no size: use one of {', '.join(MODELS)}, or parameters as 160m, 1.7b or 3e9"
        )
    near = min(
        (m for m in MODELS.values() if m.kv_heads < m.heads and m.mixture is None),
        key=lambda m: abs(math.log(m.parameters / size)),
    )
    scale = (size / near.parameters) ** (1 / 3)
    layers, heads, shared = (max(1, round(x * scale)) for x in (near.layers, near.heads, near.kv_heads))
    return Model(key, size, layers, heads, shared, near.head_dim, f"scaled from {near.source}")

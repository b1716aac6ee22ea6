"""Machines and models by name: the numbers a roofline needs, with where each is from.

Rates are the vendors' peak rates for dense bfloat16 (no sparsity), bytes and operations per second of one device; what
software reaches is less. One entry was measured instead and says so. Models are public architectures, named by their size;
any other size is a scaled one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

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
}


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a model: `count` in a layer, `used` of them by a row, and the parameters of all experts of all layers."""

    count: int
    used: int
    parameters: float

    def read(self, rows: int) -> float:
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

    def read_bytes(self, element: float = 2.0, rows: int = 1) -> float:
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

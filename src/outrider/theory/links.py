"""What joins devices, and what a forward that is split over them sends: tensor and pipeline parallelism, and a handed-over prompt.

Tensor parallelism over t devices sums the outputs of attention and MLP of every layer across them: two all-reduces of
rows x width elements a layer (Shoeybi et al., "Megatron-LM", 2019). An all-reduce of M bytes takes the shorter of

    ring:      2 (t - 1) latency + 2 (t - 1) / t * M / bandwidth      (Patarasu and Yuan, 2009)
    one-shot:  latency + (t - 1) M / bandwidth                        (each device sends all it has to all others)

Pipeline parallelism over s stages sends rows x width elements s - 1 times. A prompt that was read elsewhere (disaggregated prefill)
sends its keys and values once.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider.theory.checks import named, number, positive_int
from outrider.theory.hardware import Model


@dataclass(frozen=True, slots=True)
class Link:
    """bandwidth: bytes/s of one device in one direction, from the data sheet. latency: seconds until a message is there and the
    receiver goes on; no data sheet has it, so it is an assumption (software included) and can be set.
    """

    name: str
    bandwidth: float
    latency: float
    source: str

    def __post_init__(self) -> None:
        if number("bandwidth", self.bandwidth) <= 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth:g}")
        number("latency", self.latency, 0.0)


LINKS: dict[str, Link] = {
    "nvlink3": Link("NVLink 3", 300e9, 6e-6, "NVIDIA A100 data sheet: 600 GB/s, both directions together"),
    "nvlink4": Link("NVLink 4", 450e9, 6e-6, "NVIDIA H100 data sheet: 900 GB/s, both directions together"),
    "pcie4": Link("PCIe 4.0 x16", 32e9, 12e-6, "PCI-SIG: 16 GT/s, 16 lanes, one direction"),
    "pcie5": Link("PCIe 5.0 x16", 64e9, 12e-6, "PCI-SIG: 32 GT/s, 16 lanes, one direction"),
    "ib-hdr": Link("InfiniBand HDR", 25e9, 8e-6, "NVIDIA ConnectX-6 data sheet: 200 Gb/s a port"),
    "ib-ndr": Link("InfiniBand NDR", 50e9, 8e-6, "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port"),
}
USUAL = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4"}
"""Machines of `hardware` -> the link between devices in one box."""


def link(name: str) -> Link:
    """A link of the table by name, in any case; ValueError lists the names.

    >>> link("NVLink4").bandwidth
    450000000000.0
    """
    return named("link", name, LINKS)


def usual(machine: str) -> Link | None:
    """The link between devices of one box of a machine of `hardware`; None where none is known."""
    found = USUAL.get(machine.strip().lower())
    return None if found is None else LINKS[found]


def width(model: Model) -> int:
    """Elements of a hidden state: heads x head dimension, which it is in most families (not in Qwen3 below 8B)."""
    return model.heads * model.head_dim


def all_reduce(size: float, devices: int, over: Link) -> float:
    """Seconds to sum `size` bytes over `devices`, in the better of the two ways above.

    >>> round(1e6 * all_reduce(16384, 8, link("nvlink4")), 2)  # one token of a 70B model: latency is all of it
    6.25
    """
    t = positive_int("devices", devices)
    if t == 1:
        return 0.0
    ring = 2 * (t - 1) * over.latency + 2 * (t - 1) / t * size / over.bandwidth
    return min(ring, over.latency + (t - 1) * size / over.bandwidth)


def tensor_seconds(model: Model, rows: float, tensor: int, over: Link, element: float = 2.0) -> float:
    """Seconds that the all-reduces of one forward of `rows` rows take over `tensor` devices: two a layer."""
    return 2 * model.layers * all_reduce(rows * width(model) * element, tensor, over)


def pipeline_seconds(model: Model, rows: float, stages: int, over: Link, element: float = 2.0) -> float:
    """Seconds that `rows` rows take from stage to stage of one forward."""
    positive_int("stages", stages)
    return (stages - 1) * (over.latency + rows * width(model) * element / over.bandwidth)


def handover_seconds(model: Model, prompt: int, over: Link, element: float = 2.0, devices: int = 1) -> float:
    """Seconds to send the keys and values of a prompt to the devices that decode it, each over a link of its own.

    >>> from outrider.theory.hardware import MODELS
    >>> round(1e3 * handover_seconds(MODELS["70b"], 2000, link("ib-ndr"), devices=8), 2)
    1.65
    """
    size = positive_int("prompt", prompt, low=0) * model.kv_bytes(element)
    return over.latency + size / over.bandwidth / positive_int("devices", devices)

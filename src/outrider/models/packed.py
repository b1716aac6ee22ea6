"""Quantised checkpoints in safetensors: what their integers stand for, unpacked at load.

A packed weight is several tensors behind the name of its linear layer (`X.qweight`, `X.scales`, ...). A `Packing` names them with
their shapes and says how they make the weight [N, K], in float32: products are exact there, and rounded to the type of the run.
Layouts: the formats' own writers (compressed-tensors, AutoGPTQ and GPTQModel, AutoAWQ, MLX, transformers' fp8).
What needs another package or another distribution is refused as before, by `admit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from outrider.config_keys import packed_key
from outrider.errors import ConfigError
from outrider.models.entries import Entry
from outrider.nn.blocks.float8 import scaled_blocks
from outrider.nn.blocks.values import FP4_VALUES, power

Shapes = Callable[..., dict[str, tuple[int, ...]]]
Unpack = Callable[..., Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of every nibble, lowest first."""


_WORDS, _SIGNED, _UNSIGNED, _BYTES, _FLOAT8 = ("I32",), ("I32", "I64"), ("U32",), ("U8",), ("F8_E4M3",)
_REAL = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Packing:
    """name: for messages. shapes: (N, K) -> the tensors of a packed weight by their ends; a size of 0 where N or K are no whole
    words or groups. optional: those that may be absent. kinds: safetensors' types of each of them. codes: the one with the codes.

    unpack: (its tensors by end, N, K) -> the weight in float32. stacked: packed weights are those of experts alone, all of a layer
    in one tensor [E, N, K], and `unpack` takes some of them at a time.
    """

    name: str
    shapes: Shapes
    unpack: Unpack
    codes: str
    kinds: Mapping[str, tuple[str, ...]]
    optional: frozenset[str] = frozenset()
    stacked: bool = False

    def tensors(self, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> dict[str, str] | None:
        """The tensors of a weight of that shape by their ends; None if it is not packed so. Raises ConfigError for damaged ones."""
        base = name.removesuffix("weight")
        codes = entries.get(base + self.codes)
        if codes is None or len(shape) != (3 if self.stacked else 2) or codes.stored not in self.kinds[self.codes]:
            return None
        found: dict[str, str] = {}
        for end, expected in self.shapes(*shape).items():
            entry = entries.get(base + end)
            if entry is None and end in self.optional:
                continue
            wrong = self._wrong(entry, expected, self.kinds[end])
            if wrong:
                raise ConfigError(
                    f"tensor {base + end} {wrong} in {self.name} of a weight of {list(shape)}: the checkpoint is damaged, "
                    "download it again"
                )
            found[end] = base + end
        return found

    @staticmethod
    def _wrong(entry: Entry | None, expected: tuple[int, ...], kinds: tuple[str, ...]) -> str:
        """What contradicts the format, for a message."""
        if not all(expected):
            return "cannot have whole words and groups"
        if entry is None:
            return "is missing"
        if entry.shape != expected:
            return f"has shape {list(entry.shape)} and not {list(expected)}"
        return "" if entry.stored in kinds else f"is stored as {entry.stored} and not as {' or '.join(kinds)}"


def packing_of(raw: Mapping[str, Any]) -> Packing | None:
    """How the weights of a config.json are packed; None if they are not, or in a way that is not read here."""
    how = raw.get(packed_key(raw) or "")
    if not isinstance(how, dict):
        return None
    method = how.get("quant_method")
    if method == "gptq":
        return _gptq(how)
    if method == "awq":
        return _awq(how)
    if method == "compressed-tensors":
        return _compressed(how)
    if method == "fp8":
        return _fp8(how)
    if method == "mxfp4":
        return _mxfp4() if raw.get("model_type") == "gpt_oss" else None
    if method is None and set(how) >= {"group_size", "bits"} and "quantization" in raw:
        return _mlx(how)
    return None


def fields(words: Integer[Tensor, "*n w"], bits: int) -> Int[Tensor, "*n codes"]:
    """The fields of `bits` bits of 32-bit words, the lowest first, along the last dimension."""
    shift = torch.arange(0, 32, bits, dtype=torch.int32)
    found = (words.view(torch.int32)[..., None] >> shift) & ((1 << bits) - 1)
    return found.flatten(-2)


def _whole(size: int, by: int) -> int:
    """How often `by` goes into `size`; 0 if that is not a whole number."""
    return size // by if size % by == 0 else 0


def _groups(size: Any, inputs: int) -> int:
    """Groups of a row; 0 if they are not whole."""
    if size in (-1, None):
        return 1
    return _whole(inputs, size) if isinstance(size, int) and size > 0 else 0


def _gptq(how: Mapping[str, Any]) -> Packing | None:
    bits, size, kind = how.get("bits"), how.get("group_size", 128), how.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or kind not in ("gptq", "gptq_v2") or how.get("is_marlin_format"):
        return None
    each = 32 // bits

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        g = _groups(size, k)
        return {"qweight": (_whole(k, each), n), "qzeros": (g, _whole(n, each)), "scales": (g, n), "g_idx": (k,)}

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        codes = fields(t["qweight"].t().contiguous(), bits)
        zeros = fields(t["qzeros"], bits) + (kind == "gptq")  # version 1 stores one less
        index = t["g_idx"].long() if "g_idx" in t else torch.arange(k) // max(k // t["scales"].shape[0], 1)
        _check_index(index, t["scales"].shape[0])
        return (codes - zeros.t()[:, index]).float() * t["scales"].float().t()[:, index]

    kinds = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _REAL, "g_idx": _SIGNED}
    return Packing(f"GPTQ, {bits} bits", shapes, unpack, "qweight", kinds, frozenset({"g_idx"}))


def _check_index(index: Int[Tensor, "K"], groups: int) -> None:
    if not bool(((index >= 0) & (index < groups)).all()):
        raise ConfigError(
            "g_idx names a group of scales that does not exist: the checkpoint is damaged, download it again"
        )


def _awq(how: Mapping[str, Any]) -> Packing | None:
    size = how.get("group_size", how.get("q_group_size", 128))
    if how.get("bits", how.get("w_bit")) != 4 or str(how.get("version", "gemm")).lower() != "gemm":
        return None
    if how.get("zero_point", True) is not True:
        return None

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        g = _groups(size, k)
        return {"qweight": (k, _whole(n, 8)), "qzeros": (g, _whole(n, 8)), "scales": (g, n)}

    def columns(words: Tensor) -> Tensor:
        nibbles = fields(words, 4).unflatten(-1, (-1, 8))
        return nibbles[..., [AWQ_ORDER.index(i) for i in range(8)]].flatten(-2)

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        each = k // t["scales"].shape[0]
        zeros, scales = (x.repeat_interleave(each, 0) for x in (columns(t["qzeros"]), t["scales"].float()))
        return ((columns(t["qweight"]) - zeros).float() * scales).t()

    kinds = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _REAL}
    return Packing("AWQ, 4 bits", shapes, unpack, "qweight", kinds)


def _compressed(how: Mapping[str, Any]) -> Packing | None:
    groups = how.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or how.get("kv_cache_scheme") or how.get("sparsity_config"):
        return None
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("targets") != ["Linear"] or weights.get("actorder"):
        return None
    kind = (how.get("format"), weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    symmetric = weights.get("symmetric", True)
    if kind[:3] == ("pack-quantized", 4, "int") and kind[3] in ("group", "channel"):
        return _packed_fours(weights.get("group_size") if kind[3] == "group" else None, symmetric)
    if not symmetric or kind[3] not in ("channel", "tensor"):
        return None
    known: dict[tuple[Any, ...], tuple[str, ...]] = {
        ("int-quantized", 8, "int"): ("I8",),
        ("float-quantized", 8, "float"): _FLOAT8,
    }
    stored = known.get(kind[:3])
    if stored is None:
        return None

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n, k), "weight_scale": (n, 1) if kind[3] == "channel" else (1,)}

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        return t["weight"].float() * t["weight_scale"].float()

    kinds = {"weight": stored, "weight_scale": _REAL}
    return Packing(f"compressed-tensors, {kind[0]}", shapes, unpack, "weight", kinds)


def _packed_fours(size: Any, symmetric: bool) -> Packing:
    """Four bits, stored 8 higher; zero points lie eight rows to a word."""

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        g = _groups(size, k)
        out: dict[str, tuple[int, ...]] = {
            "weight_packed": (n, -(-k // 8)),
            "weight_scale": (n, g),
            "weight_shape": (2,),
        }
        return out if symmetric else out | {"weight_zero_point": (-(-n // 8), g)}

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        codes, scales = fields(t["weight_packed"], 4)[:, :k], t["weight_scale"].float()
        each = k // scales.shape[1]
        zeros = torch.full_like(scales, 8, dtype=torch.int32)
        if not symmetric:
            zeros = fields(t["weight_zero_point"].t().contiguous(), 4)[:, :n].t()
        return (codes - zeros.repeat_interleave(each, 1)).float() * scales.repeat_interleave(each, 1)

    kinds = {"weight_packed": _WORDS, "weight_scale": _REAL, "weight_shape": _SIGNED, "weight_zero_point": _WORDS}
    name = "compressed-tensors, pack-quantized"
    return Packing(name, shapes, unpack, "weight_packed", kinds, frozenset({"weight_shape"}))


def _fp8(how: Mapping[str, Any]) -> Packing | None:
    block = how.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        return None
    down, across = block

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n, k), "weight_scale_inv": (-(-n // down), -(-k // across))}

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        return scaled_blocks(t["weight"], t["weight_scale_inv"], down, across)

    return Packing("fp8", shapes, unpack, "weight", {"weight": _FLOAT8, "weight_scale_inv": (*_REAL, "F8_E8M0")})


def _mxfp4() -> Packing:
    """gpt-oss's experts: neighbours in a byte, the first one low; a power of two for every 32 inputs, 127 stands for 1."""

    def shapes(e: int, k: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"_blocks": (e, n, _whole(k, 32), 16), "_scales": (e, n, _whole(k, 32))}

    def unpack(t: Mapping[str, Tensor], e: int, k: int, n: int) -> Float[Tensor, "E K N"]:
        codes = torch.stack([t["_blocks"] & 15, t["_blocks"] >> 4], -1).flatten(-2)
        halves = torch.tensor(FP4_VALUES, dtype=torch.float32)[codes.int()]
        scale = power(t["_scales"].reshape(-1, 1)).masked_fill_(
            t["_scales"].reshape(-1, 1) == 255, torch.nan
        )  # no number
        return halves.mul_(scale.view(e, n, -1, 1)).view(e, n, k).mT

    return Packing("MXFP4", shapes, unpack, "_blocks", {"_blocks": _BYTES, "_scales": _BYTES}, stacked=True)


def _mlx(how: Mapping[str, Any]) -> Packing | None:
    bits, size = how.get("bits"), how.get("group_size")
    others = {key for key in how if key not in ("group_size", "bits", "mode")}  # layers with a width of their own
    if bits not in (4, 8) or not isinstance(size, int) or others or how.get("mode", "affine") != "affine":
        return None

    def shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
        g = _groups(size, k)
        return {"weight": (n, _whole(k * bits, 32)), "scales": (n, g), "biases": (n, g)}

    def unpack(t: Mapping[str, Tensor], n: int, k: int) -> Float[Tensor, "N K"]:
        scales, biases = (t[name].float().repeat_interleave(size, 1) for name in ("scales", "biases"))
        return scales * fields(t["weight"], bits).float() + biases

    return Packing(
        f"MLX, {bits} bits", shapes, unpack, "weight", {"weight": _UNSIGNED, "scales": _REAL, "biases": _REAL}
    )

"""Rotary parameters of a config.json -> frequencies, for each kind of scaling, as transformers computes them."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from outrider.config_keys import ROPE, flag, real, unknown_keys, whole
from outrider.errors import ConfigError
from outrider.models.families import FAMILIES, Family, Unsupported


@dataclass(frozen=True, slots=True)
class Turns:
    """How queries and keys of a layer are turned. inv_freq: [rotary / 2] frequencies; scale: of cosines and sines."""

    inv_freq: Float[Tensor, "half"]
    scale: float


def turns_of(
    raw: dict, family: Family, head_dim: int, positions: int, length: int, where: object
) -> tuple[Turns, Turns | None]:
    """How heads are turned, and in layers with a window if that differs. length: most positions that are used."""
    if family.scaled and not (raw.get("rope_scaling") or raw.get("rope_parameters")):
        raise Unsupported("its configuration does not say how positions are scaled")
    if "rope_local_base_freq" not in family.options:
        return _turns(rope_keys(raw, family.theta), raw, family, head_dim, positions, length, where), None
    full, local = (
        _turns(rope, {}, family, head_dim, positions, length, where) for rope in rope_keys_by_kind(raw, family)
    )
    return full, local


def rope_keys_by_kind(raw: dict, family: Family) -> tuple[dict, dict]:
    """`rope_keys` of a family with `rope_local_base_freq`: of layers that see everything, and of those with a window."""
    given = raw.get("rope_parameters") or {}
    if isinstance(given, dict):  # some releases of transformers write two keys of other families beside these
        given = {k: v for k, v in given.items() if (k, v) not in (("rope_theta", None), ("rope_type", "default"))}
    if not isinstance(given, dict) or given.keys() - {"full_attention", "sliding_attention"}:
        raise Unsupported("its rotary parameters are not those of full_attention and sliding_attention")
    own = [given.get("full_attention") or {}, given.get("sliding_attention") or {}, raw.get("rope_scaling") or {}]
    if not all(isinstance(part, dict) for part in own):
        raise Unsupported("its rotary parameters are not keys with values")
    # there `type`, the older name, says nothing
    unscaled = {} if raw.get("rope_parameters") else {"rope_type": "default"}
    full = {"rope_theta": raw.get("rope_theta", family.theta)} | unscaled | own[0] | own[2]
    local = {"rope_theta": raw.get("rope_local_base_freq", 1e4)} | own[1]
    return rope_keys({"rope_parameters": full}, family.theta), rope_keys({"rope_parameters": local}, family.theta)


def _turns(rope: dict, raw: dict, family: Family, head_dim: int, positions: int, length: int, where: object) -> Turns:
    """Frequencies and the factor of cos and sin, computed in float32 in the order transformers computes them."""
    kind = rope["rope_type"]
    part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if not family.partial:
        if part not in (None, 1, 1.0):
            raise Unsupported("partial_rotary_factor is not 1")
        part = 1.0
    share = real({"partial_rotary_factor": part}, "partial_rotary_factor", where, null=family.rotary, least=1e-3)
    size = int(head_dim * share)
    if size < 2 or size % 2:
        raise Unsupported(f"{size} numbers of a head are turned")
    theta = real(rope, "rope_theta", where, family.theta, least=1.0, most=1e12)
    inv_freq = plain_frequencies(theta, size)
    if kind == "default":
        return Turns(inv_freq, 1.0)
    if family.longrope:
        return _longrope(rope, theta, size, positions, length, where)
    if kind == "linear":
        return Turns(inv_freq / real(rope, "factor", where, least=1e-6, most=1e6), 1.0)
    if kind == "llama3":
        return Turns(_llama3(inv_freq, rope, positions, where), 1.0)
    if kind == "yarn":
        return Turns(*_yarn(rope, theta, size, positions, where))
    raise Unsupported(f"rotary scaling {reprlib.repr(kind)}")


def halves(rows: Shaped[Tensor, "N width"], heads: int, head_dim: int, turned: int) -> Shaped[Tensor, "N width"]:
    """Rows of queries or keys in the order of their halves, where they are stored as interleaved rotary pairs.

    Of every head's rows the first `turned` are such pairs, the others stay. Whole rows move, so blocks stay as they are; queries
    and keys move alike, so their products stay.
    """
    parts = rows.view(heads, head_dim, -1)
    pairs = parts[:, :turned].reshape(heads, turned // 2, 2, -1).transpose(1, 2).reshape(heads, turned, -1)
    return torch.cat([pairs, parts[:, turned:]], 1).reshape(rows.shape)


def original_context(raw: dict) -> int | None:
    """The context up to which a LongRoPE model is turned by its short factors; None for every other model."""
    kind = raw.get("model_type")
    rope = rope_keys(raw) if isinstance(kind, str) and kind in FAMILIES and FAMILIES[kind].longrope else {}
    old = rope.get("original_max_position_embeddings", 4096)
    return old if rope.get("rope_type") == "longrope" and isinstance(old, int) else None


def rope_keys(raw: dict, theta: float = 10000.0) -> dict:
    """The rotary parameters of a config.json, wherever it has them; always with rope_theta (the family's if absent) and
    rope_type."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise Unsupported("rotary parameters differ between layers")
    unknown = unknown_keys(given, ROPE)
    if unknown:
        raise Unsupported(f"the rotary parameters have a key {unknown[0][:80]!r} that is not known here")
    rope = {"rope_theta": raw.get("rope_theta", theta), "rope_type": given.get("type", "default")} | given
    if "original_max_position_embeddings" in raw:  # beside the parameters it takes precedence over a value among them
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return rope


def _longrope(rope: dict, theta: float, size: int, positions: int, length: int, where: object) -> Turns:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753) within the original context; transformers turns longer texts by other
    frequencies from their first token on, which a cache does not allow."""
    if rope["rope_type"] not in ("longrope", "su", "yarn"):
        raise Unsupported(f"rotary scaling {reprlib.repr(rope['rope_type'])}")
    old = whole(rope, "original_max_position_embeddings", where, default=4096, least=2, most=1 << 26)
    if length > old:
        raise Unsupported(
            f"its positions are scaled anew beyond {old} tokens (longrope); a max_length of {old} avoids that"
        )
    divisors = longrope_divisors(rope, "short_factor", size, where)
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    factor = real(rope, "factor", where, positions / old, null=positions / old, least=1e-6, most=1e6)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    scale = real(rope, "attention_factor", where, default, null=default, least=1e-6, most=1e6)
    return Turns(1.0 / (divisors * powers), scale)


def longrope_divisors(rope: dict, key: str, size: int, where: object) -> Float[Tensor, "half"]:
    """What LongRoPE divides the frequencies of `size` turned numbers by; key: "short_factor" or "long_factor"."""
    given = rope.get(key)
    if not isinstance(given, list) or len(given) != size // 2:
        raise ConfigError(f"{where}: {key} must list {size // 2} numbers: the file is damaged, download it again")
    return torch.tensor([real({key: f}, key, where, least=1e-6, most=1e6) for f in given])


def plain_frequencies(theta: float, head_dim: int) -> Float[Tensor, "half"]:
    """Rotary frequencies before any scaling, in the order transformers computes them."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _llama3(inv_freq: Float[Tensor, "half"], rope: dict, positions: int, where: object) -> Float[Tensor, "half"]:
    """Llama 3.1: divide frequencies slower than the old context by `factor`, keep fast ones, blend between."""
    factor = real(rope, "factor", where, least=1e-6, most=1e6)
    low, high = (
        real(rope, "low_freq_factor", where, least=1e-6, most=1e6),
        real(rope, "high_freq_factor", where, least=1e-6, most=1e6),
    )
    if high <= low:
        raise ConfigError(f"{where}: high_freq_factor ({high}) must exceed low_freq_factor ({low}): correct the file")
    old = whole(rope, "original_max_position_embeddings", where, default=positions, most=1 << 26)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > old / low, inv_freq / factor, inv_freq)
    smooth = (old / wavelength - low) / (high - low)
    between = ~(wavelength < old / high) * ~(wavelength > old / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(
    rope: dict, theta: float, head_dim: int, positions: int, where: object
) -> tuple[Float[Tensor, "half"], float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow frequencies, keep fast ones, a ramp between."""
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise Unsupported("yarn with mscale")
    if "factor" not in rope:
        raise Unsupported("yarn without a factor")
    if theta == 1:
        raise ConfigError(f"{where}: rope_theta is 1, which yarn cannot scale: the file is damaged, download it again")
    old = whole(rope, "original_max_position_embeddings", where, default=positions, most=1 << 26)
    factor = real(rope, "factor", where, positions / old, null=positions / old, least=1e-6, most=1e6)

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(old / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = dimension(real(rope, "beta_fast", where, 32.0, null=32.0, least=1e-6, most=1e6))
    high = dimension(real(rope, "beta_slow", where, 1.0, null=1.0, least=1e-6, most=1e6))
    if rope.get("truncate", True) is not None and flag(rope, "truncate", where, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / ((high + 0.001 if low == high else high) - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    keep = 1 - ramp
    default = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    scale = real(rope, "attention_factor", where, default, null=default, least=1e-6, most=1e6)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, scale

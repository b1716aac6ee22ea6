"""A folder in Hugging Face format to a GGUF file, in a type of one's choice; the `gguf` package writes it (`outrider[gguf]`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.adapter import home_of
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import CONFIG, Unsupported, read_raw_config, shapes_of
from outrider.models.decoder import DecoderConfig
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.config import ARCHITECTURES, FACTORS, query_scalar
from outrider.models.gguf.mixtures import mixture_keys
from outrider.models.gguf.names import EMBEDDING, HEAD, ROUTER, gguf_name
from outrider.models.gguf.vocabulary_out import vocabulary_keys
from outrider.models.rotary import (
    longrope_divisors,
    original_context,
    plain_frequencies,
    rope_keys,
    rope_keys_by_kind,
)
from outrider.models.stacked import parts_of
from outrider.nn.blocks import BlockType, Segment, finite, named, quantise

ARCHITECTURE = {row.family: name for name, row in ARCHITECTURES.items()} | {"mistral": "llama", "mixtral": "llama"}
"""The families that are written -> their names in GGUF."""
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q5_k": 16, "q6_k": 18, "bf16": 32,
    "mxfp4": 38,
}  # fmt: skip
"""How llama.cpp numbers files that are mostly of a type; the types that can be written."""
_NARROWER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp takes instead for rows that are no whole blocks."""
TYPES = tuple(_FILE_TYPES)


def type_for(name: str, shape: tuple[int, ...], wanted: BlockType) -> BlockType:
    """The type of a tensor in a file that is mostly `wanted`, by llama.cpp's rules: norms, biases and routers in float32, the
    output matrix in at least 6 bits, what fits no block in a wider type; mxfp4 for experts alone, q8_0 beside them."""
    if len(shape) == 1 or name.endswith((ROUTER, ".bias")):
        return named("f32")
    if wanted.plain:
        return wanted
    chosen = wanted.name if wanted.name != "mxfp4" or len(shape) == 3 else "q8_0"
    if name in (EMBEDDING, HEAD) and chosen != "q8_0":
        chosen = "q6_k"
    if shape[-1] % named(chosen).values:
        chosen = _NARROWER.get(chosen, chosen)
    return named("bf16") if shape[-1] % named(chosen).values else named(chosen)


def convert(folder: Path, out: Path, kind: str, progress: Callable[[float], None] | None = None) -> dict[str, int]:
    """Write the model of `folder` to `out` in blocks of the type `kind` (a name of TYPES); returns bytes by type.

    The file appears when it is complete. Raises ConfigError for a family, a tokenizer or a type that cannot be written.
    """
    if kind not in _FILE_TYPES:
        raise ConfigError(f"cannot write type {kind!r}: choose one of {', '.join(_FILE_TYPES)}")
    try:
        checkpoint = Checkpoint(folder, max_length=original_context(read_raw_config(home_of(folder, CONFIG))))
    except Unsupported as reason:
        raise ConfigError(f"{folder} cannot be written: {reason}; convert it with llama.cpp's converter") from None
    if kind == "mxfp4" and checkpoint.config.experts is None:
        raise ConfigError(f"{folder} has no experts, and mxfp4 is a type of theirs alone: choose q4_0 or q4_k")
    keys = _keys(folder, checkpoint, kind)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        found = _write(checkpoint, beside, keys, named(kind), progress or (lambda _: None))
        _check_same(
            folder, checkpoint.config, GgufCheckpoint(beside).config
        )  # before it takes the place of another file
        os.replace(beside, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)
    return found


def _check_same(folder: Path, c: DecoderConfig, read: DecoderConfig) -> None:
    """Raise ConfigError if a file that was read back describes another network than its folder."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=0)
        if isinstance(a, float) and isinstance(b, float):  # a file's numbers have single precision
            return math.isclose(a, b, rel_tol=1e-6)
        return a == b

    names = [field.name for field in fields(c) if field.name not in ("family", "max_length")]
    other = [name for name in names if not same(getattr(c, name), getattr(read, name))]
    if other:
        raise ConfigError(
            f"{folder} would become another model, since GGUF says its {' and '.join(other)} otherwise: it cannot be written"
        )


def _write(
    checkpoint: Checkpoint, path: Path, keys: dict[str, Any], wanted: BlockType, progress: Callable[[float], None]
) -> dict[str, int]:
    gguf = _package()
    writer = gguf.GGUFWriter(path, ARCHITECTURE[checkpoint.config.family])
    for key, value in keys.items():
        _add(writer, key, value)
    plan = [(name, shape, type_for(name, shape, wanted)) for name, shape in _shapes(checkpoint).items()]
    divisors = _divisors(checkpoint)
    total: dict[str, int] = {}
    for name, shape, block in plan:
        count = torch.Size(shape).numel() // shape[-1] * block.row_bytes(shape[-1])
        total[block.name] = total.get(block.name, 0) + count
        size = (*shape[:-1], block.row_bytes(shape[-1]))
        writer.add_tensor_info(
            gguf_name(name, checkpoint.layout.family), size, _UINT8, count, gguf.GGMLQuantizationType(block.number)
        )
    for name, numbers in divisors.items():
        writer.add_tensor_info(name, numbers.shape, numbers.numpy().dtype, numbers.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, (name, _, block) in enumerate(plan):
            rows = [_stored(name, part.reshape(-1, part.shape[-1]), block) for part in _parts(checkpoint, name)]
            writer.write_tensor_data((rows[0] if len(rows) == 1 else torch.cat(rows)).numpy())
            progress((i + 1) / len(plan))
        for numbers in divisors.values():
            writer.write_tensor_data(numbers.numpy())
    finally:
        writer.close()
    return total


def _stored(name: str, values: Tensor, block: BlockType) -> Tensor:
    """Rows as a type stores them. Raises ConfigError for what no file that can be read has: values that are no finite numbers, or
    too large for the type."""
    if not bool(values.isfinite().all()):
        raise ConfigError(
            f"tensor {name} has values that are no finite numbers: the checkpoint is damaged, download it again"
        )
    rows = quantise(values, block)
    if not finite(Segment(block, rows)):
        raise ConfigError(f"tensor {name} has values that are too large for {block.name}: choose bf16 or f32")
    return rows


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is written: a head that equals the embedding is not."""
    shapes = shapes_of(checkpoint.layout, HEAD in checkpoint.shapes, "stacked")
    if HEAD in shapes and checkpoint.layout.tied and torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING)):
        del shapes[HEAD]
    return shapes


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor in float32, a part at a time; rows of queries and keys as interleaved pairs where the architecture has them so."""
    c, family = checkpoint.config, checkpoint.layout.family
    pairs = (
        ARCHITECTURES[ARCHITECTURE[c.family]].interleaved and not family.interleaved
    )  # their order is the file's already
    heads = {"q_proj": c.heads, "k_proj": c.kv_heads} if pairs else {}
    count = next((n for part, n in heads.items() if f".{part}." in name), 0)
    for tensor in parts_of(checkpoint, name):
        if count:
            tensor = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).transpose(1, 2).reshape(tensor.shape)
        yield tensor


def _divisors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the rotary frequencies are divided by, where they are scaled one by one (Llama 3.1, LongRoPE), by names of tensors."""
    if checkpoint.config.local_freq is not None:
        return {}
    family, c = checkpoint.layout.family, checkpoint.config
    rope, size = rope_keys(checkpoint.raw, family.theta), 2 * len(c.inv_freq)
    if family.longrope and rope["rope_type"] != "default":
        return {tensor: longrope_divisors(rope, key, size, CONFIG) for key, tensor in FACTORS.items()}
    if rope["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": (plain_frequencies(rope["rope_theta"], size) / c.inv_freq).float()}


def _keys(folder: Path, checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    c = checkpoint.config
    if c.family not in ARCHITECTURE:
        raise ConfigError(
            f"{folder} is a {c.family}, which cannot be written yet: convert it with llama.cpp's converter"
        )
    rope, local = _rope(folder, checkpoint)
    _check_layers(folder, checkpoint)
    window = max(c.window)
    sizes: dict[str, Any] = {
        "context_length": int(checkpoint.raw.get("max_position_embeddings", c.max_length)),
        "embedding_length": c.hidden, "block_count": c.layers, "feed_forward_length": c.inner,
        "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.eps,
        "rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": 2 * len(c.inv_freq), "vocab_size": c.vocab_size,
        **_scaling(folder, rope, checkpoint), **_constants(checkpoint, local), **mixture_keys(c, folder),
        **({"attention.sliding_window": window} if window else {}),
    }  # fmt: skip
    arch = ARCHITECTURE[c.family]
    general = {
        "general.name": folder.resolve().name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    words = {
        f"tokenizer.{key}": value
        for key, value in vocabulary_keys(home_of(folder, "tokenizer.json"), c.vocab_size).items()
    }
    return general | {f"{arch}.{key}": value for key, value in sizes.items()} | words


def _rope(folder: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary parameters, and those of layers with a window if they differ."""
    raw, family = checkpoint.raw, checkpoint.layout.family
    if checkpoint.config.local_freq is None:
        return rope_keys(raw, family.theta), {}
    rope, local = rope_keys_by_kind(raw, family)
    if local["rope_type"] != "default" or rope["rope_type"] == "llama3":
        raise ConfigError(
            f"{folder} scales its positions in a way for which GGUF has no key here: convert it with llama.cpp"
        )
    return rope, local


def _check_layers(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse kinds of layers in another order than the one that readers of this architecture take for given."""
    c, family = checkpoint.config, checkpoint.layout.family
    every, none = family.pattern, not max(c.window)
    usual = tuple(max(c.window) if not every or i % every else 0 for i in range(1, c.layers + 1))
    turns = tuple(0 if i % 4 else -1 for i in range(1, c.layers + 1)) if "no_rope_layers" in family.options else c.turns
    if c.window != usual or c.turns != turns:
        raise ConfigError(
            f"{folder} has windows or unturned layers in another order than GGUF has a key for here: convert it with llama.cpp"
        )
    if every and none and ARCHITECTURES[ARCHITECTURE[c.family]].windowless != "none":
        raise ConfigError(
            f"{folder} has no sliding window, and readers of GGUF take one for given in its architecture: it cannot be written"
        )
    scale, share = checkpoint.raw.get("query_pre_attn_scalar", 256), c.hidden // c.heads
    if "query_pre_attn_scalar" in family.options and scale != query_scalar(c.family, c.layers, share, c.head_dim):
        raise ConfigError(
            f"{folder} scales its scores by {scale}, for which GGUF has no key: convert it with llama.cpp"
        )


def _constants(checkpoint: Checkpoint, local: dict[str, Any]) -> dict[str, float]:
    """The constants of a family by their keys, see `gguf.config`. local: of `_rope`."""
    c, known = checkpoint.config, ARCHITECTURES[ARCHITECTURE[checkpoint.config.family]].keys
    values = {
        "final_logit_softcapping": c.logit_cap, "attn_logit_softcapping": c.attention_cap, "attention.scale": c.attention_scale,
        "embedding_scale": c.embed_scale, "residual_scale": c.residual_scale, "logit_scale": 1 / c.logit_scale,
        "rope.freq_base_swa": local.get("rope_theta"),
    }  # fmt: skip
    return {key: float(value) for key, value in values.items() if key in known and value}


def _scaling(folder: Path, rope: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    positions = checkpoint.config.max_length
    if checkpoint.layout.family.longrope and rope["rope_type"] != "default":
        old = int(rope.get("original_max_position_embeddings", positions))
        return {"rope.scaling.original_context_length": old, "rope.scaling.attn_factor": checkpoint.config.rope_scale}
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # the divisors say it
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    cut = not checkpoint.layout.family.scaled  # whether readers take the ends of the ramp for whole numbers
    if kind == "yarn" and rope.get("attention_factor") is None and rope.get("truncate", True) is cut:
        old = int(rope.get("original_max_position_embeddings", positions))
        factor = positions / old if rope["factor"] is None else float(rope["factor"])
        out = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        out["rope.scaling.original_context_length"] = old
        betas = {
            f"rope.scaling.yarn_{name}": float(rope[name]) for name in ("beta_fast", "beta_slow") if rope.get(name)
        }
        return out | betas
    raise ConfigError(
        f"{folder} scales its positions by {kind!r} in a way that cannot be written: use llama.cpp's converter"
    )


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with its value, in the type of GGUF that readers expect."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    writer.add_array(key, value) if isinstance(value, list) else add[type(value)](key, value)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF needs the package gguf: pip install 'outrider[gguf]'") from None
    return gguf


_UINT8 = torch.empty(0, dtype=torch.uint8).numpy().dtype

"""A folder in Hugging Face format to a GGUF file, in a type of one's choice; the `gguf` package writes it (`outrider[gguf]`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.models.adapter import home_of
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import Unsupported, plain_frequencies, rope_keys
from outrider.models.gguf.names import EMBEDDING, HEAD, gguf_name
from outrider.models.gguf.vocabulary_out import vocabulary_keys
from outrider.nn.blocks import BlockType, named, quantise

ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""The families that are written -> their names in GGUF."""
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q5_k": 16, "q6_k": 18, "bf16": 32,
}  # fmt: skip
"""How llama.cpp numbers files that are mostly of a type; the types that can be written."""
_NARROWER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp takes instead for rows that are no whole blocks."""
TYPES = tuple(_FILE_TYPES)


def type_for(name: str, shape: tuple[int, ...], wanted: BlockType) -> BlockType:
    """The type of a tensor in a file that is mostly `wanted`, by llama.cpp's rules: norms and biases in float32, the output matrix
    in at least 6 bits, what fits no block in a wider type."""
    if len(shape) == 1:
        return named("f32")
    if wanted.plain:
        return wanted
    chosen = wanted.name
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
        checkpoint = Checkpoint(folder)
    except Unsupported as reason:
        raise ConfigError(f"{folder} cannot be written: {reason}; convert it with llama.cpp's converter") from None
    keys = _keys(folder, checkpoint, kind)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        found = _write(checkpoint, beside, keys, named(kind), progress or (lambda _: None))
        os.replace(beside, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)
    return found


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
        writer.add_tensor_info(gguf_name(name), size, _UINT8, count, gguf.GGMLQuantizationType(block.number))
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.numpy().dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, (block, tensor) in enumerate(_tensors(checkpoint, plan)):
        writer.write_tensor_data(quantise(tensor.reshape(-1, tensor.shape[-1]), block).numpy())
        progress((i + 1) / len(plan))
    if divisors is not None:
        writer.write_tensor_data(divisors.numpy())
    writer.close()
    return total


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is written: a head that equals the embedding is not."""
    shapes = dict(checkpoint.shapes)
    if HEAD in shapes and checkpoint.layout.tied and torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING)):
        del shapes[HEAD]
    return shapes


def _tensors(checkpoint: Checkpoint, plan: list[Any]) -> Iterator[tuple[BlockType, Tensor]]:
    """Each tensor in float32, one at a time; rows of queries and keys as interleaved pairs where the architecture has them so."""
    c = checkpoint.config
    heads = {"q_proj": c.heads, "k_proj": c.kv_heads} if ARCHITECTURE[c.family] == "llama" else {}
    for name, _, block in plan:
        tensor = checkpoint.tensor(name)
        count = next((n for part, n in heads.items() if f".{part}." in name), 0)
        if count:
            tensor = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).transpose(1, 2).reshape(tensor.shape)
        yield block, tensor


def _divisors(checkpoint: Checkpoint) -> Tensor | None:
    """What the rotary frequencies are divided by, where they are scaled one by one (Llama 3.1)."""
    rope = rope_keys(checkpoint.raw)
    if rope["rope_type"] != "llama3":
        return None
    return (plain_frequencies(rope["rope_theta"], checkpoint.config.head_dim) / checkpoint.config.inv_freq).float()


def _keys(folder: Path, checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    c, rope = checkpoint.config, rope_keys(checkpoint.raw)
    theta = float(rope["rope_theta"])
    if c.family not in ARCHITECTURE:
        raise ConfigError(
            f"{folder} is a {c.family}, which cannot be written yet: convert it with llama.cpp's converter"
        )
    if len(set(c.window)) > 1:
        raise ConfigError(
            f"{folder} has windows in some layers only, which GGUF has no key for here: convert it with llama.cpp"
        )
    sizes: dict[str, Any] = {
        "context_length": c.max_length, "embedding_length": c.hidden, "block_count": c.layers, "feed_forward_length": c.inner,
        "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.eps, "rope.freq_base": theta,
        "rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size, **_scaling(folder, rope, c.max_length),
        **({"attention.sliding_window": c.window[0]} if c.window[0] else {}),
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


def _scaling(folder: Path, rope: dict[str, Any], positions: int) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # the divisors say it
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and rope.get("attention_factor") is None and rope.get("truncate", True):
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

"""From a folder or a Hub name to a target: the lean runtime if it supports the model, else transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from outrider import options
from outrider.errors import ConfigError, unknown_name
from outrider.models.adapter import home_of, is_adapter
from outrider.models.admit import admit
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import Unsupported, read_raw_config
from outrider.models.decoder import DecoderWeights
from outrider.models.dtypes import choose_dtype, device_named, dtype_notices, is_emulated, named_dtype
from outrider.models.entries import read_entries
from outrider.models.folder import require_config, resolve_folder
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.parts import is_gguf
from outrider.models.lean import LeanTarget
from outrider.models.native.runtime import library_for
from outrider.models.places import check_numbers
from outrider.models.quantised import block_type, input_notices, quantised_target
from outrider.models.reading import Progress
from outrider.models.tokenizer import (
    find_tokenizer,
    load_tokenizer,
    stop_ids,
    vocab_fingerprint,
)
from outrider.nn.large_pages import LargePages
from outrider.nn.memory import available_memory, require_weights
from outrider.nn.stored import KV_DTYPES
from outrider.protocols import Target
from outrider.theory.experts import Routing

__all__ = [
    "Facts",
    "available_memory",
    "find_tokenizer",
    "inspect_checkpoint",
    "load_target",
    "load_tokenizer",
    "stop_ids",
    "vocab_fingerprint",
]


def load_target(
    path_or_name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    implementation: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    input_bits: int = 8,
    max_length: int | None = None,
    progress: Progress | None = None,
    role: str = "model",
) -> Target:
    """A target from a folder in Hugging Face format (safetensors), a GGUF file or a Hub name; no code from it is run.

    dtype:          "auto", or "bfloat16", "float16", "float32", "float64". Auto is bfloat16 on a CPU that multiplies it
                    (AVX512_BF16, AMX, ARM's bf16) or, for bfloat16 checkpoints, that has the native decoder (half the
                    bytes to read, arithmetic in float32), else float32; on a GPU the checkpoint's own.
    device:         "auto" (a GPU if there is one), or a PyTorch device.
    implementation: "lean" (our runtime), "hf" (transformers), or "auto": lean if possible; else `notices` give the reason.
    quantize:       None, or a type of `models.quantised.QUANTIZE` to round the weights to; needs the lean runtime.
    kv_dtype:       how keys and values are stored: one of `nn.stored.KV_DTYPES`; others than "auto" need the lean runtime.
    input_bits:     one of `options.INPUT_BITS`: to how many bits products with weights in blocks round their inputs.
    max_length:     tokens of context, at most the model's; None for all of them.
    progress:       called with the share of the weights read so far.
    role:           the model's role in messages: "target", "draft".

    Raises ConfigError for a wrong option or checkpoint, CapacityError if the weights do not fit into memory.
    """
    if implementation not in options.IMPLEMENTATIONS:
        raise ConfigError(unknown_name("implementation", implementation, options.IMPLEMENTATIONS))
    if quantize is not None:
        block_type(quantize)
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(unknown_name("type of keys and values", kv_dtype, KV_DTYPES))
    where = device_named(device)
    named_dtype(dtype)
    folder = resolve_folder(path_or_name)
    require_config(folder)
    found = _runtime(folder, implementation, max_length)
    if isinstance(found, str) and kv_dtype != "auto":
        raise ConfigError(
            f"kv_dtype {kv_dtype!r} needs the lean runtime, which does not run {folder}{f' ({found})' if found else ''}: leave "
            "kv_dtype out"
        )
    if isinstance(found, str) and input_bits != 8:
        raise ConfigError(f"input_bits {input_bits} needs the lean runtime, which does not run {folder}: leave it out")
    if isinstance(found, str):
        return _load_hf(folder, dtype, where, quantize, max_length, found, role)
    chosen = choose_dtype(dtype, found.layout.stored, where, lean=True)
    if input_bits not in options.INPUT_BITS:
        raise ConfigError(f"input_bits must be one of {options.INPUT_BITS}, got {input_bits!r}")
    twice = input_bits > 8
    blocks = isinstance(found, GgufCheckpoint) and found.blocks
    if twice and quantize is None and not blocks:
        raise ConfigError(
            f"input_bits {input_bits} is for weights in blocks, and those of {folder} are plain: leave it out"
        )
    if quantize is not None and isinstance(found, GgufCheckpoint):
        raise ConfigError(f"{folder} is quantised already: leave --quantize-{role} out")
    if quantize is not None and where.type != "cpu":  # before its weights are read
        raise ConfigError(f"quantised weights run on the CPU only: choose --device cpu, or leave --quantize-{role} out")
    if quantize is not None:
        plain = replace(found.read(chosen, where, progress, role), twice=twice)
        target = quantised_target(found.config, plain, quantize, role)
    elif _native(found, chosen, where)[0] is None:
        target = LeanTarget(found.config, lambda: found.read(chosen, where, progress, role))
    else:
        read = _reading(found, chosen, progress, role)
        target = LeanTarget(found.config, lambda: replace(read(), twice=twice))
    target = target.storing(kv_dtype)
    told = found.notice(chosen)
    told += input_notices(target.native is not None) if twice else ()
    target.notices += (*told, *dtype_notices(folder, chosen, where, target.native is not None))
    return target


def first_blocks(
    path_or_name: str | Path, size: int, *, dtype: str = "auto"
) -> tuple[LeanTarget, Callable[[int], float]] | str:
    """A target on the CPU of as many first blocks as take `size` bytes, one at least, and by number of rows its share of the bytes
    that a forward reads, where rows choose experts independently; or a sentence on why there is none. For measuring: what it scores
    means nothing."""
    folder = resolve_folder(path_or_name)
    found = _runtime(folder, "auto")
    if isinstance(found, str):
        return found or "it runs on transformers"
    where = torch.device("cpu")
    chosen = choose_dtype(dtype, found.layout.stored, where, lean=True)
    if _native(found, chosen, where)[0] is None:
        return "the compiled decoder does not run here"
    c = found.config
    whole, blocks, experts = found.bytes_of(chosen)
    read = _reading(found, chosen)
    block = max(blocks // c.layers, 1)
    head = max(whole - block * c.layers, 0) / (1 if found.layout.tied else 2)  # of a separate embedding one row is read
    count = min(max(size // block, 1), c.layers)
    target = LeanTarget(c.first_layers(count), lambda: read(first=count))

    def share(rows: int) -> float:
        e = c.experts
        idle = 0.0 if e is None else experts / c.layers * (1 - Routing.uniform(e.count, e.used).touched(rows) / e.count)
        return ((block - idle) * count + head) / ((block - idle) * c.layers + head)

    return target, share


def _runtime(folder: Path, implementation: str, max_length: int | None = None) -> Checkpoint | GgufCheckpoint | str:
    """A checkpoint that the lean runtime reads, or a sentence on why transformers is used, empty if that is no loss."""
    if is_gguf(folder):
        if implementation == "hf":
            raise ConfigError(
                f"{folder} is a GGUF file, which only the lean runtime reads: leave implementation 'hf' out"
            )
        return GgufCheckpoint(folder, max_length=max_length)
    if is_adapter(folder) and implementation == "hf":
        raise ConfigError(f"{folder} is a LoRA adapter, which the lean runtime merges: leave implementation 'hf' out")
    try:
        checkpoint = Checkpoint(folder, max_length=max_length)
    except (Unsupported, ConfigError) as reason:
        if implementation == "hf":  # transformers reports what is wrong, if anything is
            return ""
        if not isinstance(reason, Unsupported):
            raise
        if is_adapter(folder):
            raise ConfigError(
                f"the adapter {folder} cannot be merged, as the lean runtime does not run its base model ({reason}): merge it with "
                "peft (merge_and_unload) and save that"
            ) from None
        if implementation == "lean":
            raise ConfigError(f"the lean runtime cannot run {folder}: {reason}; use implementation 'hf'") from None
        return (
            f"{folder.name} runs on transformers, not on the lean runtime (slower): {reason}; a model of one of its families "
            "without such options would run on it"
        )
    if implementation == "hf":
        return f"{folder.name} runs on transformers though the lean runtime is faster: leave implementation 'hf' out"
    return checkpoint


def _native(found: Checkpoint | GgufCheckpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The native decoder's library and its notice, (None, None) on other devices. With it GGUF weights stay in blocks."""
    return library_for(found.config, dtype) if device.type == "cpu" else (None, None)


def _reading(found: Checkpoint | GgufCheckpoint, dtype: torch.dtype, *told: Any) -> Callable[..., DecoderWeights]:
    """What reads weights for the compiled decoder, which leaves plain ones where they are. told: progress and role, if any."""
    if isinstance(found, GgufCheckpoint):
        return partial(found.packed, dtype, *told)
    return partial(found.read, dtype, torch.device("cpu"), *told, memory=LargePages())


def reads_emulated(path_or_name: str | Path, dtype: torch.dtype, device: torch.device, implementation: str) -> bool:
    """Whether this checkpoint would run on transformers in a type that this machine multiplies only by emulating it."""
    return is_emulated(dtype, device) and isinstance(_runtime(resolve_folder(path_or_name), implementation), str)


def _load_hf(
    folder: Path,
    dtype: str,
    device: torch.device,
    quantize: str | None,
    max_length: int | None,
    notice: str,
    role: str,
) -> Target:
    from outrider.models.hf.target import HFTarget

    if quantize is not None:
        raise ConfigError(
            f"quantize={quantize!r} needs the lean runtime, which does not run {folder}: leave quantize out"
        )
    raw = read_raw_config(folder)
    admit(folder, raw)
    chosen = choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), device, lean=False)
    entries = read_entries(folder)
    check_numbers({name: entry.stored for name, entry in entries.items()}, bool(raw.get("quantization_config")))
    require_weights(sum(math.prod(entry.shape) for entry in entries.values()), chosen, device, role)
    target = HFTarget.load(folder, dtype=chosen, device=device, max_length=max_length)
    target.notices = (*([notice] if notice else []), *target.notices, *dtype_notices(folder, chosen, device, False))
    return target


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts from a checkpoint's files, without loading weights.

    runtime: "lean" or "transformers". reason: why not lean, or "". stored: the format of its files, with bytes by type. dtype,
    weights_bytes: as it is loaded. kv_bytes_per_token: of one sequence, in `dtype`. notices: why it
    will not run as fast as possible here, as far as files and machine show. experts: how many of a mixture a row uses, and how much
    it reads; "" for others.
    """

    architecture: str
    runtime: str
    reason: str
    parameters: int
    stored: str
    dtype: str
    vocab_size: int
    max_length: int
    weights_bytes: int
    kv_bytes_per_token: int
    notices: tuple[str, ...]
    experts: str


def inspect_checkpoint(path: str | Path, *, dtype: str = "auto", device: str = "auto", role: str = "target") -> Facts:
    """Facts of a folder or Hub name under the options of `load_target`; ConfigError where it raises that, or an engine with it."""
    folder, where = resolve_folder(path), device_named(device)
    require_config(folder)
    found = _runtime(folder, "auto")
    raw = read_raw_config(folder) if isinstance(found, str) else found.raw
    lean = not isinstance(found, str)
    chosen = choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), where, lean=lean)
    if not isinstance(found, str):
        c, parameters, runtime, reason = found.config, found.parameters, "lean", ""
        sizes = (c.vocab_size, c.max_length, c.layers, c.kv_heads, c.head_dim)
        library, library_notice = _native(found, chosen, where)
        told = found.notice(chosen)
        weights_bytes = parameters * chosen.itemsize
        if isinstance(found, GgufCheckpoint) and library is not None:
            weights_bytes = found.packed_bytes
    else:
        runtime, reason, library, library_notice, told = "transformers", found, None, found, ()
        parameters = sum(math.prod(entry.shape) for entry in read_entries(folder).values())
        sizes = _sizes_by_transformers(admit(folder, raw, tried=True))
        weights_bytes = parameters * chosen.itemsize
    if role == "target":
        stop_ids(folder, rows=sizes[0])
    vocab_size, max_length, layers, kv_heads, head_dim = sizes
    named = raw.get("architectures") or [raw.get("model_type", "unknown")]
    return Facts(
        architecture=str(named[0]) if isinstance(named, list) and named else str(named),
        runtime=runtime,
        reason=reason,
        parameters=parameters,
        stored=_stored(folder, found),
        dtype=str(chosen).removeprefix("torch."),
        vocab_size=vocab_size,
        max_length=max_length,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * chosen.itemsize,
        notices=(
            *told,
            *([library_notice] if library_notice else []),
            *dtype_notices(folder, chosen, where, library is not None),
        ),
        experts="" if isinstance(found, str) else _experts(found, chosen),
    )


def _experts(found: Checkpoint | GgufCheckpoint, dtype: torch.dtype) -> str:
    c, e = found.config, found.config.experts
    if e is None:
        return ""
    whole, _, experts = found.bytes_of(dtype)
    embedding = 0 if found.layout.tied else c.vocab_size * c.hidden * whole // found.parameters
    read = whole - embedding - experts * (e.count - e.used) // e.count
    return f"{e.used} of {e.count} a row, which reads about {read / 2**20:.1f} of {whole / 2**20:.1f} MiB"


def _stored(folder: Path, found: Checkpoint | GgufCheckpoint | str) -> str:
    """The format of a model's files, and their bytes by type, the largest first."""
    gguf = isinstance(found, GgufCheckpoint)
    sizes: dict[str, int] = {}
    for kind, size in (
        found.stored_bytes() if gguf else ((e.stored, e.bytes) for e in read_entries(home_of(folder)).values())
    ):
        sizes[kind] = sizes.get(kind, 0) + size
    told = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in sorted(sizes.items(), key=lambda i: -i[1]))
    return f"{'GGUF' if gguf else 'safetensors'}: {told}"


def _sizes_by_transformers(config: Any) -> tuple[int, int, int, int, int]:
    """Vocabulary, positions, layers, key heads and their size, as transformers reads them; 0 if a model has no such value."""
    text = config.get_text_config(decoder=True)
    heads = _size(text, "num_attention_heads")
    kv_heads = _size(text, "num_key_value_heads") or heads
    head_dim = _size(text, "head_dim") or (_size(text, "hidden_size") // heads if heads else 0)
    names = ("vocab_size", "max_position_embeddings", "num_hidden_layers")
    vocab_size, positions, layers = (_size(text, name) for name in names)
    return vocab_size, positions, layers, kv_heads, head_dim


def _size(config: Any, name: str) -> int:
    """A number of a configuration of transformers, 0 if it has none. Where layers differ it is the largest."""
    try:
        found = [getattr(config, name, None)]
    except Exception:  # some classes refuse to name one value for layers that differ, with errors of their own
        found = [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", ())]
    return max((n for n in found if isinstance(n, int)), default=0)

"""From a folder or a Hub name to a target: the lean runtime where it can, transformers where it must."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.errors import ConfigError, unknown_name
from outrider.packed import QUANTIZE
from outrider.protocols import Target
from outrider.target.checkpoint import Checkpoint, Progress, read_entries
from outrider.target.config import Unsupported, read_raw_config
from outrider.target.folder import resolve_folder
from outrider.target.lean import LeanTarget
from outrider.target.memory import available_memory, require_memory
from outrider.target.native.build import load_library
from outrider.target.places import check_numbers
from outrider.target.tokenizer import (
    find_tokenizer,
    first_difference,
    load_tokenizer,
    stop_ids,
    vocab_fingerprint,
)

__all__ = [
    "Facts",
    "available_memory",
    "find_tokenizer",
    "first_difference",
    "inspect_checkpoint",
    "load_target",
    "load_tokenizer",
    "stop_ids",
    "vocab_fingerprint",
]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "lean", "hf")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def load_target(
    path_or_name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    implementation: str = "auto",
    quantize: str | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    role: str = "model",
) -> Target:
    """A target from a folder in Hugging Face format or a Hub name; safetensors only, and no code from the checkpoint is run.

    dtype:          "auto", or "bfloat16", "float16", "float32", "float64". Auto is bfloat16 on a CPU that multiplies it
                    (AVX512_BF16, AMX, ARM's bf16) or, for bfloat16 checkpoints, that has the native decoder (half the
                    bytes to read, arithmetic in float32), else float32; on a GPU the checkpoint's own.
    device:         "auto" (a GPU if there is one), or a PyTorch device.
    implementation: "lean" (our runtime), "hf" (transformers), or "auto": lean where it can; `notice` says why not.
    quantize:       None, or "int8" / "int4" weights: for drafts, needs the lean runtime.
    max_length:     tokens of context, at most the model's; None for all of them.
    progress:       called with the share of the weights read so far.
    role:           what it is to its user, for messages: "target", "draft".

    Raises ConfigError for a wrong option or checkpoint, CapacityError if the weights do not fit into memory.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(unknown_name("implementation", implementation, IMPLEMENTATIONS))
    if quantize is not None and quantize not in QUANTIZE:
        raise ConfigError(unknown_name("quantize", quantize, QUANTIZE))
    where = _device(device)
    _named_dtype(dtype)
    folder = resolve_folder(path_or_name)
    if implementation == "hf":
        return _load_hf(folder, dtype, where, quantize, max_length, None, role)
    try:
        checkpoint = Checkpoint(folder, max_length=max_length)
        stored = checkpoint.layout.stored
        return LeanTarget(
            checkpoint.config,
            lambda: checkpoint.read(_choose_dtype(dtype, stored, where), where, progress, role),
            quantize=quantize,
        )
    except Unsupported as reason:
        if implementation == "lean":
            raise ConfigError(f"the lean runtime cannot run {folder}: {reason}; use implementation 'hf'") from None
        notice = f"{folder.name} runs on transformers, not on the lean runtime (slower): {reason}"
        return _load_hf(folder, dtype, where, quantize, max_length, notice, role)


def _load_hf(
    folder: Path,
    dtype: str,
    device: torch.device,
    quantize: str | None,
    max_length: int | None,
    notice: str | None,
    role: str,
) -> Target:
    from outrider.target.hf import HFTarget

    if quantize is not None:
        raise ConfigError(
            f"quantize={quantize!r} needs the lean runtime, which does not run {folder}: leave quantize out"
        )
    raw = read_raw_config(folder)
    chosen = _choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), device)
    entries = read_entries(folder)
    packing = raw.get("quantization_config")
    packing = packing if isinstance(packing, dict) else {}
    quantized = "quant_method" in packing
    check_numbers({name: entry.stored for name, entry in entries.items()}, quantized)
    size = sum(math.prod(entry.shape) for entry in entries.values()) * chosen.itemsize
    require_memory(size, device, f"the weights of the {role}", f"choose a smaller {role} or dtype, or free memory")
    try:
        target = HFTarget.load(folder, dtype=chosen, device=device, max_length=max_length)
    except ConfigError as error:
        if not quantized:
            raise
        raise ConfigError(
            f"{folder} is quantized ({str(packing['quant_method'])[:40]}) and transformers cannot run it here: use the unquantized "
            f"checkpoint ({error})"
        ) from None
    target.notice = notice
    if notice is not None:
        logger.warning("%s", notice)
    return target


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint's files say, without loading weights.

    runtime: "lean" or "transformers"; reason: why not lean, or "". kv_bytes_per_token: of one sequence, in `dtype`.
    """

    architecture: str
    runtime: str
    reason: str
    parameters: int
    dtype: str
    vocab_size: int
    max_length: int
    weights_bytes: int
    kv_bytes_per_token: int


def inspect_checkpoint(path_or_name: str | Path, *, dtype: str = "auto", device: str = "auto") -> Facts:
    """Facts of a folder or Hub name under the options of `load_target`; raises ConfigError for what that would refuse."""
    folder, where = resolve_folder(path_or_name), _device(device)
    raw = read_raw_config(folder)
    chosen = _choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), where)
    entries = read_entries(folder)
    try:
        checkpoint = Checkpoint(folder)
        c, parameters, runtime, reason = checkpoint.config, checkpoint.parameters, "lean", ""
        sizes = (c.vocab_size, c.max_length, c.layers, c.kv_heads, c.head_dim)
    except Unsupported as why:
        runtime, reason = "transformers", str(why)
        parameters = sum(math.prod(entry.shape) for entry in entries.values())
        sizes = _sizes_by_transformers(folder)
    vocab_size, max_length, layers, kv_heads, head_dim = sizes
    named = raw.get("architectures") or [raw.get("model_type", "unknown")]
    return Facts(
        architecture=str(named[0]) if isinstance(named, list) and named else str(named),
        runtime=runtime,
        reason=reason,
        parameters=parameters,
        dtype=str(chosen).removeprefix("torch."),
        vocab_size=vocab_size,
        max_length=max_length,
        weights_bytes=parameters * chosen.itemsize,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * chosen.itemsize,
    )


def _sizes_by_transformers(folder: Path) -> tuple[int, int, int, int, int]:
    """Vocabulary, positions, layers, key heads and their size, as transformers reads them; 0 where a model has no such thing."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        brief = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"transformers cannot read {folder / 'config.json'} ({brief}): use another model") from None
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    positions = getattr(text, "max_position_embeddings", None) or 0
    return text.vocab_size, positions, text.num_hidden_layers, kv_heads, head_dim


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} is not there (PyTorch sees no GPU); use 'auto' or 'cpu'")
    return device


def _named_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise ConfigError(unknown_name("dtype", name, ["auto", *DTYPES]))
    return DTYPES.get(name)


def _choose_dtype(name: str, stored: object, device: torch.device) -> torch.dtype:
    named = _named_dtype(name)
    if named is not None:
        return named
    if device.type != "cpu":
        return DTYPES.get(str(stored), torch.bfloat16)
    if _cpu_multiplies_bfloat16() or (DTYPES.get(str(stored)) is torch.bfloat16 and load_library() is not None):
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products (Linux says so; elsewhere float32 is the safe choice)."""
    try:
        with open("/proc/cpuinfo") as info:
            flags = next((line.split() for line in info if line.lower().startswith(("flags", "features"))), [])
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)

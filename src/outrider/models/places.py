"""Refuses tensors that a model does not use, or that are packed codes, because ignoring them would change the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from outrider.errors import ConfigError

_DERIVED = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Ends of names of buffers that old releases stored and that follow from the configuration."""
_APART = re.compile(r"(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mtp|mtp_block)\.")
"""Prefixes of names of parts that do not affect text: vision, audio, and heads for drafting."""


def without_place(names: Iterable[str]) -> list[str]:
    """Of the tensors that a model does not use, those that it must not ignore, sorted and shortened for a message."""
    return sorted(name[:120] for name in names if not _DERIVED.search(name) and not _APART.match(name))


def refuse_extra(names: Iterable[str], checkpoint: str) -> None:
    """Raise ConfigError for tensors that a model does not use."""
    extra = without_place(names)
    if extra:
        raise ConfigError(
            f"checkpoint {checkpoint!r} has {len(extra)} tensors that its configuration has no place for, {extra[0]} first (an "
            "adapter, scales or biases that are not merged?): without them it is another model; use a merged, unquantized one"
        )


def check_numbers(stored: Mapping[str, str], quantized: bool) -> None:
    """Raise ConfigError for weights that are codes and not numbers, unless the configuration says how to read them.

    stored: name of a tensor -> safetensors' name of its type.
    """
    codes = sorted(
        name
        for name, kind in stored.items()
        if name.endswith("weight") and re.match(r"[IUC]\d|BOOL|F4|F6_|F8_E8M0", kind)
    )
    if codes and not quantized:
        raise ConfigError(
            f"tensor {codes[0][:120]} is stored as {stored[codes[0]]} and config.json has no quantization_config that says how to "
            "read it (MLX and others pack weights so): use the unquantized checkpoint"
        )

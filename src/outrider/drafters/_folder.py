"""Folders of learned drafters: config.json and model.safetensors, read with every field checked, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import Target

CONFIG_BYTES = 1 << 20
WEIGHT_BYTES = 16 << 30
TYPE_KEYS = ("speculators_model_type", "model_type")


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "model.safetensors"
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes 0600, which an installed package must not have


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a drafter of this kind. Raises ConfigError for a folder that holds anything else."""
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise ConfigError(f"{folder} holds no trained drafter: it needs config.json and model.safetensors")
    if config_file.stat().st_size > CONFIG_BYTES or weights.stat().st_size > WEIGHT_BYTES:
        raise ConfigError(f"{folder}: a file is larger than a drafter's can be; check the path")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config_file} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{config_file} is not a JSON object")
    found = next((config[key] for key in TYPE_KEYS if key in config), None)
    if found != kind:
        raise ConfigError(f"{folder} holds a model of type {found!r}, not {kind!r}: use the drafter of that name")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise ConfigError(f"{weights} cannot be read ({error}): download or train it again") from None


def whole(config: Mapping[str, Any], key: str, folder: Path, *, default: int | None = None, most: int = 1 << 24) -> int:
    """A whole number of 1 .. `most` from a configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{folder}: {key} must be a whole number of 1 .. {most}, got {value!r}")
    return value


def check_fits(folder: Path, target: Target, *, hidden: int, vocab_size: int, layers: tuple[int, ...]) -> None:
    """CapabilityError if a drafter was trained for a target of other sizes."""
    if hidden != target.hidden_size or vocab_size != target.vocab_size:
        raise CapabilityError(
            f"{folder} was trained for a target of width {hidden} and {vocab_size} tokens, this one has "
            f"{target.hidden_size} and {target.vocab_size}: use the drafter of this target"
        )
    if any(not 0 <= layer <= target.layers for layer in layers):
        raise CapabilityError(f"{folder} reads layers {layers} and the target has only {target.layers}")

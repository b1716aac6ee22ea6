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
from outrider.files import read_json, read_weight_map
from outrider.protocols import Target

CONFIG_BYTES = 1 << 20
WEIGHT_BYTES = 16 << 30
TYPE_KEYS = ("speculators_model_type", "model_type")
SPECULATORS_VERSION = "0.9.0"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "model.safetensors"
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes 0600, which an installed package must not have


def read_folder(folder: Path, kind: str | tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a drafter of this kind, or of one of these kinds. ConfigError for a folder of another kind."""
    config, found = read_config(folder)
    kinds = (kind,) if isinstance(kind, str) else kind
    if found not in kinds:
        raise ConfigError(f"{folder} holds a model of type {found!r}, not {kinds[0]!r}: use the drafter of that name")
    tensors: dict[str, Tensor] = {}
    for weights in weight_files(folder):
        try:
            part = load_file(weights)
        except SafetensorError as error:
            raise ConfigError(f"{weights} cannot be read ({error}): download or train it again") from None
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise ConfigError(f"{folder}: tensor {twice[0][:120]} is in two files: download it again")
        tensors |= part
    return config, tensors


def weight_files(folder: Path, index_bytes: int = CONFIG_BYTES) -> list[Path]:
    """The weight files of a drafter's folder: one, or those its index names. Raises ConfigError if they are missing or pickled, or
    the index is longer than `index_bytes`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
            raise ConfigError(
                f"{folder} holds pickled weights, which can run code when read: convert them to model.safetensors "
                "(safetensors.torch.save_file) where you trust them"
            )
        raise ConfigError(f"{folder} holds no trained drafter: it needs config.json and model.safetensors")
    names = sorted(set(read_weight_map(index, index_bytes).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index} names {name[:80]!r}, which is not a safetensors file of this folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing: download the drafter again")
    return [folder / name for name in names]


def read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Configuration of a drafter's folder and the model type it names. Raises ConfigError if there is no configuration."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{folder} holds no trained drafter: it needs config.json and model.safetensors")
    size = sum(weights.stat().st_size for weights in weight_files(folder))
    if config_file.stat().st_size > CONFIG_BYTES or size > WEIGHT_BYTES:
        raise ConfigError(f"{folder}: a file is larger than a drafter's can be; check the path")
    config = read_json(config_file, CONFIG_BYTES)
    found = next((config[key] for key in TYPE_KEYS if key in config), None)
    if found == "llama" and ("draft_vocab_size" in config or "eagle3" in str(config.get("architectures")).lower()):
        found = "eagle3"  # EAGLE's own folders name the family of the layer
    return config, found


def check_fits(folder: Path, target: Target, *, hidden: int, vocab_size: int, layers: tuple[int, ...]) -> None:
    """Raise CapabilityError if a drafter was trained for a target of other sizes."""
    if hidden != target.hidden_size or vocab_size != target.vocab_size:
        raise CapabilityError(
            f"{folder} was trained for a target of width {hidden} and {vocab_size} tokens, this one has "
            f"{target.hidden_size} and {target.vocab_size}: use the drafter of this target"
        )
    if any(not 0 <= layer <= target.layers for layer in layers):
        raise CapabilityError(f"{folder} reads layers {layers} and the target has only {target.layers}")


def speculators_config(algorithm: str, tokens: int, verifier: str) -> dict[str, Any]:
    """The part of a `speculators` configuration that is the same for all drafters."""
    greedy = {
        "proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0,
    }  # fmt: skip
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [greedy],
        "verifier": {"name_or_path": verifier, "architectures": []},
    }


def fill(model: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """Load `tensors` in float32 into `model` (built without storage); raises ConfigError if names, shapes or types differ."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    extra, absent = sorted(tensors.keys() - wanted.keys()), sorted(wanted.keys() - tensors.keys())
    if extra or absent:
        what = f"it has no place for {extra[0][:120]}" if extra else f"{absent[0]} is not there"
        raise ConfigError(
            f"{folder}: the tensors are not those its config.json describes ({what}): download or train it again"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            what = f"{name} has shape {list(tensor.shape)}, not {list(wanted[name])}"
            raise ConfigError(
                f"{folder}: the tensors are not those its config.json describes ({what}): download it again"
            )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{folder}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: use the unquantized drafter"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)

"""Folders of learned drafters: config.json and model.safetensors, read with every field checked, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.errors import CapabilityError, ConfigError
from outrider.files import read_json, read_weight_map
from outrider.protocols import OpenTarget, Target

CONFIG_BYTES = 1 << 20
WEIGHT_BYTES = 16 << 30
TYPE_KEYS = ("speculators_model_type", "model_type")
SPECULATORS_VERSION = "0.9.0"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "model.safetensors"
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes 0600, which an installed package must not have


def read_folder(folder: Path, kind: str | tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a drafter of this kind, or of one of these. ConfigError for a folder of anything else."""
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
            raise ConfigError(f"{folder}: tensor {twice[0][:120]} lies in two files: download it again")
        tensors |= part
    return config, tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a drafter's folder: one, or those its index names. Raises ConfigError where they are not to be had."""
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
    names = sorted(set(read_weight_map(index, CONFIG_BYTES).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index} names {name[:80]!r}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing: download the drafter again")
    return [folder / name for name in names]


def read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Configuration of a drafter's folder and the kind it says it is of. Raises ConfigError where there is none."""
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


def target_parts(target: Target, folder: Path) -> dict[str, Tensor]:
    """Token tables and final norm of a target, float32, by their names in a drafter's folder that leaves them out.

    Raises CapabilityError for a target that does not give them.
    """
    if not isinstance(target, OpenTarget):
        raise CapabilityError(
            f"{folder} leaves out what is the target's own, and a {type(target).__name__} does not give it"
        )
    with torch.no_grad():
        unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
        return {
            "embed_tokens.weight": target.embed(torch.arange(target.vocab_size, device=target.device)).float().cpu(),
            "lm_head.weight": target.head(unit).float().T.cpu(),
            "norm.weight": target.norm(torch.ones_like(unit[:1]))[0].float().cpu(),
        }


def check_fits(folder: Path, target: Target, *, hidden: int, vocab_size: int, layers: tuple[int, ...]) -> None:
    """CapabilityError if a drafter was trained for a target of other sizes."""
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


def output_head(target: Target, target_path: str | None, folder: Path) -> Tensor:
    """The target's output matrix [V, H] without its final norm, float32: of its folder, or its embeddings if it shares them.

    Raises ConfigError where the matrix is neither in the folder nor the embedding table.
    """
    table = target.embed(torch.arange(target.vocab_size, device=target.device)).float()
    files = sorted(Path(target_path).expanduser().glob("*.safetensors")) if target_path is not None else []
    for file in files:
        with safe_open(file, "pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor("lm_head.weight").float()
    if files:
        return table  # a checkpoint without a head of its own ties it to the embeddings
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
    normed = target.unembed(unit * target.hidden_size**0.5).float().T / target.hidden_size**0.5  # head times final norm
    norm = (normed * table).sum(0) / table.square().sum(0).clamp(min=1e-12)
    if not torch.allclose(normed, table * norm, rtol=1e-2, atol=1e-2 * float(normed.abs().max())):
        raise ConfigError(
            f"{folder} holds no lm_head.weight, and the target's is not at hand: load the target from its folder"
        )
    return table

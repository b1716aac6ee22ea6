"""What learned drafters take from their target: token tables, final norm, and the output matrix with or without the norm.

They come from the target itself, if it is an `OpenTarget`; from its folder, bit for bit; or from logits of unit vectors, which
every target can compute.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import OpenTarget, Target


def embeddings(target: Target) -> Float[Tensor, "V H"]:
    """The target's embeddings of all its tokens, float32."""
    return target.embed(torch.arange(target.vocab_size, device=target.device)).float()


def target_tables(target: Target, folder: Path | str) -> dict[str, Tensor]:
    """Token tables and final norm of a target, float32, under the names used in drafter folders that leave them out.

    Raises CapabilityError for a target that does not expose them.
    """
    if not isinstance(target, OpenTarget):
        raise CapabilityError(
            f"{folder} does not hold the target's own tables, and a {type(target).__name__} does not expose them"
        )
    with torch.no_grad():
        unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
        return {
            "embed_tokens.weight": embeddings(target).cpu(),
            "lm_head.weight": target.head(unit).float().T.cpu(),
            "norm.weight": target.norm(torch.ones_like(unit[:1]))[0].float().cpu(),
        }


def output_head(target: Target, target_path: str | None, folder: Path) -> Tensor:
    """The target's output matrix [V, H] without its final norm, float32: from its folder, from itself if it
    exposes it, or its embeddings if they are tied.

    Raises ConfigError if the matrix is neither in the folder nor equal to the embedding table.
    """
    table = embeddings(target)
    files = sorted(Path(target_path).expanduser().glob("*.safetensors")) if target_path is not None else []
    for file in files:
        with safe_open(file, "pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor("lm_head.weight").float()
    if files:
        return table  # a checkpoint without a head of its own ties it to the embeddings
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
    if isinstance(target, OpenTarget):  # a GGUF file, or a target that was given as an object
        return target.head(unit).float().T
    normed = target.unembed(unit * target.hidden_size**0.5).float().T / target.hidden_size**0.5  # head times final norm
    norm = (normed * table).sum(0) / table.square().sum(0).clamp(min=1e-12)
    if not torch.allclose(normed, table * norm, rtol=1e-2, atol=1e-2 * float(normed.abs().max())):
        raise ConfigError(
            f"{folder} holds no lm_head.weight, and the target's is not available: load the target from its folder"
        )
    return table


@torch.no_grad()
def output_of(target: Target) -> Float[Tensor, "V H"]:
    """The target's final norm and head as one matrix: logits of unit vectors, whose direction an RMS norm keeps."""
    size = target.hidden_size**0.5
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device) * size
    return target.unembed(unit).float().T / size

"""What learned drafters take from their target: its token tables, its final norm, and its output matrix with the norm or without.

A target gives them in different ways: itself, if it is open; through its folder, whose bits are exact; or through logits of
unit vectors, which every target gives.
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
            "embed_tokens.weight": embeddings(target).cpu(),
            "lm_head.weight": target.head(unit).float().T.cpu(),
            "norm.weight": target.norm(torch.ones_like(unit[:1]))[0].float().cpu(),
        }


def output_head(target: Target, target_path: str | None, folder: Path) -> Tensor:
    """The target's output matrix [V, H] without its final norm, float32: of its folder, or its embeddings if it shares them.

    Raises ConfigError where the matrix is neither in the folder nor the embedding table.
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
    normed = target.unembed(unit * target.hidden_size**0.5).float().T / target.hidden_size**0.5  # head times final norm
    norm = (normed * table).sum(0) / table.square().sum(0).clamp(min=1e-12)
    if not torch.allclose(normed, table * norm, rtol=1e-2, atol=1e-2 * float(normed.abs().max())):
        raise ConfigError(
            f"{folder} holds no lm_head.weight, and the target's is not at hand: load the target from its folder"
        )
    return table


@torch.no_grad()
def output_of(target: Target) -> Float[Tensor, "V H"]:
    """The target's final norm and head as one matrix: logits of unit vectors, which an RMS norm leaves as they are."""
    size = target.hidden_size**0.5
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device) * size
    return target.unembed(unit).float().T / size

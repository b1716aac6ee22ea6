"""Initialisation of a drafter: the target's tables, its final norm, and weights of a size that keeps rows at about one."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from outrider.drafters.target_tables import output_head, output_of
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import Unsupported
from outrider.models.folder import resolve_folder
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.parts import is_gguf
from outrider.protocols import Target


@torch.no_grad()
def init_decoder(model: nn.Module) -> None:
    """Draw every trained matrix with variance 1 / inputs; matrices that add to the residual stream a tenth as large."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and weight.requires_grad:
            small = 0.1 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=small * weight.shape[1] ** -0.5)


@torch.no_grad()
def scale_taps(fc: nn.Linear, taps: Float[Tensor, "n T H"]) -> None:
    """Divide the part of `fc` that reads each of T taps by the size of that tap, which differs by layer."""
    scale = taps.float().square().mean((0, 2)).sqrt()
    fc.weight.view(fc.out_features, taps.shape[1], -1).div_(scale.to(fc.weight)[None, :, None])


def heads_of(width: int, sizes: tuple[int, ...]) -> int:
    """The first of `sizes` of a head that divides the width; 0 if none does."""
    return next((d for d in sizes if width % d == 0), 0)


def inner_of(width: int) -> int:
    """Width of a feed-forward part: 8/3 of the model's, rounded up to a multiple of 32."""
    return -(-8 * width // 3 // 32) * 32


def narrow(table: Float[Tensor, "V H"], width: int) -> Float[Tensor, "V D"]:
    """The best approximation of rank `width` of a table's inner products, in as many columns."""
    if table.shape[1] <= width:
        return torch.nn.functional.pad(table, (0, width - table.shape[1]))
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    return table @ directions[:width].T


def head_of(path: Path | str, target: Target) -> tuple[Tensor, Tensor]:
    """The target's output matrix as `DFlashNetwork.load` finds it, and the weights of the final norm before it."""
    folder = resolve_folder(path)
    head = output_head(target, str(folder), folder).to(target.device)
    norm = (output_of(target) * head).sum(0) / head.square().sum(0).clamp(min=1e-12)
    return head, norm


def final_norm(target: Path | str) -> Tensor | None:
    """Weights of the target's final norm, if the lean runtime's reader supports the target."""
    try:
        folder = resolve_folder(target)
        checkpoint = GgufCheckpoint(folder) if is_gguf(folder) else Checkpoint(folder)
        return checkpoint.norm()
    except Unsupported:
        return None

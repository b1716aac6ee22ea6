"""The network and its folder: one matrix that foresees the target's next hidden state from its last one, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outrider.config_keys import whole
from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.config_keys import check_keys
from outrider.drafters.target_tables import output_of
from outrider.protocols import Target


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """hidden, vocab_size: of the target. tap: the block that is read. levels: tokens that can be drafted."""

    hidden: int
    vocab_size: int
    tap: int
    levels: int


class LinearNetwork(nn.Module):
    """Level d has logits head(A^d f), f the normed hidden state; the head, with the target's final norm in it, is the target's."""

    def __init__(self, config: LinearConfig, head: Float[Tensor, "V H"]) -> None:
        super().__init__()
        self.config = config
        self.step = nn.Linear(config.hidden, config.hidden, bias=False)
        self.head: Tensor
        self.register_buffer("head", head, persistent=False)  # never written: it is the target's

    def forward(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "levels *n V"]:
        """Logits of every level for hidden states of the block `tap`."""
        f, out = F.rms_norm(hidden, hidden.shape[-1:]), []
        for _ in range(self.config.levels):
            f = self.step(f)
            out.append(f @ self.head.T)
        return torch.stack(out)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (bfloat16)."""
        c = self.config
        config = {"model_type": "linear", "hidden_size": c.hidden, "vocab_size": c.vocab_size, "target_layer": c.tap}
        write_folder(folder, config | {"num_levels": c.levels}, {"step.weight": self.step.weight.bfloat16()})

    @classmethod
    def load(cls, folder: Path, target: Target) -> LinearNetwork:
        """A network of a folder for `target`. Raises ConfigError for another folder, CapabilityError for another target."""
        config, tensors = read_folder(folder, "linear")
        check_keys(config, {"hidden_size", "vocab_size", "target_layer", "num_levels"}, folder)
        made = LinearConfig(
            hidden=whole(config, "hidden_size", folder),
            vocab_size=whole(config, "vocab_size", folder),
            tap=whole(config, "target_layer", folder, default=target.layers),
            levels=whole(config, "num_levels", folder, most=64),
        )
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=(made.tap,))
        return fill(cls(made, output_of(target)), tensors, folder)

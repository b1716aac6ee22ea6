"""Medusa heads: small networks on the target's last hidden state, head h for the token h positions later (Cai et al. 2024).

All heads read the same hidden state and none reads the others' tokens, so one call gives every level of a tree.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outrider.config_keys import flag
from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.medusa.format import MedusaConfig, read_config
from outrider.drafters.target_tables import target_tables
from outrider.drafters.vocabulary import checked, spread
from outrider.errors import ConfigError
from outrider.protocols import Target


class _Head(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class MedusaNetwork(nn.Module):
    """logits_h = W_h r_h(f) with residual blocks r_h: x + silu(A x + b), f the target's normed last hidden state.

    Tensors are named as vLLM names them (`blocks.h.layers.j.weight`, `lm_heads.h.weight`), plus `norm.weight`, the target's
    final norm. Blocks start at the identity: every head starts as `lm_heads`, which a trainer starts as the target's own.
    support: [S] target tokens of the heads' columns if they draft a subset of the vocabulary, else None.
    """

    support: Tensor | None

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.hidden, config.eps)
        self.blocks = nn.ModuleList(_Head(config.hidden, config.layers) for _ in range(config.heads))
        outputs, size = 1 if config.shared else config.heads, config.draft_vocab or config.vocab_size
        self.lm_heads = nn.ModuleList(nn.Linear(config.hidden, size, bias=False) for _ in range(outputs))
        self.register_buffer("support", None, persistent=False)  # a folder holds it as token_map
        for block in self.blocks:
            for layer in block.layers:  # type: ignore[union-attr]
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def rows(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n heads H"]:
        """What every head multiplies with its output matrix."""
        f = self.norm(hidden)
        return torch.stack([block(f) for block in self.blocks], -2)

    def forward(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n heads V"]:
        """Logits of every head for hidden states before the final norm."""
        x = self.rows(hidden)
        if self.config.shared:
            logits = self.lm_heads[0](x)
        else:
            logits = torch.stack([head(x[..., h, :]) for h, head in enumerate(self.lm_heads)], -2)
        return spread(logits, self.support, self.config.vocab_size)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (bfloat16) in vLLM's Medusa layout."""
        c = self.config
        write_folder(
            folder,
            {
                "architectures": ["MedusaModel"],
                "model_type": "medusa",
                "hidden_size": c.hidden,
                "vocab_size": c.vocab_size,
                "truncated_vocab_size": c.draft_vocab or c.vocab_size,
                "num_heads": c.heads,
                "num_hidden_layers": c.layers,
                "medusa_fc_bias": True,
                "original_lm_head": c.shared,
                "rms_norm_eps": c.eps,
                "target_layer": c.tap,
            },
            {name: value.bfloat16() for name, value in self.state_dict().items()}
            | ({} if self.support is None else {"token_map": self.support}),
        )

    @classmethod
    def load(cls, folder: Path, target: Target) -> MedusaNetwork:
        """The heads in a folder, for `target`; the final norm is the target's if the folder does not hold it.

        Raises ConfigError for another kind of folder, CapabilityError for heads of a target of other sizes.
        """
        config, tensors = read_folder(folder, "medusa")
        if not flag(config, "medusa_fc_bias", folder, True):
            tensors |= {
                n.removesuffix("weight") + "bias": t.new_zeros(t.shape[0])
                for n, t in tensors.items()
                if n.startswith("blocks.")
            }
        made = read_config(config, folder, target)
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=(made.tap,))
        support = tensors.pop("token_map", None)
        if made.draft_vocab and (support is None or support.shape != (made.draft_vocab,)):
            raise ConfigError(f"{folder}: heads over {made.draft_vocab} tokens need a token_map of as many")
        if "norm.weight" not in tensors:
            tensors["norm.weight"] = target_tables(target, folder)["norm.weight"]
        with torch.device("meta"):
            model = cls(made)
        if made.draft_vocab and support is not None:
            model.support = checked(support.long(), made.vocab_size, folder)
        return fill(model, tensors, folder)

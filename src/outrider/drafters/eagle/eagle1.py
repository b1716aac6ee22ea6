"""EAGLE-1: a drafter that predicts the target's last hidden state and applies the target's head to it.

Li et al. 2024 (EAGLE, arXiv 2401.15077): the feature of a position is the input of the target's head there, after the final norm.
`fc` joins it with the embedding of the next token; one decoder layer without an input norm gives the feature of the next
position. Embeddings and head are the target's, frozen. With `dynamic:` trees the same weights are EAGLE-2's drafter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.config_keys import whole
from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.config_keys import LAYER, check_keys, check_layers, layer_keys, layer_shape
from outrider.drafters.eagle.network import Attention, EagleConfig, EagleNetwork
from outrider.drafters.target_tables import target_tables
from outrider.errors import ConfigError
from outrider.nn.drafts import Features, Join
from outrider.nn.layers import Mlp
from outrider.protocols import Target

TABLES = ("embed_tokens.weight", "lm_head.weight", "norm.weight")
"""The target's own tables: taken from the target if a folder does not hold them, and never written."""


class _Layer(nn.Module):
    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c, c.hidden)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp = Mlp(c.hidden, c.inner)


class Eagle1Network(EagleNetwork):
    """The network; tensors are named as in EAGLE's own files. hidden = target_hidden, and one tap: the target's last block."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        c = config
        if c.hidden != c.target_hidden or len(c.taps) != 1:
            raise ConfigError(
                f"an EAGLE-1 drafter has the width of its target and one tap, got {c.hidden}, {c.target_hidden}, {c.taps}"
            )
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.fc = nn.Linear(2 * c.hidden, c.hidden)
        self.layers = nn.ModuleList([_Layer(c)])
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab_size, bias=False)
        for table in (self.embed_tokens, self.norm, self.lm_head):
            table.requires_grad_(False)

    def read(self, taps: Float[Tensor, "*n K H"]) -> Float[Tensor, "*n D"]:
        """The input of the target's head: its last hidden state, normed."""
        return self.norm(taps[..., 0, :])

    def rows(self, token: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Embeddings."""
        return self.embed_tokens(token)

    def join(self, row: Float[Tensor, "*n D"], g: Float[Tensor, "*n D"]) -> tuple[Tensor, Tensor]:
        """Token and feature through `fc`: the residual, which is also the attention's input."""
        x = self.fc(torch.cat([row, g], -1))
        return x, x

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """The target's head on a predicted feature."""
        return self.lm_head(state)

    @property
    def features(self) -> Features:
        c = self.config
        return Features(
            1, c.hidden, Join.THROUGH, fused_norm=self.norm.weight, joint=self.fc.weight, joint_bias=self.fc.bias
        )

    @property
    def output(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        return None, self.lm_head.weight, None

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path, verifier: str = "") -> None:
        """Write EAGLE's own layout (bfloat16) without the target's tables. verifier: name or path of the target."""
        c = self.config
        write_folder(
            folder,
            {
                "architectures": ["EagleLlamaForCausalLM"],
                "model_type": "eagle",
                "base_model": verifier,
                **layer_keys(c, 1),
                "bias": True,
                "rope_theta": c.rope_theta,
                "target_layer": c.taps[0],
                "dtype": "bfloat16",
            },
            {name: value.bfloat16() for name, value in self.state_dict().items() if name not in TABLES},
        )

    @classmethod
    def load(cls, folder: Path, target: Target) -> Eagle1Network:
        """The drafter in a folder, for `target`; raises ConfigError for another kind of folder or unsupported settings."""
        config, tensors = read_folder(folder, ("eagle", "llama"))
        made = _read_config(config, folder, target)
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=made.taps)
        if "fc.bias" not in tensors and "fc.weight" in tensors:
            tensors["fc.bias"] = torch.zeros(made.hidden)
        if any(name not in tensors for name in TABLES):
            tensors = target_tables(target, folder) | tensors
        with torch.device("meta"):
            model = cls(made)
        return fill(model, tensors, folder)


def _read_config(config: dict[str, Any], folder: Path, target: Target) -> EagleConfig:
    if whole(config, "num_hidden_layers", folder, default=1) != 1:
        raise ConfigError(f"{folder}: a feature drafter has one layer")
    check_keys(config, LAYER | {"bias", "base_model", "target_layer"}, folder)
    check_layers({**config, "model_type": "llama"}, folder, "llama")
    made = layer_shape(config, folder)
    return EagleConfig(
        **made, target_hidden=made["hidden"], taps=(whole(config, "target_layer", folder, default=target.layers),)
    )

"""A head for multi-token prediction: the target's last hidden state and the next token, normed and joined, through one layer.

DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437, section 2.2): the head reads the hidden state h of a position and the embedding of
the token after it, h' = M [norm(Emb(t)); norm(h)], and its decoder layer's output goes through a norm and the target's own output
matrix. A head is trained for one token. For further ones it reads its own output in place of the target's, as EAGLE does.

h is what enters an output matrix: the target's state behind its final norm and, further on, the head's own behind its norm. That is
what Megatron trains, SGLang runs for all and vLLM for Qwen3-Next and MiMo (for DeepSeek it feeds back the state before the norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.config_keys import LAYER as LAYER_KEYS
from outrider.drafters.config_keys import check_keys, check_layers, layer_keys, layer_shape
from outrider.drafters.eagle.network import Attention, EagleConfig, EagleNetwork
from outrider.drafters.mtp.format import LAYER, carried
from outrider.drafters.target_tables import target_tables
from outrider.errors import ConfigError
from outrider.nn.drafts import Features, Join
from outrider.nn.layers import Mlp
from outrider.protocols import Target

KIND = "mtp"
"""`model_type` of a folder that holds a trained head."""
TABLES = ("embed_tokens.weight", "lm_head.weight", "target_norm.weight")
"""The target's own: taken from the target, and never written."""
Head = TypeVar("Head", bound="MtpHead")


@dataclass(frozen=True, slots=True)
class MtpConfig(EagleConfig):
    """hidden = target_hidden, and one tap: the target's last block. bias, qk_norm: see `eagle.network.Attention`."""

    bias: bool = False
    qk_norm: bool = False


class MtpHead(EagleNetwork):
    """What every head has beside its decoder layer. fc: of [token, feature]. target_norm: the target's final norm.

    embed_tokens, lm_head, target_norm are the target's own and are not trained.
    """

    config: MtpConfig

    def __init__(self, config: MtpConfig) -> None:
        super().__init__(config)
        c = config
        if c.hidden != c.target_hidden or len(c.taps) != 1:
            raise ConfigError(
                f"an MTP head has the width of its target and one tap, got {c.hidden}, {c.target_hidden}, {c.taps}"
            )
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.token_norm = nn.RMSNorm(c.hidden, c.eps)
        self.hidden_norm = nn.RMSNorm(c.hidden, c.eps)
        self.fc = nn.Linear(2 * c.hidden, c.hidden, bias=False)
        self.layers = nn.ModuleList()
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.target_norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab_size, bias=False)
        for table in (self.embed_tokens, self.target_norm, self.lm_head):
            table.requires_grad_(False)

    def read(self, taps: Float[Tensor, "*n K H"]) -> Float[Tensor, "*n D"]:
        """The input of the target's head: its last hidden state, normed."""
        return self.target_norm(taps[..., 0, :])

    def rows(self, token: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Normed embeddings."""
        return self.token_norm(self.embed_tokens(token))

    def join(self, row: Float[Tensor, "*n D"], g: Float[Tensor, "*n D"]) -> tuple[Tensor, Tensor]:
        """Normed token and normed feature through `fc`: the input of the decoder layer."""
        x = self.fc(torch.cat([row, self.hidden_norm(g)], -1))
        return x, x

    def feed(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """The head's output behind its norm stands for the target's behind its own."""
        return self.norm(state)

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """The target's output matrix on the normed output."""
        return self.lm_head(self.norm(state))

    @property
    def features(self) -> Features:
        return Features(
            1, self.config.hidden, Join.THROUGH, fused_norm=self.target_norm.weight, token_norm=self.token_norm.weight,
            feature_norm=self.hidden_norm.weight, joint=self.fc.weight,
        )  # fmt: skip

    @property
    def output(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        return self.norm.weight, self.lm_head.weight, None

    @classmethod
    def filled(cls: type[Head], config: MtpConfig, tensors: Mapping[str, Tensor], folder: Path, target: Target) -> Head:
        """With these tensors of a folder, and the tables of `target` that they leave out. Raises ConfigError, CapabilityError."""
        check_fits(folder, target, hidden=config.hidden, vocab_size=config.vocab_size, layers=config.taps)
        tables = target_tables(target, folder)
        tables["target_norm.weight"] = tables.pop("norm.weight")
        with torch.device("meta"):
            model = cls(config)
        return fill(model, tables | dict(tensors), folder)


class _Layer(nn.Module):
    def __init__(self, c: MtpConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c, c.hidden, bias=c.bias, norms=c.qk_norm)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp = Mlp(c.hidden, c.inner)


class MtpNetwork(MtpHead):
    """A head with a dense layer of Llama's, Qwen2's or Qwen3's kind, which is trained and compiled here."""

    def __init__(self, config: MtpConfig) -> None:
        super().__init__(config)
        self.layers.append(_Layer(config))

    def join(self, row: Float[Tensor, "*n D"], g: Float[Tensor, "*n D"]) -> tuple[Tensor, Tensor]:
        """The residual, and what the projections of the attention read."""
        x, _ = super().join(row, g)
        return x, self._layer.input_layernorm(x)

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path, verifier: str = "") -> None:
        """Write the head without the target's tables (bfloat16). verifier: name or path of the target."""
        c = self.config
        write_folder(
            folder,
            {
                "architectures": ["MtpHead"],
                "model_type": KIND,
                "base_model": verifier,
                **layer_keys(c, 1),
                "rope_theta": c.rope_theta,
                "dtype": "bfloat16",
            },
            {name: value.bfloat16() for name, value in self.state_dict().items() if name not in TABLES},
        )

    @classmethod
    def load(cls, folder: Path, target: Target, number: int = 0) -> MtpNetwork:
        """The head in a folder, for `target`: one that was trained here, or that of a checkpoint with a dense layer. number: which
        of a checkpoint's heads, from 0.

        Raises ConfigError for another kind of folder, unsupported settings or another kind of layer.
        """
        head = carried(folder)
        if head is None:
            config, tensors = read_folder(folder, KIND)
            check_keys(config, LAYER_KEYS | {"base_model"}, folder)
            check_layers({**config, "model_type": "llama"}, folder, "llama")
        else:
            config, tensors = head.config, head.tensors(number)
            apart = ("attention_bias", "qkv_bias", "model_type")  # whether there are biases, the tensors say
            check_layers({key: value for key, value in config.items() if key not in apart}, folder, "llama")
        shape = layer_shape(config, folder)
        made = MtpConfig(
            **shape,
            target_hidden=shape["hidden"],
            taps=(target.layers,),
            bias=f"{LAYER}self_attn.q_proj.bias" in tensors,
            qk_norm=f"{LAYER}self_attn.q_norm.weight" in tensors,
        )
        return cls.filled(made, tensors, folder, target)

"""Block-diffusion drafters in the manner of DFlash (arXiv 2602.06036): a whole block of tokens from one pass.

A block is the anchor followed by copies of a mask token; slot k predicts the token k positions after the anchor. Hidden states of
the target at the positions before the anchor are fused by `fc` and *injected*: they become keys and values of every layer only.
Within the block attention is bidirectional. There is one denoising step, so no slot depends on the tokens of the others: given
the context, the draft distribution is a product of the slots' distributions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.dflash.format import TABLES, DFlashConfig, layout, read_config
from outrider.drafters.target_tables import embeddings, output_head
from outrider.drafters.vocabulary import from_offsets
from outrider.errors import ConfigError
from outrider.nn.layers import Mlp
from outrider.nn.rope import frequencies, rotation, turn
from outrider.protocols import Target


class _Attention(nn.Module):
    """Projections with per-head norms before the rotation, as in Qwen3; context and block use the same key matrices."""

    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.eps)


class _Layer(nn.Module):
    def __init__(self, c: DFlashConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp = Mlp(c.hidden, c.inner)


Keys = list[tuple[Float[Tensor, "r T h d"], Float[Tensor, "r T h d"]]]
"""Per layer the rotated keys and the values of the context rows."""


class DFlashNetwork(nn.Module):
    """The network; tensors are named as in the `speculators` layout of DFlash. Both token tables are the target's, frozen."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.fc = nn.Linear(len(c.taps) * c.hidden, c.hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(c.hidden, c.eps)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab_size, bias=False)
        self.embed_tokens.weight.requires_grad_(False)
        self.lm_head.weight.requires_grad_(False)

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*n, 1, head_dim] of rotary positions, in the module's dtype."""
        c = self.config
        cos, sin = rotation(position, frequencies(c.head_dim, c.rope_theta, position.device))
        return cos.to(self.fc.weight.dtype), sin.to(self.fc.weight.dtype)

    def inject(self, taps: Float[Tensor, "r T K H"]) -> Keys:
        """Keys and values of context rows 0 .. T - 1: hidden states of the same positions, `taps[:, t, k]` after block taps[k]."""
        c = self.config
        context = self.hidden_norm(self.fc(taps.flatten(2)))
        cos, sin = self.rotation(torch.arange(taps.shape[1], device=taps.device))
        out: Keys = []
        for layer in self.layers:
            attn: Any = layer.self_attn
            k = attn.k_norm(attn.k_proj(context).unflatten(-1, (c.kv_heads, c.head_dim)))
            out.append((turn(k, cos, sin), attn.v_proj(context).unflatten(-1, (c.kv_heads, c.head_dim))))
        return out

    def blocks(
        self,
        keys: Keys,
        anchor: Int[Tensor, "r N"],
        position: Int[Tensor, "r N"],
        *,
        slots: int | None = None,
        document: Int[Tensor, "r T"] | None = None,
    ) -> Float[Tensor, "r N S V"]:
        """Logits of slots 1 .. S of N packed blocks of every row: blocks see their context and themselves, never each other.

        anchor, position: token and position of each block's anchor. slots: slots of a block including the anchor's, S + 1 (None: as
        configured). document: the text each position belongs to, if a row holds several.
        """
        c, size = self.config, slots or self.config.block
        see = visible(position, keys[0][0].shape[1], document)[:, None, :, None]  # [r, 1, N, 1, T]
        token = torch.full((*anchor.shape, size), c.mask, dtype=torch.int64, device=anchor.device)
        token[..., 0] = anchor
        x = self.embed_tokens(token)
        cos, sin = self.rotation(position[..., None] + torch.arange(size, device=position.device))
        for layer, (k, v) in zip(self.layers, keys, strict=True):
            x = self._layer(layer, x, k, v, (cos, sin), see)
        return self.lm_head(self.norm(x[:, :, 1:]))

    def _layer(self, layer: Any, x: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], see: Tensor) -> Tensor:
        """One layer on blocks [r, N, S + 1, H]. k, v: of the context. see: the context rows that a block sees."""
        c, attn, normed = self.config, layer.self_attn, layer.input_layernorm(x)
        q = turn(attn.q_norm(attn.q_proj(normed).unflatten(-1, (c.heads, c.head_dim))), *angles)
        own_k = turn(attn.k_norm(attn.k_proj(normed).unflatten(-1, (c.kv_heads, c.head_dim))), *angles)
        own_v = attn.v_proj(normed).unflatten(-1, (c.kv_heads, c.head_dim))
        repeat = c.heads // c.kv_heads
        k, v, own_k, own_v = (t.repeat_interleave(repeat, -2) for t in (k, v, own_k, own_v))
        past = torch.einsum("rnshd,rthd->rhnst", q, k).masked_fill(~see, float("-inf"))
        own = torch.einsum("rnshd,rnuhd->rhnsu", q, own_k)
        weight = torch.softmax(torch.cat([past, own], -1) * c.head_dim**-0.5, -1)
        length = k.shape[1]
        seen = torch.einsum("rhnst,rthd->rnshd", weight[..., :length], v)
        seen = seen + torch.einsum("rhnsu,rnuhd->rnshd", weight[..., length:], own_v)
        x = x + attn.o_proj(seen.flatten(-2))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path, verifier: str = "", *, tables: bool = False) -> None:
        """Write the `speculators` layout (bfloat16). verifier: name or path of the target, for programs that load it too.

        tables: also write the target's embeddings and head, for programs that do not take them from the target.
        """
        c = self.config
        held = {n: t.bfloat16() for n, t in self.state_dict().items() if tables or n not in TABLES}
        write_folder(folder, layout(c, verifier), held)

    @classmethod
    def load(cls, folder: Path, target: Target, target_path: str | None = None) -> DFlashNetwork:
        """The drafter in a folder, for `target`; tables that the folder does not hold are the target's.

        target_path: the target's folder, to read an output head that is not tied to the embeddings. Raises ConfigError for a
        folder of another kind or with unsupported settings.
        """
        config, tensors = read_folder(folder, "dflash")
        made = read_config(config, folder, target)
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=made.taps)
        tensors.pop("t2d", None)
        if from_offsets(tensors.pop("d2t", None), made.vocab_size, made.vocab_size, folder) is not None:
            raise ConfigError(f"{folder}: a map of tokens (d2t) is not supported: train with the target's own tokens")
        if TABLES[0] not in tensors:
            tensors[TABLES[0]] = embeddings(target)
        if TABLES[1] not in tensors:
            tensors[TABLES[1]] = output_head(target, target_path, folder)
        with torch.device("meta"):
            model = cls(made)
        return fill(model, {n: t.to(target.device) for n, t in tensors.items()}, folder)


def visible(position: Int[Tensor, "r N"], length: int, document: Int[Tensor, "r T"] | None) -> Bool[Tensor, "r N T"]:
    """The context rows each block sees: those at positions before its anchor, in the anchor's document."""
    see = torch.arange(length, device=position.device) < position[..., None]
    if document is not None:
        see = see & (document[:, None, :] == document.gather(1, position)[..., None])
    return see

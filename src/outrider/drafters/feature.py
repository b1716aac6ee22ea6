"""Feature drafters in the manner of EAGLE-3: one decoder layer that reads the target's hidden states and its own.

A context row is a pair (hidden states of position t, token t + 1), a draft row a pair (the drafter's own output, the token
drafted from it): Li et al. 2025 (EAGLE-3, arXiv 2503.01840, section 3.1), where three taps of the target are fused by `fc`.
With the last block as the only tap this is the architecture of EAGLE-1 (Li et al. 2024) but for its normalisations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters._folder import check_fits, read_folder, whole, write_folder
from outrider.drafters.heads import fill
from outrider.errors import ConfigError
from outrider.protocols import Target

SPECULATORS_VERSION = "0.9.0"


@dataclass(frozen=True, slots=True)
class FeatureConfig:
    """hidden: the drafter's width. target_hidden: the target's. taps: blocks whose outputs are read (0: the embeddings).

    vocab_size: the target's. norm_before_residual: whether the residual stream starts from the normed features.
    """

    hidden: int
    target_hidden: int
    taps: tuple[int, ...]
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float = 1e-6
    rope_theta: float = 10000.0
    norm_before_residual: bool = False


class _Attention(nn.Module):
    """The projections; who attends to what differs between training and serving and is not decided here."""

    def __init__(self, c: FeatureConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)


class _Mlp(nn.Module):
    def __init__(self, c: FeatureConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.inner, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.inner, bias=False)
        self.down_proj = nn.Linear(c.inner, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, c: FeatureConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.hidden_norm = nn.RMSNorm(c.hidden, c.eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.eps)
        self.mlp = _Mlp(c)


class FeatureModel(nn.Module):
    """The network; tensors are named as in the `speculators` layout of EAGLE-3."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.fc = nn.Linear(len(c.taps) * c.target_hidden, c.hidden, bias=False)
        self.layers = nn.ModuleList([_Layer(c)])
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab_size, bias=False)

    # ------------------------------------------------------------------ the pieces, shared by training and serving
    def enter(
        self, token: Int[Tensor, "*n"], g: Float[Tensor, "*n D"], position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual [*n, D] and rotated queries [*n, heads, d], keys and values [*n, kv_heads, d] of rows (g, token)."""
        c, layer = self.config, self.layers[0]
        normed: Any = layer.hidden_norm(g)  # type: ignore[operator]
        x = torch.cat([layer.input_layernorm(self.embed_tokens(token)), normed], -1)  # type: ignore[operator]
        attn: Any = layer.self_attn
        q = attn.q_proj(x).unflatten(-1, (c.heads, c.head_dim))
        k = attn.k_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        v = attn.v_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        cos, sin = self.rotation(position)
        return (normed if c.norm_before_residual else g), _turn(q, cos, sin), _turn(k, cos, sin), v

    def leave(self, residual: Float[Tensor, "*n D"], seen: Float[Tensor, "*n A"]) -> Float[Tensor, "*n D"]:
        """The layer's output, before the final norm: what the next draft row reads."""
        layer: Any = self.layers[0]
        x = residual + layer.self_attn.o_proj(seen)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """Logits after a row's state."""
        return self.lm_head(self.norm(state))

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*n, 1, head_dim] of rotary positions, in the module's dtype."""
        half = self.config.head_dim // 2
        powers = torch.arange(half, dtype=torch.float32, device=position.device) / half
        angle = position[..., None].float() * self.config.rope_theta**-powers
        turned = torch.cat([angle, angle], -1)[..., None, :]
        kind = self.fc.weight.dtype
        return turned.cos().to(kind), turned.sin().to(kind)

    # ------------------------------------------------------------------ training-time test
    def unroll(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r T K H"], steps: int
    ) -> list[Float[Tensor, "r t V"]]:
        """Logits of `steps` draft levels from every position, each level on the outputs of the one before (section 3.2).

        tokens: [r, L] with taps of positions 0 .. T - 1, T <= L - steps. Entry s, column i: the law of token i + s + 2 as the
        drafter sees it after tokens 0 .. i + s + 1, of which it knows hidden states up to i. The row of level s at column i
        stands at position i + s and sees the context up to i and its own rows of levels 1 .. s.
        """
        c, length = self.config, taps.shape[1]
        ruler = torch.arange(length, device=tokens.device)
        closed = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        g = self.fc(taps.flatten(2))
        keys, values, out = [], [], []
        for s in range(steps):
            residual, q, k, v = self.enter(tokens[:, 1 + s : 1 + s + length], g, ruler + s)
            repeat = c.heads // c.kv_heads
            keys.append(k.repeat_interleave(repeat, -2))
            values.append(v.repeat_interleave(repeat, -2))
            past = torch.einsum("rihd,rjhd->rhij", q, keys[0]).masked_fill(closed, float("-inf"))
            own = [(q * key).sum(-1).transpose(1, 2)[..., None] for key in keys[1:]]
            weight = torch.softmax(torch.cat([past, *own], -1) * c.head_dim**-0.5, -1)
            seen = torch.einsum("rhij,rjhd->rihd", weight[..., :length], values[0])
            for n, value in enumerate(values[1:]):
                seen = seen + weight[..., length + n].transpose(1, 2)[..., None] * value
            g = self.leave(residual, seen.flatten(2))
            out.append(self.logits(g))
        return out

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path, verifier: str = "") -> None:
        """Write the `speculators` layout (bfloat16). verifier: name or path of the target, for programs that load it too."""
        c = self.config
        shape = {
            "model_type": "llama",
            "hidden_size": c.hidden,
            "intermediate_size": c.inner,
            "num_hidden_layers": 1,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": c.eps,
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": 1 << 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "tie_word_embeddings": False,
        }
        write_folder(
            folder,
            {
                "architectures": ["Eagle3DraftModel"],
                "speculators_model_type": "eagle3",
                "speculators_version": SPECULATORS_VERSION,
                "draft_vocab_size": c.vocab_size,
                "target_hidden_size": c.target_hidden,
                "norm_before_residual": c.norm_before_residual,
                "norm_before_fc": False,
                "eagle_aux_hidden_state_layer_ids": list(c.taps),
                "tie_word_embeddings": False,
                "dtype": "bfloat16",
                "speculators_config": _speculators("eagle3", 3, verifier),
                "transformer_layer_config": shape,
            },
            # no d2t and t2d: the package knows them only for reduced vocabularies
            {name: value.bfloat16() for name, value in self.state_dict().items()},
        )

    @classmethod
    def load(cls, folder: Path, target: Target) -> FeatureModel:
        """A drafter of a folder for `target`; ConfigError for a folder that holds something else or what is not supported."""
        config, tensors = read_folder(folder, "eagle3")
        made = _read_config(config, folder, target)
        check_fits(folder, target, hidden=made.target_hidden, vocab_size=made.vocab_size, layers=made.taps)
        offsets = tensors.pop("d2t", None)
        tensors.pop("t2d", None)
        if config.get("draft_vocab_size") != made.vocab_size or (offsets is not None and bool(offsets.any())):
            raise ConfigError(f"{folder}: a reduced draft vocabulary is not supported: train with the full one")
        if config.get("norm_before_fc") or config.get("fc_norm") or config.get("norm_output"):
            raise ConfigError(f"{folder}: norm_before_fc, fc_norm and norm_output are not supported")
        tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
        with torch.device("meta"):
            model = cls(made)
        return fill(model, tensors, folder)


def _read_config(config: dict[str, Any], folder: Path, target: Target) -> FeatureConfig:
    shape = config.get("transformer_layer_config")
    if not isinstance(shape, dict) or shape.get("num_hidden_layers", 1) != 1 or shape.get("attention_bias"):
        raise ConfigError(f"{folder}: transformer_layer_config must describe one layer without biases")
    hidden, heads = whole(shape, "hidden_size", folder), whole(shape, "num_attention_heads", folder)
    taps = config.get("eagle_aux_hidden_state_layer_ids") or [2, target.layers // 2, target.layers - 3]
    if not isinstance(taps, list) or not all(isinstance(t, int) for t in taps):
        raise ConfigError(f"{folder}: eagle_aux_hidden_state_layer_ids must be a list of layers, got {taps!r}")
    rope = shape.get("rope_parameters") or shape
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"{folder}: rotary positions of type {rope['rope_type']!r} are not supported")
    return FeatureConfig(
        hidden=hidden,
        target_hidden=whole(config, "target_hidden_size", folder, default=hidden)
        if config.get("target_hidden_size")
        else hidden,
        taps=tuple(taps),
        vocab_size=whole(shape, "vocab_size", folder),
        heads=heads,
        kv_heads=whole(shape, "num_key_value_heads", folder, default=heads),
        head_dim=whole(shape, "head_dim", folder, default=max(1, hidden // heads)),
        inner=whole(shape, "intermediate_size", folder),
        eps=float(shape.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
    )


def _speculators(algorithm: str, tokens: int, verifier: str) -> dict[str, Any]:
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


def _turn(x: Float[Tensor, "*n h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*n h d"]:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin

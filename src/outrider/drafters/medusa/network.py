"""Medusa heads: small networks on the target's last hidden state, head h for the token h places further on (Cai et al. 2024).

All heads look at the same hidden state and none at what another one proposed, so one call gives every level of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outrider.config_keys import flag, real, whole
from outrider.drafters.checkpoint import check_fits, read_folder, target_parts, write_folder
from outrider.drafters.keys import check_keys, check_layers
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, level_logits
from outrider.drafters.vocabulary import checked, spread
from outrider.errors import ConfigError
from outrider.nn.linear import draft_linear
from outrider.protocols import Target
from outrider.types import Draft, Evidence

READ = frozenset({
    "hidden_size", "vocab_size", "truncated_vocab_size", "num_heads", "num_hidden_layers", "medusa_fc_bias", "original_lm_head",
    "rms_norm_eps", "target_layer", "hidden_act", "max_position_embeddings",
    "max_paths", "topk", "num_lookahead_tokens", "n_predict", "version",  # how others propose with the same heads
})  # fmt: skip
"""Keys of a folder of heads."""


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """hidden: of the target. heads: positions ahead. layers: residual blocks of a head. shared: one output matrix for all heads.

    tap: number of the target's block whose output is read; the target's number of blocks for its last one. draft_vocab: tokens
    that are drafted, 0 for all.
    """

    hidden: int
    vocab_size: int
    heads: int
    tap: int
    layers: int = 1
    shared: bool = True
    eps: float = 1e-6
    draft_vocab: int = 0


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
    support: [S] target tokens of the heads' columns where they draft a part of the vocabulary, else None.
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

    def forward(self, hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n heads V"]:
        """Logits of every head for hidden states before the final norm."""
        f = self.norm(hidden)
        x = torch.stack([block(f) for block in self.blocks], -2)
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
        """Heads of a folder for `target`; the target's final norm where the folder does not hold it, as those of others.

        Raises ConfigError for a folder that holds something else, CapabilityError for heads of a target of other sizes.
        """
        config, tensors = read_folder(folder, "medusa")
        if not flag(config, "medusa_fc_bias", folder, True):
            tensors |= {
                n.removesuffix("weight") + "bias": t.new_zeros(t.shape[0])
                for n, t in tensors.items()
                if n.startswith("blocks.")
            }
        made = _read_config(config, folder, target)
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=(made.tap,))
        support = tensors.pop("token_map", None)
        if made.draft_vocab and (support is None or support.shape != (made.draft_vocab,)):
            raise ConfigError(f"{folder}: heads over {made.draft_vocab} tokens need a token_map of as many")
        if "norm.weight" not in tensors:
            tensors["norm.weight"] = target_parts(target, folder)["norm.weight"]
        with torch.device("meta"):
            model = cls(made)
        if made.draft_vocab and support is not None:
            model.support = checked(support.long(), made.vocab_size, folder)
        return fill(model, tensors, folder)


def _read_config(config: dict[str, Any], folder: Path, target: Target) -> MedusaConfig:
    check_keys(config, READ, folder)
    check_layers({**config, "model_type": "medusa"}, folder, "medusa")
    hidden, vocab_size = whole(config, "hidden_size", folder), whole(config, "vocab_size", folder)
    size = config.get("truncated_vocab_size") or vocab_size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= vocab_size:
        raise ConfigError(f"{folder}: truncated_vocab_size must be a whole number of 1 .. {vocab_size}, got {size!r}")
    return MedusaConfig(
        hidden=hidden,
        vocab_size=vocab_size,
        heads=whole(config, "num_heads", folder, most=64),
        tap=whole(config, "target_layer", folder, default=target.layers),
        layers=whole(config, "num_hidden_layers", folder, most=64),
        shared=flag(config, "original_lm_head", folder),
        eps=real(config, "rms_norm_eps", folder, 1e-6),
        draft_vocab=0 if size == vocab_size else size,
    )


def fill(model: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """`model` (made without storage) with `tensors` in float32, ready to serve; ConfigError if names, shapes or types differ."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    extra, absent = sorted(tensors.keys() - wanted.keys()), sorted(wanted.keys() - tensors.keys())
    if extra or absent:
        what = f"it has no place for {extra[0][:120]}" if extra else f"{absent[0]} is not there"
        raise ConfigError(
            f"{folder}: the tensors are not those its config.json describes ({what}): download or train it again"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            what = f"{name} has shape {list(tensor.shape)}, not {list(wanted[name])}"
            raise ConfigError(
                f"{folder}: the tensors are not those its config.json describes ({what}): download it again"
            )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{folder}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: use the unquantized drafter"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


class MedusaDrafter:
    """Drafts with `MedusaNetwork`: level d of a tree comes from head d, whatever path leads there.

    heads: the network. growth: how trees grow; its depth is at most the number of heads.
    """

    def __init__(self, heads: MedusaNetwork, growth: Growth, *, name: str = "medusa") -> None:
        if growth.depth > heads.config.heads:
            raise ConfigError(
                f"a draft of {growth.depth} levels needs as many heads, there are {heads.config.heads}: shorten the draft"
            )
        self.name, self.heads, self.growth = name, heads, growth
        self.layers: tuple[int, ...] = (heads.config.tap,)
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._predict = _stacked(heads)
        self._dtype = heads.norm.weight.dtype
        self._last: dict[int, tuple[int, Tensor]] = {}

    def bind(self, slots: int, length: int) -> None:
        """Nothing to make room for: a slot keeps one hidden state."""

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._last.pop(slot, None)

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Up to `budget[i]` levels for sequence i, from the hidden state of its last kept row."""
        hidden = evidence.scores.hidden[0]
        depths, rows = [0] * len(budget), []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            kept = evidence.accepted_rows(i)
            if kept:
                self._last[view.slot] = view.cached, hidden[kept[-1]]
            at, row = self._last.get(view.slot, (-1, hidden))
            if depth > 0 and at == len(view.tokens) - 1:
                depths[i] = min(depth, self.max_depth)
                rows.append(row)
        forest = Forest(len(budget))
        if rows:
            self._propose(evidence, depths, forest, torch.stack(rows).to(self._dtype))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _propose(self, evidence: Evidence, depths: list[int], forest: Forest, hidden: Float[Tensor, "n H"]) -> None:
        logits = self._predict(hidden)  # [heads, n, V]
        self.growth.grow(evidence, depths, forest, logits[0], level_logits(logits, depths, forest))


def _stacked(heads: MedusaNetwork) -> Any:
    """The network with the weights of all heads side by side: hidden states [n, H] -> logits [heads, n, V]."""
    c = heads.config
    weights = [torch.stack([b.layers[j].weight.T for b in heads.blocks]) for j in range(c.layers)]  # type: ignore[union-attr]
    biases = [torch.stack([b.layers[j].bias[None] for b in heads.blocks]) for j in range(c.layers)]  # type: ignore[union-attr]
    out = [draft_linear(head.weight) for head in heads.lm_heads]  # type: ignore[arg-type]

    def predict(hidden: Float[Tensor, "n H"]) -> Float[Tensor, "heads n V"]:
        x = heads.norm(hidden).expand(c.heads, -1, -1)
        for weight, bias in zip(weights, biases, strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight))
        if c.shared:
            logits = out[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            logits = torch.stack([head(each) for head, each in zip(out, x, strict=True)])
        return spread(logits, heads.support, c.vocab_size)

    return predict

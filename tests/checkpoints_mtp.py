"""Small random checkpoints that carry MTP heads, in every layout, and the heads computed plainly beside them.

The tensors of a head are drawn here and written under each family's names by hand: nothing of what reads them is used. The plain
head is DeepSeek-V3's equations (arXiv 2412.19437, 21 to 23) in float64 with the decoder layer of transformers' own class under an
ordinary causal mask, over all rows anew for every token.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WIDE, LAYERS, VOCAB = 32, 2, 61
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, **_EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
        "num_key_value_heads": 4, **_EXPERTS, **_LATENT,
    },
    "qwen3_next": {
        "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 24, **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip
"""Family -> what its small models have beside the common sizes."""
NAMES = {
    "model.mtp_layers.0.": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "mtp.": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    f"model.layers.{LAYERS}.": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
}


@dataclass(frozen=True)
class PlainHead:
    """One head beside its model, float64. layer: its decoder layer."""

    enorm: Tensor
    hnorm: Tensor
    m: Tensor
    norm: Tensor
    layer: nn.Module


@dataclass(frozen=True)
class PlainHeads:
    """The heads of a checkpoint beside its model, all float64."""

    model: PreTrainedModel
    heads: list[PlainHead]

    def logits(self, text: list[int], path: list[int]) -> Tensor:
        """Logits after `path`, drafted behind a text of which the last token has no hidden state yet."""
        with torch.no_grad():
            every, n = [*text, *path], min(len(path) + 1, len(self.heads))
            features = self.model.model(torch.tensor([text[:-1]])).last_hidden_state[0]  # behind the final norm
            for k in range(1, n):
                features = self.read(self.heads[k - 1], every[k : k + len(features)], features)
            tokens, rest = every[n : n + len(features)], every[n + len(features) :]
            states = self.read(self.heads[n - 1], tokens, features)
            for token in rest:  # beyond the last head, which reads its own output
                tokens, features = [*tokens, token], torch.cat([features, states[-1:]])
                states = self.read(self.heads[n - 1], tokens, features)
            return self.model.lm_head(states[-1])

    def read(self, head: PlainHead, tokens: list[int], features: Tensor) -> Tensor:
        """What a head gives on tokens, behind its norm: equations 21 and 22. features: of the tokens before them."""
        eps = self.model.config.rms_norm_eps

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

        embedded = self.model.get_input_embeddings()(torch.tensor(tokens))
        joined = torch.cat([rms(embedded, head.enorm), rms(features, head.hnorm)], -1) @ head.m.T
        place = torch.arange(len(joined))[None]
        closed = torch.full((len(joined), len(joined)), float("-inf"), dtype=joined.dtype).triu(1)
        out = head.layer(
            joined[None],
            position_embeddings=self.model.model.rotary_emb(joined[None], place),
            attention_mask=closed[None, None],
            position_ids=place,
        )
        return rms((out if isinstance(out, Tensor) else out[0])[0], head.norm)


def scale_of(head: int) -> float:
    """By what the decoder layer's matrices of a head are larger than the model's."""
    return 1.0 + 0.5 * head


def make_with_head(folder: Path, family: str, seed: int = 0, heads: int = 1) -> PlainHeads:
    """Save a model of `FAMILIES` with heads whose decoder layers have the weights of the model's last one, the matrices of further
    ones scaled; return them, plainly."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": WIDE, "intermediate_size": 40, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family]))
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .eval()
        .requires_grad_(False)
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape)
        else:
            weight.copy_(torch.randn(weight.shape) * (2.0 if "head" in name else 1.0) * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    drawn: list[list[Tensor]] = []
    for _ in range(heads):
        norms = [1 + 0.3 * torch.randn(WIDE) for _ in range(3)]
        drawn.append([*norms[:2], torch.randn(WIDE, 2 * WIDE) / 8, norms[2]])
    if family == "qwen3_next":  # its heads share all but the layers
        drawn = drawn[:1] * heads
    write_heads(folder, family, drawn)
    plain, model = list[PlainHead](), model.double()
    for head, parts in enumerate(drawn):
        layer = copy.deepcopy(model.model.layers[-1])
        for weight in layer.parameters():
            weight *= scale_of(head) if weight.ndim > 1 else 1.0
        token, hidden, product, last = (part.double() for part in parts)
        plain.append(PlainHead(token, hidden, product, last, layer))
    return PlainHeads(model, plain)


def write_heads(folder: Path, family: str, drawn: list[list[Tensor]]) -> None:
    """Add heads to the files of a folder, as the family's checkpoints have them."""
    file = folder / "model.safetensors"
    tensors, own = load_file(file), f"model.layers.{LAYERS - 1}."
    layer = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
    for head, (token, hidden, product, last) in enumerate(drawn):
        root, inner = root_of(family, head)
        if family == "qwen3_next":  # norms multiply by 1 + weight
            token, hidden, last = token - 1, hidden - 1, last - 1
        if family in ("qwen2", "qwen3"):  # [hidden, token]
            product = torch.cat([product[:, WIDE:], product[:, :WIDE]], 1)
        for name, value in zip(NAMES[root_of(family)[0]], (token, hidden, product, last), strict=True):
            tensors[f"{root}{name}.weight"] = value.contiguous()
        tensors |= {inner + n: t * (scale_of(head) if t.ndim > 1 else 1.0) for n, t in layer.items()}
        if root.startswith("model.layers."):  # these repeat the model's tables
            tensors[f"{root}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{root}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def root_of(family: str, head: int = 0) -> tuple[str, str]:
    """Before all tensors of a head, and before those of its decoder layer."""
    if family == "qwen3_next":
        return "mtp.", f"mtp.layers.{head}."
    root = f"model.mtp_layers.{head}." if family in ("qwen2", "qwen3") else f"model.layers.{LAYERS + head}."
    return root, root


def to_float8(folder: Path, block: int) -> None:
    """Store the matrices of the decoder layers of DeepSeek's layout in float8 with a scale for each block; so that float8 has their
    ratios to it as near as it can."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in list(tensors.items()):
        number = name.split(".")[2] if name.startswith("model.layers.") else ""
        if number.isdigit() and int(number) >= LAYERS and "_proj.weight" in name and "eh_proj" not in name:
            n, k = value.shape
            scale = 2.0 ** torch.randint(-6, -3, (-(-n // block), -(-k // block))).float()
            each = scale.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
            tensors[name], tensors[f"{name}_scale_inv"] = (value / each).to(torch.float8_e4m3fn), scale
    save_file(tensors, file, metadata={"format": "pt"})

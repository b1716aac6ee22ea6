"""Small random checkpoints that carry an MTP head, in every layout, and the head computed plainly beside them.

The tensors of the head are drawn here and written under each family's names by hand: nothing of what reads them is used. The plain
head is DeepSeek-V3's equations (arXiv 2412.19437, 21 to 23) in float64 with the decoder layer of transformers' own class under an
ordinary causal mask, over all rows anew for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
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
ROOTS = {"qwen2": "model.mtp_layers.0.", "qwen3": "model.mtp_layers.0.", "qwen3_next": "mtp."}
NAMES = {
    "model.mtp_layers.0.": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "mtp.": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    f"model.layers.{LAYERS}.": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
}


@dataclass(frozen=True)
class PlainHead:
    """The head of a checkpoint beside its model, both float64. layer: the decoder layer, one of the model's own."""

    model: PreTrainedModel
    enorm: Tensor
    hnorm: Tensor
    m: Tensor
    norm: Tensor

    def logits(self, text: list[int], path: list[int]) -> Tensor:
        """Logits after `path`, drafted behind a text of which the last token has no hidden state yet."""
        with torch.no_grad():
            eps = self.model.config.rms_norm_eps

            def rms(x: Tensor, weight: Tensor) -> Tensor:
                return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

            out = self.model.model(torch.tensor([text[:-1]]))
            h = list(out.last_hidden_state[0])  # behind the final norm
            every, state = [*text, *path], h[-1]
            for n in range(len(text) - 1, len(every)):
                embedded = self.model.get_input_embeddings()(torch.tensor(every[1 : n + 1]))
                joined = torch.cat([rms(embedded, self.enorm), rms(torch.stack(h), self.hnorm)], -1) @ self.m.T
                state = rms(self.layer(joined), self.norm)[-1]
                h.append(state)
            return self.model.lm_head(state)

    def layer(self, x: Tensor) -> Tensor:
        """The model's last decoder layer on rows from position 0 on."""
        place = torch.arange(len(x))[None]
        closed = torch.full((len(x), len(x)), float("-inf"), dtype=x.dtype).triu(1)
        out = self.model.model.layers[-1](
            x[None],
            position_embeddings=self.model.model.rotary_emb(x[None], place),
            attention_mask=closed[None, None],
            position_ids=place,
        )
        return (out if isinstance(out, Tensor) else out[0])[0]


def make_with_head(folder: Path, family: str, seed: int = 0) -> PlainHead:
    """Save a model of `FAMILIES` with a head whose decoder layer has the weights of the model's last one; return it, plainly."""
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
    norms = [1 + 0.3 * torch.randn(WIDE) for _ in range(3)]
    drawn = [*norms[:2], torch.randn(WIDE, 2 * WIDE) / 8, norms[2]]
    write_head(folder, family, drawn)
    return PlainHead(model.double(), *(part.double() for part in drawn))


def write_head(folder: Path, family: str, drawn: list[Tensor]) -> None:
    """Add a head to the files of a folder, as the family's checkpoints have it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    root = ROOTS.get(family, f"model.layers.{LAYERS}.")
    token, hidden, product, last = drawn
    if family == "qwen3_next":  # norms multiply by 1 + weight
        token, hidden, last = token - 1, hidden - 1, last - 1
    if family in ("qwen2", "qwen3"):  # [hidden, token]
        product = torch.cat([product[:, WIDE:], product[:, :WIDE]], 1)
    for name, value in zip(NAMES[root], (token, hidden, product, last), strict=True):
        tensors[f"{root}{name}.weight"] = value.contiguous()
    own = f"model.layers.{LAYERS - 1}."
    inner = root + ("layers.0." if family == "qwen3_next" else "")
    tensors |= {inner + n.removeprefix(own): t.clone() for n, t in tensors.items() if n.startswith(own)}
    if root.startswith("model.layers."):  # these repeat the model's tables
        tensors[f"{root}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{root}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})

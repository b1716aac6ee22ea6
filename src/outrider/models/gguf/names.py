"""The names of a decoder's tensors in GGUF, from those in Hugging Face's spelling."""

from __future__ import annotations

from outrider.models.families import FAMILIES, Family

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
"""Of the tensors outside of blocks, in Hugging Face's spelling."""
ROUTER = "mlp.gate.weight"
"""Of a router within its block, where experts are stacked."""
_WHOLE = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
NORMS = {"norm1": "attn_norm", "norm2": "ffn_norm", "post1": "post_attention_norm", "post2": "post_ffw_norm"}
"""Of the norms of a block, by their fields in `LayerWeights`."""
SINKS = "attn_sinks.weight"
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip


def gguf_name(name: str, family: Family = FAMILIES["llama"]) -> str:
    """The name of a tensor in GGUF."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.{SINKS}"
    part, _, end = rest.rpartition(".")
    norms = {named: norm_name(place, family) for place, named in family.norms}
    return f"blk.{layer}.{norms.get(part) or _PARTS[part]}.{end}"


def norm_name(place: str, family: Family) -> str:
    """The name of a block's norm. place: its field in `LayerWeights`. In gpt-oss's files the second one is called as those behind
    attention are elsewhere."""
    return NORMS["post1"] if family.sinks and place == "norm2" else NORMS[place]

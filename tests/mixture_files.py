"""GGUF files of mixtures of experts, written by the `gguf` package from transformers' models as llama.cpp's converter lays them
out: nothing of ours is between the model and the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from outrider.nn.blocks import named, quantise
from tests.checkpoints import make_model

ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "vocab_size": 101,
    "num_hidden_layers": 2,
}
OWN = {"qwen3_moe": {"norm_topk_prob": True}, "qwen2_moe": {"shared_expert_intermediate_size": 128}}
Kinds = Mapping[str, str]
"""A part of a tensor's name in GGUF -> its type, the first that occurs; norms, biases, sinks and routers are float32."""
PLAIN = ("norm", "bias", "sinks", "ffn_gate_inp")


def kind_of(name: str, kinds: Kinds) -> str:
    return "F32" if any(word in name for word in PLAIN) else next(kind for part, kind in kinds.items() if part in name)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys as interleaved pairs, which files of `llama` have."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def parts(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names in GGUF and values of the tensors of a file."""
    c, tensors = model.config, dict(model.named_parameters())
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    yield "output.weight", tensors["lm_head.weight"]
    for i in range(c.num_hidden_layers):
        at, to = f"model.layers.{i}.", f"blk.{i}."
        yield to + "attn_norm.weight", tensors[at + "input_layernorm.weight"]
        norm = "post_attention_norm" if c.model_type == "gpt_oss" else "ffn_norm"
        yield f"{to}{norm}.weight", tensors[at + "post_attention_layernorm.weight"]
        for part, out in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
            weight = tensors[f"{at}self_attn.{part}.weight"]
            heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(part, 0)
            yield f"{to}{out}.weight", permuted(weight, heads) if heads and c.model_type == "mixtral" else weight
            if f"{at}self_attn.{part}.bias" in tensors:
                yield f"{to}{out}.bias", tensors[f"{at}self_attn.{part}.bias"]
        for part in ("q_norm", "k_norm"):
            if f"{at}self_attn.{part}.weight" in tensors:
                yield f"{to}attn_{part}.weight", tensors[f"{at}self_attn.{part}.weight"]
        yield from (gpt_oss if c.model_type == "gpt_oss" else stacked)(tensors, at, to)


def stacked(tensors: dict[str, Tensor], at: str, to: str) -> Iterator[tuple[str, Tensor]]:
    """Router and experts of most families, whose gates lie above their ups."""
    yield to + "ffn_gate_inp.weight", tensors[at + "mlp.gate.weight"]
    both, down = tensors[at + "mlp.experts.gate_up_proj"], tensors[at + "mlp.experts.down_proj"]
    for name, weight in zip(("gate", "up", "down"), (*both.chunk(2, 1), down), strict=True):
        yield f"{to}ffn_{name}_exps.weight", weight
    if f"{at}mlp.shared_expert_gate.weight" in tensors:
        for name in ("gate", "up", "down"):
            yield f"{to}ffn_{name}_shexp.weight", tensors[f"{at}mlp.shared_expert.{name}_proj.weight"]
        yield to + "ffn_gate_inp_shexp.weight", tensors[at + "mlp.shared_expert_gate.weight"].squeeze()


def gpt_oss(tensors: dict[str, Tensor], at: str, to: str) -> Iterator[tuple[str, Tensor]]:
    """Those of gpt-oss, whose gates and ups take turns, in tensors [E, inputs, outputs]."""
    yield to + "attn_sinks.weight", tensors[at + "self_attn.sinks"]
    yield to + "ffn_gate_inp.weight", tensors[at + "mlp.router.weight"]
    yield to + "ffn_gate_inp.bias", tensors[at + "mlp.router.bias"]
    both, down = (tensors[f"{at}mlp.experts.{n}_proj"].mT for n in ("gate_up", "down"))
    biases = tensors[at + "mlp.experts.gate_up_proj_bias"], tensors[at + "mlp.experts.down_proj_bias"]
    yield from ((f"{to}ffn_gate_exps.weight", both[:, ::2]), (f"{to}ffn_gate_exps.bias", biases[0][:, ::2]))
    yield from ((f"{to}ffn_up_exps.weight", both[:, 1::2]), (f"{to}ffn_up_exps.bias", biases[0][:, 1::2]))
    yield from ((f"{to}ffn_down_exps.weight", down), (f"{to}ffn_down_exps.bias", biases[1]))


def write(
    model: PreTrainedModel, path: Path, kinds: Kinds, *, renamed: Mapping[str, str] | None = None, **keys: Any
) -> Path:
    """A file of the model. renamed: tensors that get other names.

    keys: others than those of its configuration, or None for those that are left out.
    """
    import gguf

    c, arch = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    values: dict[str, Any] = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": head_dim, "attention.value_length": head_dim,
        "rope.dimension_count": head_dim, "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]), "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok,
    }  # fmt: skip
    if c.model_type == "mixtral" and c.sliding_window:
        values["attention.sliding_window"] = c.sliding_window
    if c.model_type in ("qwen2_moe", "qwen3_moe"):
        values["expert_feed_forward_length"] = c.moe_intermediate_size
    if c.model_type == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    if c.model_type == "gpt_oss":
        rope = c.rope_parameters
        values |= {
            "expert_feed_forward_length": c.intermediate_size, "attention.sliding_window": c.sliding_window,
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }  # fmt: skip
    for key, value in (values | keys).items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](f"{arch}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, c.vocab_size))])
    writer.add_token_scores([0.0] * 3 + [-float(i) for i in range(3, c.vocab_size)])
    writer.add_token_types([2, 3, 3] + [1] * (c.vocab_size - 3))
    writer.add_eos_token_id(2)
    for name, weight in parts(model):
        number = gguf.GGMLQuantizationType[kind_of(name, kinds)]
        writer.add_tensor((renamed or {}).get(name, name), stored(weight, kind_of(name, kinds)), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(weight: Tensor, kind: str) -> Any:
    """A tensor's bytes. The package rounds to all types but the ones of 256 values, which are rounded by our own code."""
    import gguf

    if not kind.endswith("_K"):
        return gguf.quants.quantize(weight.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    rows = quantise(weight.reshape(-1, weight.shape[-1]).contiguous(), named(kind))
    return rows.view(*weight.shape[:-1], -1).numpy()


def rounded(model: PreTrainedModel, kinds: Kinds) -> PreTrainedModel:
    """The model with the values of its file by the `gguf` package: what the file means, in transformers' own forward."""
    import gguf

    def values(weight: Tensor, kind: str) -> Tensor:
        found = gguf.quants.dequantize(stored(weight, kind), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(found.copy()).view(weight.shape)

    for name, weight in list(parts(model)):  # most are views of parameters
        kind = kind_of(name, kinds)
        if kind != "F32":
            weight.copy_(values(weight, kind))
    if model.config.model_type == "mixtral":  # these are not: rows in another order, each of which is rounded alone
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.copy_(values(weight, kind_of(f"blk.{name.split('.')[2]}.attn_{name[-13]}.weight", kinds)))
    return model


def small(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model whose rows are whole blocks of 32."""
    sizes = {k: v for k, v in SIZES.items() if family in OWN or k != "moe_intermediate_size"}
    return make_model(family, **sizes | OWN.get(family, {}) | overrides)

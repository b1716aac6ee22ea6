"""The native decoder against the model classes of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights
from outrider.types import Rows
from tests.models.test_native import DTYPES, forest, native, new_kv, pytestmark, run, tokens  # noqa: F401


def from_transformers(model: Any, family: str, window: tuple[int, ...]) -> tuple[DecoderConfig, DecoderWeights]:
    """The weights of a transformers decoder, linears fused."""
    c, state = model.config, {k.removeprefix("model."): v.detach() for k, v in model.state_dict().items()}
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config = DecoderConfig(
        family, c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, width,
        c.intermediate_size, c.rms_norm_eps, 256, window, model.model.rotary_emb.inv_freq.float(),
    )  # fmt: skip

    def fused(at: str, names: str, kind: str) -> Tensor | None:
        parts = [state.get(f"{at}.{name}.{kind}") for name in names.split()]
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None]).contiguous()

    def layer(i: int) -> LayerWeights:
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        return LayerWeights(
            norm1=state[f"layers.{i}.input_layernorm.weight"],
            qkv=fused(attention, "q_proj k_proj v_proj", "weight"),  # type: ignore[arg-type]
            qkv_bias=fused(attention, "q_proj k_proj v_proj", "bias"),
            q_norm=state.get(f"{attention}.q_norm.weight"),
            k_norm=state.get(f"{attention}.k_norm.weight"),
            o=state[f"{attention}.o_proj.weight"],
            o_bias=state.get(f"{attention}.o_proj.bias"),
            norm2=state[f"layers.{i}.post_attention_layernorm.weight"],
            gate_up=fused(mlp, "gate_proj up_proj", "weight"),  # type: ignore[arg-type]
            down=state[f"{mlp}.down_proj.weight"],
        )

    layers = tuple(layer(i) for i in range(config.layers))
    norm = state["norm.weight"]
    return config, DecoderWeights(state["embed_tokens.weight"], layers, norm, state["lm_head.weight"], norm.dtype)


FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}, (0, 0)),
    "qwen2": ("Qwen2", {}, (0, 0)),
    "qwen3": ("Qwen3", {"head_dim": 24}, (0, 0)),
    "mistral": ("Mistral", {"sliding_window": 5}, (5, 5)),
}


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, dtype: torch.dtype) -> None:
    """A prompt of 12 and a chain of 4 against one transformers forward; logits with a spread of several nats.

    float32: 1e-4 absolute. bfloat16: transformers rounds every intermediate to 8 bits, we only the inputs of products, so the
    difference is mostly theirs; against transformers in float32 we must be the nearer of the two (mean absolute error).
    """
    transformers = pytest.importorskip("transformers")
    name, extra, window = FAMILIES[family]
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager", **extra,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 1.5 * parameter.shape[-1] ** -0.5)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    path = tokens(16, 97)
    with torch.inference_mode():
        exact = model(torch.tensor([path])).logits[0, 11:]
        theirs = model.to(dtype)(torch.tensor([path])).logits[0, 11:].float()
    config, weights = from_transformers(model, family, window)
    decoder, kv = native(config, weights), new_kv(config, dtype)
    rows = Rows.assemble([0], [path[:12]], [0], forest((path[12:], [-1, 0, 1, 2])))
    ours = run(decoder, rows, kv, ()).logits
    assert exact.std() > 1.0
    if dtype is torch.float32:
        assert (ours - exact).abs().max() <= 1e-4
    else:
        assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()

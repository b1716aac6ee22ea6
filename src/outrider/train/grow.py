"""Grow a trained Llama: more layers, the same function, so nothing that was learned is lost."""

from __future__ import annotations

import copy

import torch


@torch.no_grad()
def double_layers(seed: torch.nn.Module) -> torch.nn.Module:
    """A new Llama with twice the layers that computes what ``seed`` does: after each layer a silent copy of it.

    A layer adds ``o_proj(...)`` and ``down_proj(...)`` to the residual stream. With both at zero the copy adds nothing
    at first, yet their gradients are not zero, so it starts to learn at once (block expansion: Wu et al. 2024,
    "LLaMA Pro"; stacking for cheaper training goes back to Gong et al. 2019).
    """
    config = copy.deepcopy(seed.config)
    config.num_hidden_layers *= 2
    model = type(seed)(config)
    model.model.embed_tokens.load_state_dict(seed.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(seed.model.norm.state_dict())
    for number, layer in enumerate(seed.model.layers):
        for twin in model.model.layers[2 * number : 2 * number + 2]:
            twin.load_state_dict(layer.state_dict())
        twin.self_attn.o_proj.weight.zero_()
        twin.mlp.down_proj.weight.zero_()
    return model

"""Grow a trained Llama: more layers, the same function, so nothing that was learned is lost."""

from __future__ import annotations

import copy

import torch

from outrider.train.causal_lm import CausalLM


@torch.no_grad()
def multiply_layers(seed: CausalLM, factor: int) -> CausalLM:
    """``factor`` times the layers of ``seed``, the same function: each layer is followed by copies of it that add nothing.

    A layer adds ``o_proj(...)`` and ``down_proj(...)`` to the residual stream. With both at zero a copy adds nothing
    at first, but their gradients are not zero, so it starts to learn at once (block expansion: Wu et al. 2024,
    "LLaMA Pro"; stacking for cheaper training goes back to Gong et al. 2019).
    """
    config = copy.deepcopy(seed.config)
    config.num_hidden_layers *= factor
    model = type(seed)(config)
    model.model.embed_tokens.load_state_dict(seed.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(seed.model.norm.state_dict())
    for number, layer in enumerate(seed.model.layers):
        first, *silent = model.model.layers[factor * number : factor * (number + 1)]
        first.load_state_dict(layer.state_dict())
        for copied in silent:
            copied.load_state_dict(layer.state_dict())
            copied.self_attn.o_proj.weight.zero_()
            copied.mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
def project_embeddings(wide: CausalLM, narrow: CausalLM) -> None:
    """Initialise ``narrow``'s token table with the best approximation of ``wide``'s of rank ``narrow.config.hidden_size``.

    With ``E = U S V^T [vocabulary, hidden]`` the rows of ``E V_k`` have nearly the inner products of the rows of E, so
    the similarity of tokens, which a small model learns slowly, is there from the first step.
    """
    table = wide.model.embed_tokens.weight.float()
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    narrow.model.embed_tokens.weight.copy_(table @ directions[: narrow.config.hidden_size].T)

"""One more decoder layer of a model's own kind, by transformers' own code, on rows whose attention the caller computes.

The layer is a model of one layer: transformers reads its tensors as it reads those of a checkpoint (it joins experts, for example),
and turns its heads by the family's own positions. Only the attention is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from outrider.errors import CapabilityError, ConfigError
from outrider.models.admit import brief, model_class
from outrider.models.hf.direct import call_directly
from outrider.models.hf.hooks import HiddenStateHooks, StopForward, find_blocks
from outrider.models.hf.probe import AttentionSwitch, configs_of, listen
from outrider.models.hf.quiet import quietly
from outrider.protocols import Attend

_ATTEND = "outrider_block"
_VOCAB = 8
"""Tokens of the model around the layer, which reads none."""
_PREFIX = "model.layers.0."


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 h N D"],
    key: Float[Tensor, "1 g N D"],
    value: Float[Tensor, "1 g N E"],
    attention_mask: Tensor | None,
    *,
    outrider: tuple[Attend, int],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N h E"], None]:
    """The registered attention function: all heads of one size, as the caller's cache has them."""
    attend, size = outrider
    scale, wide = query.shape[-1] ** -0.5 if scaling is None else scaling, value.shape[-1]
    q, k, v = (F.pad(t[0], (0, size - t.shape[-1])).transpose(0, 1) for t in (query, key, value))
    return attend(q, k, v, scale).unflatten(-1, (query.shape[1], size))[None, ..., :wide], None


AttentionInterface.register(_ATTEND, _attend)


def one_layer(config: Any) -> Any:
    """The configuration of a model whose only layer is of the kind of the last one that attends to everything."""
    layers, made = int(config.num_hidden_layers), copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    place = max((i for i, kind in enumerate(kinds) if kind == "full_attention"), default=layers - 1)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(made, key, [value[place]])
    own: dict[str, Any] = {
        "num_hidden_layers": 1,
        "vocab_size": _VOCAB,
        "first_k_dense_replace": 0,
        "decoder_sparse_step": 1,
    }
    own |= {"mlp_only_layers": [], "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    for key, value in own.items():
        if hasattr(made, key):
            setattr(made, key, value)
    return made


class HFBlock:
    """Implements `protocols.DecoderBlock`. like: a model of the family. Raises ConfigError, CapabilityError: see `BlockTarget`."""

    def __init__(self, like: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        config = one_layer(like.config.get_text_config(decoder=True))
        self.model = _loaded(config, tensors, like.dtype).to(like.device)  # type: ignore[arg-type]
        call_directly(self.model)
        self.dtype, token = like.dtype, torch.zeros(1, 3, dtype=torch.long, device=like.device)
        try:
            calls = listen(self.model, [0, 1, 2], range(3))
            found = find_blocks(self.model, 1, token)
        except Exception as error:  # whatever a family raises for a layer alone
            raise _alone(config, brief(error)) from error
        if len(calls) != 1 or calls[0].unknown or calls[0].window or found is None:
            raise _alone(config, "its attention does not go through transformers' interface")
        self._blocks, self._ours = found[1], AttentionSwitch(configs_of(self.model), _ATTEND)
        self.kv_heads, self.head_dim = calls[0].groups, calls[0].head_dim

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n H"], position: Int[Tensor, "n"], attend: Attend) -> Float[Tensor, "n H"]:
        taps = HiddenStateHooks(self._blocks, (1,))
        with taps.listen() as heard, taps.stop(), suppress(StopForward), self._ours:
            self.model(
                inputs_embeds=x[None],
                position_ids=position[None],
                use_cache=False,
                outrider=(attend, self.head_dim),
            )
        return heard.states()[0]


def _alone(config: Any, why: str) -> CapabilityError:
    return CapabilityError(f"a layer of {config.model_type} cannot be run alone here ({why}): use another drafter")


def _loaded(config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model around the layer, read by transformers."""
    wide = int(config.hidden_size)
    around = {
        "model.embed_tokens.weight": torch.zeros(_VOCAB, wide),
        "lm_head.weight": torch.zeros(_VOCAB, wide),
        "model.norm.weight": torch.ones(wide),
    }
    state = around | {_PREFIX + name: tensor for name, tensor in tensors.items()}
    try:
        kind = model_class(config)._model_mapping[type(config)]
        with quietly():
            model, info = kind.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # classes of transformers raise errors of their own
        raise ConfigError(
            f"the MTP head's layer is not one of {config.model_type} as transformers has it ({brief(error)}): use another drafter"
        ) from error
    wrong = [
        *sorted(info["missing_keys"]),
        *sorted(str(k) for k in info["mismatched_keys"]),
        *sorted(info["unexpected_keys"]),
    ]
    if wrong:
        raise ConfigError(
            f"the MTP head's layer is not one of {config.model_type} as transformers has it, {wrong[0][:120]} first: use another "
            "drafter"
        )
    return model.eval().requires_grad_(False)

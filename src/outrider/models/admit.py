"""What transformers will not run as a target, found from the files alone: loading and `outrider doctor` both ask here.

Nothing is read of the weights but their headers, nothing of the checkpoint's own code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider.errors import ConfigError

_CAUSAL = "is_causal"
"""By this attribute the attention of transformers' models says whether a row sees what stands behind it."""


def admit(folder: Path, raw: dict) -> Any:
    """transformers' configuration of a checkpoint that it can run as a causal language model.

    raw: config.json. Raises ConfigError for what it cannot: an unknown architecture, one that is no decoder, weights quantised in
    a way that needs another package or machine.
    """
    config = _config(folder)
    named = raw.get("model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{folder} is an encoder-decoder ({named}): only decoders can be targets, use another model")
    if raw.get("quantization_config"):
        _admit_quantized(folder, config, raw["quantization_config"])
    model = _skeleton(folder, config, str(named))
    told = [bool(getattr(m, _CAUSAL)) for m in model.modules() if isinstance(getattr(m, _CAUSAL, None), bool)]
    if told and not any(told):
        raise ConfigError(
            f"{folder} is an encoder ({named}), in which a token sees what follows it: it cannot continue text, "
            "use a causal language model"
        )
    return config


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its classes check their fields with errors of their own, other libraries' among them
        raise ConfigError(
            f"transformers cannot read {folder / 'config.json'} ({brief(error)}): use another model"
        ) from None


def _skeleton(folder: Path, config: Any, named: str) -> nn.Module:
    """The model without weights, as transformers builds it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"transformers does not run {folder} ({named}) as a causal language model "
            f"({brief(error)}): use a model that continues text"
        ) from None


def _admit_quantized(folder: Path, config: Any, how: Any) -> None:
    """ConfigError unless transformers can read weights that were quantised like this, here and now."""
    method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
    instead = "use the unquantized checkpoint it was made from (--quantize-draft makes a draft small)"
    try:
        from transformers.quantizers.auto import AutoHfQuantizer

        if not AutoHfQuantizer.supports_quant_method(how):
            raise ValueError("transformers does not know that method")
        AutoHfQuantizer.from_config(how, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # every method checks its own surroundings and complains in its own way
        raise ConfigError(
            f"{folder} is quantized ({str(method)[:40]}) and transformers cannot run it here ({brief(error)}): {instead}"
        ) from None


def brief(error: BaseException) -> str:
    """The first sentence or so of another library's complaint."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(". ")

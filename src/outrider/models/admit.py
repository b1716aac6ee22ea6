"""Checks from the files alone whether transformers can run a checkpoint as a target; used by loading and `outrider doctor`.

Of the weights only the headers are read, and no code of the checkpoint is run.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider.errors import ConfigError
from outrider.models.counts import bounded, check_counts
from outrider.models.packages import require_transformers

_APART = "reference_sliding_attention"
"""transformers' kind of layer for which a text's distribution depends on where its prompt ended, so that a prompt could not be read
in chunks, nor its beginning be another's; a short text does not show it."""
_CAUSAL = "is_causal"
"""The attribute by which attention modules of transformers state whether a row is blind to later rows."""


def admit(folder: Path, raw: dict, *, tried: bool = False) -> Any:
    """transformers' configuration of a checkpoint that it can run as a causal language model.

    raw: config.json. tried: a random model is run (`try_out`) also where the family says what its rows see; not for quantised
    weights. Raises ConfigError for the others: an unknown architecture, one that is not a decoder or too deep, weights quantised in
    a way that needs another package or machine.
    """
    check_counts(folder, raw)
    config = _config(folder)
    named = raw.get("model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{folder} is an encoder-decoder ({named}): only decoders can be targets, use another model")
    if raw.get("quantization_config"):
        _admit_quantized(folder, config, raw["quantization_config"])
    model = _skeleton(folder, config, str(named))
    require_layers(config, type(model).__name__)
    causal_flags = [bool(getattr(m, _CAUSAL)) for m in model.modules() if isinstance(getattr(m, _CAUSAL, None), bool)]
    switched = hasattr(config, "add_cross_attention")  # BERT's kind: an encoder unless it is told to be a decoder
    unflagged_encoder = not causal_flags and switched and getattr(config, "is_decoder", None) is False
    if unflagged_encoder or (causal_flags and not any(causal_flags)):
        raise ConfigError(
            f"{folder} is an encoder ({named}), in which a token sees what follows it: it cannot continue text, "
            "use a causal language model"
        )
    if not causal_flags or (tried and not raw.get("quantization_config")):
        try_out(config, type(model))
    return config


def require_layers(config: Any, kind: str) -> Any:
    """The configuration of the language model alone. Raises ConfigError for one that does not say how many layers it has, or whose
    layers see a prompt otherwise than what follows it."""
    text = config.get_text_config(decoder=True)
    if any(layer == _APART for layer in getattr(text, "layer_types", None) or ()):
        raise ConfigError(
            f"{kind} sees all of its prompt but only a window of what it wrote ({_APART}), which is not done here: use another "
            "model"
        )
    if hasattr(text, "num_hidden_layers"):
        return text
    if text is not config:
        raise ConfigError(f"the configuration has a text_config that {kind} does not read: remove it")
    raise ConfigError(
        f"{kind} has no number of layers in its configuration, so that transformers makes no cache for it: use another model"
    )


SHALLOW = 64 << 20
"""Most numbers (parameters, masks, tables) of a model that is made to see how its family behaves: it takes a second."""


def not_a_decoder(kind: str) -> ConfigError:
    """What is said of a model whose rows change with what follows them."""
    return ConfigError(
        f"{kind} is no decoder: what follows a token changes what the model says of it, so that it cannot continue text; use a "
        "causal language model"
    )


def fails_to_run(kind: type, tokens: int, error: BaseException) -> ConfigError:
    """What is said of a class of models that fails on a short text: inconsistent sizes show only then, as any kind of error."""
    known = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    demanded = [p.name for p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    beside = [name for name in demanded if name not in ("self", "input_ids")]
    if beside:
        return ConfigError(
            f"{kind.__name__} reads {' and '.join(beside)} in every call and cannot continue a text alone: use a causal language "
            "model"
        )
    return ConfigError(
        f"{kind.__name__} fails on a text of {tokens} tokens ({brief(error)}): check its configuration, or use a causal language "
        "model"
    )


@torch.no_grad()
def try_out(config: Any, kind: type) -> None:
    """Run a random model of this configuration on a short text, as far as that takes a second: all of a small model, a layer or
    two of a larger one. Raises ConfigError if a small one fails, or if rows change with what follows them, which not every family
    states. kind: its class.

    A large or unusual model is left to loading, which runs the model itself.
    """
    token = torch.tensor([[3, 5, 7, 9, 11, 13, 15, 17], [3, 5, 7, 9, 11, 13, 15, 4]])
    asked = (*token[:, None], *(token[:1, :n] for n in range(3, token.shape[1])))
    for layers in (0, 2, 1):  # 0: all
        whole = not layers
        try:
            tried = config if whole else _shallow(config, layers)
            with torch.device("meta"):
                empty = model_class(tried).from_config(tried)
            if sum(held.numel() for held in (*empty.parameters(), *empty.buffers())) > SHALLOW:
                continue
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                model = model_class(tried).from_config(tried).float().eval()
            size = int(config.get_text_config(decoder=True).vocab_size)
            one, other, *shorter = (model(input_ids=rows % size).logits[0] for rows in asked)
            ends = torch.stack([(one[len(rows) - 1] - rows[-1]).abs().amax() for rows in shorter])
            before = (one[:-1] - other[:-1]).abs().amax(-1)  # the last one of the same length is another token
        except Exception as error:
            if whole:
                raise fails_to_run(kind, token.shape[1], error) from None
            return  # lists by layer, or a number of layers that cannot be set
        limit = FOLLOWED * float(one.std().clamp(min=1e-12))
        if max(float(before.median()), float(ends.median())) > limit:
            raise not_a_decoder(kind.__name__)
        return


def _shallow(config: Any, layers: int) -> Any:
    made = copy.deepcopy(config)
    made.num_hidden_layers = min(layers, int(config.num_hidden_layers))
    return made


FOLLOWED = 1e-3
"""Share of the logits' spread by which the typical row may differ: rounding."""


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its classes raise errors of their own and of other libraries
        raise ConfigError(
            f"transformers cannot read {folder / 'config.json'} ({brief(error)}): use another model"
        ) from None


def model_class(config: Any) -> Any:
    """transformers' automatic class for this configuration: a causal language model, or one that reads pictures beside text, of
    which only the text part is used."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal, pictured = AutoModelForCausalLM, AutoModelForImageTextToText
    kind = type(config)
    return pictured if kind not in causal._model_mapping and kind in pictured._model_mapping else causal


def _skeleton(folder: Path, config: Any, named: str) -> nn.Module:
    """The model without weights, as transformers builds it."""
    require_transformers()
    try:
        with bounded(folder), torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)
    except ConfigError:
        raise
    except ImportError as error:  # transformers names the package in many lines, with the command between backticks
        command = re.search(r"`(pip install [^`]+)`", str(error))
        raise ConfigError(
            f"transformers needs another package to run {folder} ({named}; {brief(error).split('. ')[0]}): "
            f"{command[1] if command else 'install it'}"
        ) from None
    except Exception as error:  # whatever a family's class says to numbers that it does not like
        raise ConfigError(
            f"transformers does not run {folder} ({named}) as a causal language model "
            f"({brief(error)}): use a model that continues text"
        ) from None


def _admit_quantized(folder: Path, config: Any, how: Any) -> None:
    """Raise ConfigError unless transformers can read weights quantised in this way on this machine."""
    method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
    instead = "use the unquantized checkpoint it was made from (--quantize-draft makes a draft small)"
    try:
        from transformers.quantizers.auto import AutoHfQuantizer

        if not AutoHfQuantizer.supports_quant_method(how):
            raise ValueError("transformers does not know that method")
        AutoHfQuantizer.from_config(how, pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # every method checks its requirements with its own errors
        raise ConfigError(
            f"{folder} is quantized ({str(method)[:40]}) and transformers cannot run it here ({brief(error)}): {instead}"
        ) from None


def brief(error: BaseException) -> str:
    """The beginning of another library's error message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(". ")

"""Models that are given as objects of transformers, not as folders: recognised by what they can do, and left as they were found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from outrider.errors import ConfigError
from outrider.models.tokenizer import refuse_constraints
from outrider.protocols import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = Any


def is_model(thing: object) -> bool:
    """Whether this is a language model of transformers (compiled or not), rather than a target or a drafter of ours."""
    plain = getattr(thing, "_orig_mod", thing)  # torch.compile wraps it
    return isinstance(plain, nn.Module) and hasattr(plain, "config") and hasattr(plain, "get_input_embeddings")


def target_of(model: Any, max_length: int | None = None) -> Target:
    """A target over a model of transformers, which is not changed. Raises ConfigError for one that cannot continue text."""
    from outrider.models.hf.target import HFTarget

    return HFTarget(getattr(model, "_orig_mod", model), max_length=max_length)


def ends_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: of the model's generation_config, else of its config; and the tokenizer's own.

    Raises ConfigError if generation_config sets a constraint on every text, which is not supported here.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        refuse_constraints(generation.to_dict(), "the model's generation_config")
    found: list[int] = []
    for place in (generation, model.config):
        named = getattr(place, "eos_token_id", None)
        if not found:
            found = [i for i in (named if isinstance(named, list | tuple) else [named]) if isinstance(i, int)]
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys([*found, *([own] if isinstance(own, int) else [])]))


def check_loading(options: dict[str, object], given: str) -> None:
    """Raise ConfigError for options of loading that are not at their defaults, beside a model that is loaded already."""
    for name, value in options.items():
        if value not in ("auto", None):
            raise ConfigError(
                f"{name}={value!r} is for models that are loaded here, and {given} is loaded: convert or move it yourself, and "
                f"leave {name} out"
            )

"""What enters the text part of a model that reads images: seen when the model reads an image, and given when it reads rows.

Such a model embeds its tokens, puts what its vision part has made of the pixels into the places of some, and calls its text part
with the result, positions and masks. That call is the one place to look at and to write to, whatever a family calls its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from outrider.errors import CapabilityError
from outrider.models.hf.state import brief
from outrider.pictured import Given

_EMBEDS, _POSITION, _MASK = "inputs_embeds", "position_ids", "attention_mask"
_KNOWN = frozenset({_EMBEDS, _POSITION, _MASK, "past_key_values", "cache", "logits_to_keep", "cache_position"})


class _Entered(Exception):
    """Ends a call at its text part; never reaches the user."""


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """What a text part was called with, for a prompt of n tokens with G rows of images.

    embeds: input embeddings. turns: positions with several axes, None: plain ones. masks: by kind, where it was given any: what
    each row sees. deep, marks: see `pictured.ImageRows`.
    """

    embeds: Float[Tensor, "n H"]
    turns: Int[Tensor, "A n"] | None
    masks: Mapping[str, Bool[Tensor, "n n"]]
    deep: Mapping[str, tuple[Float[Tensor, "G H"], ...]]
    marks: tuple[str, ...]


@contextmanager
def failing_as(what: str, remedy: str) -> Iterator[None]:
    """Context in which a model's failure becomes a CapabilityError: a family may want other inputs, and say so in any way."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CapabilityError(f"{what} ({brief(error)}): {remedy}") from error


@torch.no_grad()
def entry_of(model: PreTrainedModel, text: nn.Module, tensors: Mapping[str, Any], pictured: Bool[Tensor, "n"]) -> Entry:
    """What enters `text`, the text part of `model`, when the model reads one prompt, given as its processor gives it.

    pictured: which tokens are rows of images.

    Raises CapabilityError if something else of the images reaches the text part, which rows could not be given.
    """
    seen: dict[str, Any] = {}

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Entered

    kind, hook = type(model).__name__, text.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        with failing_as(f"{kind} cannot read this image", "choose another model or image"), suppress(_Entered):
            model(**tensors, use_cache=False)
    finally:
        hook.remove()
    embeds = seen.get(_EMBEDS)
    if not isinstance(embeds, Tensor):
        raise CapabilityError(f"{kind} does not put images among its embeddings: choose another model for images")
    deep, marks, rows = dict[str, tuple[Tensor, ...]](), list[str](), int(pictured.sum())
    for name, value in seen.items():
        if name in _KNOWN or not _holds(value):
            continue
        several = isinstance(value, list | tuple)
        if several and all(isinstance(v, Tensor) and v.shape == (rows, embeds.shape[2]) for v in value):
            deep[name] = tuple(value)
        elif isinstance(value, Tensor) and value.dtype == torch.bool and torch.equal(value.cpu(), pictured[None]):
            marks.append(name)
        else:
            raise CapabilityError(
                f"images of {kind} reach its text part by another way ({name}) than is supported: choose another model for images"
            )
    position = seen.get(_POSITION)
    turns = position[:, 0] if isinstance(position, Tensor) and position.ndim == 3 else None
    return Entry(embeds[0], turns, _masks(seen.get(_MASK), embeds.shape[1]), deep, tuple(marks))


def _holds(value: Any) -> bool:
    """Whether an argument carries tensors."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return isinstance(value, Tensor)


def _masks(given: Any, n: int) -> dict[str, Tensor]:
    """The masks among what a text part was given, by kind of layer: those that have an entry for every pair of rows."""
    masks = given if isinstance(given, Mapping) else {"": given}
    found = {str(kind): m[0, 0] for kind, m in masks.items() if isinstance(m, Tensor) and m.ndim == 4}
    return {kind: m if m.dtype == torch.bool else m == 0 for kind, m in found.items() if m.shape == (n, n)}


@contextmanager
def given_to(text: nn.Module | None, given: Given) -> Iterator[None]:
    """Context in which calls of a text part read rows that have `given` besides their tokens."""
    if text is None:
        raise CapabilityError("the text part of this model was not found: give it prompts without images")

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        changed = dict(kwargs)
        if len(given.index):
            changed[_EMBEDS] = kwargs[_EMBEDS].clone()
            changed[_EMBEDS][0, given.index] = given.embeds.to(kwargs[_EMBEDS].dtype)
            changed |= {name: list(layers) for name, layers in given.deep.items()}
            for name in given.marks:
                changed[name] = torch.zeros(changed[_EMBEDS].shape[:2], dtype=torch.bool, device=given.index.device)
                changed[name][0, given.index] = True
        if given.turns is not None:
            changed[_POSITION] = given.turns[:, None]
        return args, changed

    hook = text.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

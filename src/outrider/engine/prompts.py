"""The forms a prompt, or several, may be given in. A string is a sequence of strings too, so strings are checked first."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from collections.abc import Set as AnySet
from typing import Any

from outrider.errors import RequestError
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt

Prompt = str | Iterable[Any]
"""One prompt: text, or token ids in a list, tuple, array or tensor of one dimension; one with images is of `engine.images`."""
Prompts = Prompt
"""One prompt or several, in a list or any other sequence."""


def as_prompts(prompts: Any) -> list[str | list[int]]:
    """One prompt or several, as a list. A string is one prompt; a flat sequence of token ids is one prompt too.

    An empty sequence holds no prompt. Raises RequestError for anything that is neither text nor token ids.
    """
    if isinstance(prompts, str | ImagePrompt):
        return [prompts]
    items = _items(prompts)
    return [as_prompt(items)] if any(_is_number(i) for i in items) else [as_prompt(i) for i in items]


def as_prompt(prompt: Any) -> str | list[int]:
    """One prompt: its text, or its token ids. Raises RequestError for anything else, including several prompts."""
    if isinstance(prompt, str | ImagePrompt):
        return prompt
    items = _items(prompt)
    wrong = next((i for i in items if i is not None and not _is_number(i)), None)
    if wrong is not None:
        _ = isinstance(wrong, str) or _items(
            wrong
        )  # raises a more specific error if the element is not a prompt itself
        raise RequestError("expected one prompt, text or a flat list of token ids, and got a list of several")
    return [_id(i) for i in items]


def as_params(params: Any) -> SamplingParams:
    """Sampling parameters as they are given. Raises RequestError for anything else, such as a mapping of them."""
    if isinstance(params, SamplingParams):
        return params
    how = (
        "write SamplingParams(**params)"
        if isinstance(params, Mapping)
        else "write SamplingParams(temperature=0.7), for example"
    )
    raise RequestError(f"sampling parameters are SamplingParams, not {type(params).__name__}: {how}")


def as_ids(prompts: Any) -> list[list[int]]:
    """Several prompts of token ids, for callers without a tokenizer. Raises RequestError for text."""
    found = as_prompts(prompts)
    if any(isinstance(p, str) for p in found):
        raise RequestError("expected token ids, not text: encode it first (engine.encode)")
    return [list(p) for p in found]  # type: ignore[arg-type]


def _items(value: Any) -> list[Any]:
    """The elements of a sequence, tensor, array or generator. RequestError for anything that is not iterable or has no order."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise RequestError("a prompt is text or token ids, and this is bytes: decode it first, as in prompt.decode()")
    if isinstance(value, Mapping) and "role" in value:
        raise RequestError(
            "a prompt is text or token ids, and these are messages: make ids of them by the model's template, as in "
            "tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"
        )
    if isinstance(value, Mapping):
        raise RequestError("a prompt is text or token ids, and this is a mapping: pass what is in it, as its input_ids")
    if callable(getattr(value, "tolist", None)):  # an array or a tensor of any library
        value = value.tolist()
    if isinstance(value, AnySet) or not isinstance(value, Iterable):
        kind = type(value).__name__
        raise RequestError(f"a prompt is text or a list of token ids, and a list of those is several; got {kind}")
    return list(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a single number, of any library: a token id, if it is whole."""
    plain = value.tolist() if callable(getattr(value, "tolist", None)) else value
    return isinstance(plain, int | float)


def _id(value: Any) -> int:
    try:
        plain = value.tolist() if callable(getattr(value, "tolist", None)) else value
        if isinstance(plain, bool):
            raise TypeError
        return operator.index(plain)
    except TypeError:
        raise RequestError(f"a token id is a whole number, got {value!r}") from None

"""Fill in the middle: how models of code are asked for the text between two others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Infill:
    """The marks of a family. suffix_first: the text behind the hole comes first. ends: further tokens that end the middle."""

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False
    ends: tuple[str, ...] = ()


FAMILIES = (
    Infill(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ends=("<|file_sep|>", "<|fim_pad|>", "<|endoftext|>", "<|im_end|>"),
    ),
    Infill("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<file_sep>", "<fim_pad>", "<|endoftext|>")),
    Infill("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>",)),
    Infill("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    Infill("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    Infill("[PREFIX]", "[SUFFIX]", "", suffix_first=True),
)  # fmt: skip
"""Qwen-Coder, StarCoder 2 and Granite, StarCoder, Code Llama, DeepSeek-Coder, Codestral."""


def infill_of(vocabulary: Mapping[str, int]) -> Infill | None:
    """The family whose marks a vocabulary has."""
    return next((f for f in FAMILIES if all(m in vocabulary for m in (f.prefix, f.suffix, f.middle) if m)), None)


def infilled(
    family: Infill,
    vocabulary: Mapping[str, int],
    before: str,
    behind: str,
    encode: Callable[[str], list[int]],
    begin: list[int],
) -> tuple[list[int], tuple[int, ...]]:
    """(prompt, tokens that end the middle). encode: of plain text. begin: tokens that begin a text."""
    p, s = [vocabulary[family.prefix]], [vocabulary[family.suffix]]
    if family.suffix_first:
        return [*begin, *s, *encode(behind), *p, *encode(before)], ()
    ids = [*begin, *p, *encode(before), *s, *encode(behind), vocabulary[family.middle]]
    return ids, tuple(vocabulary[end] for end in family.ends if end in vocabulary)

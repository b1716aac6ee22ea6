"""Prompts with images: their rows take the place of token embeddings, and have keys, positions and views of their own.

An image is a *segment* of the prompt's tokens, from its first row to its last. The tokens stay those of the model's processor
(placeholders, and marks between rows of an image), so that drafters and logits processors see a prompt of known tokens. What is
particular to the pixels lies beside them, and is found by place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_KEY = 1 << 40
"""Keys of image rows begin here, far above every vocabulary."""
Range = tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class ImageInput:
    """One image as the model's processor gives it, before the model has seen it.

    first, end: its segment of the prompt's tokens. tensors: what the model takes, for a prompt without other images; at: where the
    segment begins in it. digest: of the pixels and the segment: images of one digest have the same rows.
    """

    first: int
    end: int
    tensors: Mapping[str, Any]
    at: int
    digest: bytes


class ImagePrompt(list[int]):
    """The token ids of a prompt with images, and the images, in order. To everything but the engine it is the list of its ids."""

    def __init__(self, tokens: Iterable[int], images: Iterable[ImageInput]) -> None:
        super().__init__(tokens)
        self.images = tuple(images)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class ImageRows:
    """One image as rows of the target.

    key:    the first of as many numbers as the segment has tokens, which stand for this image and for no other.
    length: tokens of its segment. where: offsets in it of the rows that `embeds` [G, H] holds; its other tokens are text.
    turns:  [A, length] positions for the rotary tables, from 0 at its beginning; None: 0, 1, 2 ... span: where what follows begins.
    open:   ranges of the segment (from, to) whose rows see each other, also those that follow.
    deep:   by argument of the text part, what deeper layers add to the same rows: for each of these layers as many as `embeds`.
    marks:  arguments of the text part that say which rows these are.
    """

    key: int
    length: int
    where: tuple[int, ...]
    embeds: Float[Tensor, "G H"]
    turns: Int[Tensor, "A length"] | None
    span: int
    open: tuple[Range, ...] = ()
    deep: Mapping[str, tuple[Float[Tensor, "G H"], ...]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its rows."""
        return self.embeds.nbytes + sum(layer.nbytes for layers in self.deep.values() for layer in layers)


@dataclass(frozen=True, eq=False)
class Pictured:
    """The images of one sequence. starts: the place of each one's segment."""

    images: tuple[ImageRows, ...]
    starts: tuple[int, ...]
    _shifts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        added = accumulate((image.span - image.length for image in self.images), initial=0)
        object.__setattr__(self, "_shifts", tuple(added))

    def keyed(self, tokens: Sequence[int]) -> list[int]:
        """The tokens by which the cache knows the sequence's beginning: those of images are the images' keys."""
        out = list(tokens)
        for start, image in zip(self.starts, self.images, strict=True):
            out[start : start + image.length] = range(image.key, image.key + image.length)
        return out

    def open_ranges(self) -> list[Range]:
        """Ranges of places whose rows see each other, in order."""
        return [(start + a, start + b) for start, i in zip(self.starts, self.images, strict=True) for a, b in i.open]

    def whole(self, end: int) -> int:
        """The end of a chunk that was to end at `end`: behind the open range that this place is in, if it is in one."""
        return next((b for a, b in self.open_ranges() if a < end < b), end)

    def before(self, end: int) -> int:
        """`end`, or the beginning of the open range that this place is in."""
        return next((a for a, b in self.open_ranges() if a < end < b), end)

    @property
    def axes(self) -> int:
        """Axes of the rotary positions; 0: every token's is its place."""
        return max((0 if image.turns is None else len(image.turns) for image in self.images), default=0)

    def shift(self, place: int) -> int:
        """What is added to the place of a token of the text for its rotary position."""
        return self._shifts[bisect_right(self.starts, place)]

    def turns(self, first: int, end: int) -> Int[Tensor, "A n"]:
        """Rotary positions of the tokens at places first .. end; it has `axes` of them."""
        place = torch.arange(first, end)
        out = torch.empty(self.axes, end - first, dtype=torch.int64)
        edges = [first, *(s for s in self.starts if first < s < end), end]
        for a, b in pairwise(edges):
            out[:, a - first : b - first] = place[a - first : b - first] + self.shift(a)
        for number, (start, image) in enumerate(zip(self.starts, self.images, strict=True)):
            a, b = max(first, start), min(end, start + image.length)
            if a < b:
                own = torch.arange(image.length)[None] if image.turns is None else image.turns
                out[:, a - first : b - first] = own[:, a - start : b - start] + start + self._shifts[number]
        return out

    def placed(self, first: int, end: int) -> Iterator[tuple[list[int], slice, ImageRows]]:
        """For each image with rows at places first .. end: those places, and which of its rows they are."""
        for start, image in zip(self.starts, self.images, strict=True):
            wanted = [i for i, offset in enumerate(image.where) if first <= start + offset < end]
            if wanted:
                yield [start + image.where[i] for i in wanted], slice(wanted[0], wanted[-1] + 1), image


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What the rows of a forward have besides their tokens.

    index, embeds: rows whose embeddings are given, and these. deep, marks: see `ImageRows`.
    turns: rotary positions of all rows, None: `Rows.position`.
    open: for each segment the ranges of its places whose rows see each other.
    """

    index: Int[Tensor, "G"]
    embeds: Float[Tensor, "G H"]
    turns: Int[Tensor, "A N"] | None
    open: tuple[tuple[Range, ...], ...]
    deep: Mapping[str, tuple[Float[Tensor, "G H"], ...]]
    marks: tuple[str, ...]

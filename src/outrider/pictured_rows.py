"""The rows of a forward together with those of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from outrider.pictured import Given, ImageRows, Pictured, Range
from outrider.types import Rows


def with_images(rows: Rows, pictured: Sequence[Pictured | None]) -> Rows:
    """The rows of a step with what those of images have besides. pictured: the images of each segment's sequence."""
    if not any(pictured):
        return rows
    device = rows.token.device
    index, parts, open_ranges = list[int](), list[tuple[slice, ImageRows]](), list[tuple[Range, ...]]()
    axes = max(p.axes for p in pictured if p is not None)
    turns = rows.position.expand(axes, -1).clone() if axes else None
    for segment, own in zip(rows.segments, pictured, strict=True):
        first, end = segment.cached, segment.cached + segment.fed
        ranges = [] if own is None else own.open_ranges()
        open_ranges.append(tuple((a, b) for a, b in ranges if a < end and b > first))
        if own is None:
            continue
        for places, which, image in own.placed(first, end):
            index += [segment.first + place - first for place in places]
            parts.append((which, image))
        if turns is not None and own.axes:
            nodes = slice(segment.first + segment.fed, segment.first + segment.count)
            turns[:, segment.first : nodes.start] = own.turns(first, end).to(device)
            turns[:, nodes] += own.shift(end)
    return replace(
        rows, given=_given(torch.tensor(index, dtype=torch.int64, device=device), parts, turns, tuple(open_ranges))
    )


def _given(
    index: torch.Tensor,
    parts: Sequence[tuple[slice, ImageRows]],
    turns: torch.Tensor | None,
    open_ranges: tuple[tuple[Range, ...], ...],
) -> Given:
    """What the images' rows of a forward have. parts: which rows of which image, in the order of `index`."""
    if not parts:
        return Given(index, torch.zeros(0, 0), turns, open_ranges, {}, ())
    one = parts[0][1]  # all are the same model's
    deep = {
        name: tuple(torch.cat([image.deep[name][i][which] for which, image in parts]) for i in range(len(layers)))
        for name, layers in one.deep.items()
    }
    embeds = torch.cat([image.embeds[which] for which, image in parts])
    return Given(index, embeds, turns, open_ranges, deep, one.marks)

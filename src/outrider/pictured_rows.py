"""The rows of a forward together with those of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from outrider.pictured import Given, Pictured, Range
from outrider.types import Rows


def with_images(rows: Rows, pictured: Sequence[Pictured | None]) -> Rows:
    """The rows of a step with what those of images have besides. pictured: the images of each segment's sequence."""
    if not any(pictured):
        return rows
    device = rows.token.device
    index, parts, open_ranges = list[int](), list[torch.Tensor](), list[tuple[Range, ...]]()
    axes = max(p.axes for p in pictured if p is not None)
    turns = rows.position.expand(axes, -1).clone() if axes else None
    for segment, own in zip(rows.segments, pictured, strict=True):
        first, end = segment.cached, segment.cached + segment.fed
        ranges = [] if own is None else own.open_ranges()
        open_ranges.append(tuple((a, b) for a, b in ranges if a < end and b > first))
        if own is None:
            continue
        places, found = own.placed(first, end)
        index += [segment.first + place - first for place in places]
        parts += found
        if turns is not None and own.axes:
            nodes = slice(segment.first + segment.fed, segment.first + segment.count)
            turns[:, segment.first : nodes.start] = own.turns(first, end).to(device)
            turns[:, nodes] += own.shift(end)
    embeds = torch.cat(parts) if parts else torch.zeros(0, 0)
    return replace(rows, given=Given(torch.tensor(index, dtype=torch.int64, device=device), embeds, turns, tuple(open_ranges)))

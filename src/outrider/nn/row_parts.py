"""Parts of a forward: some of its segments as a separate forward, and the first blocks of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from outrider.errors import CapabilityError
from outrider.types import Rows, Scores, Segment


@dataclass(frozen=True, slots=True)
class Part:
    """A forward of some segments. flat: its rows in the whole. place: its scored rows among the whole's scored rows."""

    rows: Rows
    flat: list[int]
    place: list[int]


def last_scored(rows: Rows) -> int | None:
    """How many of the last rows the scored ones are, if they are those, in order; None: they lie elsewhere, or are only some.
    A view of the last rows is the cheaper choice of rows."""
    anchors = [s.first + s.fed - 1 for s in rows.segments if s.scored]
    nodes = [i for s in rows.segments for i in range(s.first + s.fed, s.first + s.count)]
    found = anchors + nodes
    whole = len(found) == len(rows.scored) > 0
    return len(found) if whole and found == [*range(rows.count - len(found), rows.count)] else None


def take_segments(rows: Rows, index: Sequence[int]) -> Part:
    """The forward of the segments `index` (ascending) of `rows`."""
    segments: list[Segment] = []
    flat: list[int] = []
    for i in index:
        s = rows.segments[i]
        segments.append(replace(s, first=len(flat)))
        flat += range(s.first, s.first + s.count)
    number = {row: i for i, row in enumerate(flat)}
    scored = [(number[row], place) for place, row in enumerate(rows.scored.tolist()) if row in number]
    pick = torch.tensor(flat, device=rows.token.device)
    part = Rows(
        rows.token[pick],
        rows.position[pick],
        tuple(segments),
        torch.tensor([row for row, _ in scored], dtype=torch.int64, device=rows.scored.device),
    )
    return Part(part, flat, [place for _, place in scored])


def run_parts(rows: Rows, groups: Sequence[tuple[Sequence[int], Callable[[Rows], Scores]]]) -> Scores:
    """Score groups of segments with one function each, and return logits and hidden states in the order of `rows`."""
    done = [(part, run(part.rows)) for part, run in ((take_segments(rows, index), run) for index, run in groups)]
    like = done[0][1]
    logits = like.logits.new_empty(len(rows.scored), like.logits.shape[1])
    hidden = tuple(h.new_empty(rows.count, h.shape[1]) for h in like.hidden)
    for part, scores in done:
        logits[part.place] = scores.logits
        for whole, piece in zip(hidden, scores.hidden, strict=True):
            whole[part.flat] = piece
    return Scores(logits, hidden)


def check_prefix(layers: int, all_layers: int) -> None:
    """Raise CapabilityError unless 1 <= `layers` <= `all_layers`, the blocks of a target."""
    if not 1 <= layers <= all_layers:
        raise CapabilityError(f"a prefix of {layers} layers was asked for, this model has 1 to {all_layers}")

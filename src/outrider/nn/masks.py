"""Masks over the places of a KV cache: a row sees its ancestors and itself, within a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def ancestor_mask(
    prefix: int,
    parents: Sequence[int],
    cached: int,
    *,
    window: int = 0,
    start: int = 0,
    end: int | None = None,
    last: int | None = None,
) -> Bool[Tensor, "n places"]:
    """The places start : end that each new row of one sequence sees.

    prefix:  new rows in sequence after the `cached` places. parents: of each node after them, its parent among the new rows; -1:
             its parent is the last cached place. Row i is at place cached + i and sees all cached places, its ancestors and
             itself.
    window:  how many positions a row sees, including its own; 0: all. The position of a cached place is its number, that of a node
             is its parent's plus one.
    end:     places after the rows are seen by no row (None: there are none). last: only the mask's last rows (None: all).
    """
    n = prefix + len(parents)
    first = 0 if last is None else n - last
    see = torch.ones(n - first, cached + n if end is None else end, dtype=torch.bool)
    if all(parent == prefix + i - 1 for i, parent in enumerate(parents)):
        see.tril_(cached + first)
    else:
        see[:, cached : cached + n] = _ancestors(prefix, parents)[first:]
        see[:, cached + n :] = False
    if window:
        position = list(range(cached, cached + prefix))
        for parent in parents:
            position.append(position[parent] + 1 if parent >= 0 else cached)
        own = torch.tensor(position)
        place = torch.arange(see.shape[1])
        place[cached : cached + n] = own
        see &= place > own[first:, None] - window
    return see[:, start:]


def hide(see: Bool[Tensor, "n places"], view: Sequence[tuple[int, int]], cached: int, start: int = 0) -> None:
    """Take from a mask over the places from `start` on those of the first `cached` that are in none of the ranges of `view`, which
    are increasing; without ranges all stay."""
    if view:
        ends, firsts = (0, *(end for _, end in view)), (*(first for first, _ in view), cached)
        for end, first in zip(ends, firsts, strict=True):
            see[:, max(0, end - start) : max(0, first - start)] = False


def _ancestors(prefix: int, parents: Sequence[int]) -> Bool[Tensor, "n n"]:
    """Ancestors among the new rows, computed on the host: a tensor operation per node would cost more than the step."""
    n = prefix + len(parents)
    rows = [bytearray(b"\1" * (i + 1) + b"\0" * (n - i - 1)) for i in range(prefix)]
    for i, parent in enumerate(parents, prefix):
        row = bytearray(rows[parent]) if parent >= 0 else bytearray(n)
        row[i] = 1
        rows.append(row)
    return torch.frombuffer(bytearray().join(rows), dtype=torch.bool).view(n, n)

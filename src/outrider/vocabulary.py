"""Compares two vocabularies id by id."""

from __future__ import annotations

from collections.abc import Mapping


def first_difference(
    target: Mapping[str, int], draft: Mapping[str, int], limit: int | None = None
) -> tuple[int, str, str] | None:
    """Lowest id below `limit` (None: any) that stands for different strings in two vocabularies (string -> id), with both strings.

    An id that only one of them has is padding in the other and does not count as a difference.
    """
    ours = {token: text for text, token in target.items()}
    pairs = ((i, ours.get(i, text), text) for text, i in draft.items() if limit is None or i < limit)
    return min((pair for pair in pairs if pair[1] != pair[2]), default=None)

"""Two vocabularies, compared id by id."""

from __future__ import annotations

from collections.abc import Mapping


def first_difference(
    target: Mapping[str, int], draft: Mapping[str, int], limit: int | None = None
) -> tuple[int, str, str] | None:
    """Lowest id below `limit` (None: any) that two vocabularies (string -> id) both have and read differently, with both strings.

    An id that only one of them has is padding of the other one's model and no difference.
    """
    ours = {token: text for text, token in target.items()}
    pairs = ((i, ours.get(i, text), text) for text, i in draft.items() if limit is None or i < limit)
    return min((pair for pair in pairs if pair[1] != pair[2]), default=None)

"""One memory for all keys and values: what of it the target's cache may take, and what the drafter's."""

from __future__ import annotations

from outrider.errors import CapacityError
from outrider.nn.memory import available_memory
from outrider.protocols import Drafter, Keeper, Target

PART = 0.9
"""Of the memory that is free when an engine is built, what caches may take where no limit is given."""


def share_out(target: Target, drafter: Drafter, slots: int, length: int, memory: int | None) -> int | None:
    """Bytes for the target's cache of `slots` sequences of `length` tokens; the drafter's is limited to the rest, with room for as
    many tokens. None: as much as there is. Before the drafter is bound.

    memory: bytes that both may take; None: what all slots could fill, or PART of what is free now. Raises CapacityError where not
    even one sequence fits.
    """
    need = drafter.cache_need(slots, length) if isinstance(drafter, Keeper) else None
    token = getattr(target, "token_bytes", 0)
    if need is None or not any(need) or not token:
        return memory
    each = token + need.token
    if memory is None:
        free = available_memory(target.device)
        if free is None or need.fixed + slots * length * each <= PART * free:
            return None
        memory = int(PART * free)
    tokens = (memory - need.fixed) // each
    if tokens < length:
        raise CapacityError(
            f"a sequence of {length} tokens and the cache of the drafter {drafter.name!r} need "
            f"{(need.fixed + length * each) / 1e9:.2f} GB of keys and values, and {memory / 1e9:.2f} GB are allowed: lower "
            "max_length or slots, give more with kv_memory if there is more, or take a drafter without a cache, such as 'ngram'"
        )
    assert isinstance(drafter, Keeper)
    drafter.keep_within(tokens)
    return tokens * token

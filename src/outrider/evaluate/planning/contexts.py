"""Whether drafting over a view of the target's own cache pays here, by context and by sequences: passes are timed, steps computed.

No text is decoded: a pass's time depends on how many tokens are cached, not on which. So a few passes over a cache of random
numbers give the four constants of `theory.context_times`, and those give every context, number of sequences and draft length.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from outrider.errors import CapabilityError, ConfigError
from outrider.nn.kv import PagedKV
from outrider.protocols import Target
from outrider.theory.context_times import ContextTimes, TimedPass
from outrider.types import Draft, Rows

SHAPES = ((1, 1), (3, 1), (6, 1), (1, 4), (6, 4))
"""Rows of a sequence, and sequences, of the passes that are timed."""
NEAR = 256
"""Cached tokens of the passes at short context."""


@dataclass(frozen=True, slots=True)
class ContextChoice:
    """The best drafter and length, "" and 0 for plain decoding, the predicted gain, and the predicted seconds of a plain step."""

    context: int
    batch: int
    length: int
    gain: float
    plain_seconds: float
    draft: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafter that is planned for, and the acceptance that is assumed. view: tokens that it sees, infinite: all. by: times of a
    draft model; None: the target drafts itself. end: tokens of context from which on it drafts nothing."""

    draft: str
    acceptance: float
    view: float
    by: ContextTimes | None = None
    end: float = math.inf


def time_passes(
    target: Target, kv: PagedKV, shapes: Sequence[tuple[int, int]], rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[TimedPass]:  # fmt: skip
    """Median seconds of forwards behind what the first slots of `kv` hold, in random order; nothing is committed.

    shapes: (rows of a sequence, sequences). All slots must hold as many tokens as the first, and have room for the rows.
    """
    spent: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    order = random.Random(0)
    for _ in range(rounds):
        for n, b in order.sample(list(spent), len(spent)):
            draft = Draft.join([(list(range(1, n)), list(range(-1, n - 2)))] * b)
            rows = Rows.assemble(list(range(b)), [[0]] * b, kv.length[:b], draft)
            began = clock()
            target.forward(rows, kv)
            spent[n, b].append(clock() - began)
    return [TimedPass(b, n, kv.length[0], median(each)) for (n, b), each in spent.items()]


def randomise(kv: PagedKV) -> None:
    """Fill a cache with random numbers, however it stores them."""
    for part in (*kv.k, *kv.v):
        part.copy_(kv.stored.pack(torch.randn(*part.shape[:-1], kv.head_dim)))


def fit_contexts(
    target: Target, longest: int, batch: int, *, rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> ContextTimes:
    """The constants of a target on this machine, from passes over NEAR and `longest` tokens of up to `batch` sequences.

    Raises ConfigError for contexts beyond the target's, CapabilityError where its cache is not in pages, CapacityError for memory.
    """
    if longest + 16 > target.max_length:
        raise ConfigError(
            f"a context of {longest} tokens was asked for, the target reads {target.max_length}: give less"
        )
    kv = target.new_kv(max(1, min(batch, 4)), longest + 16)
    if not isinstance(kv, PagedKV):
        raise CapabilityError(
            "this target's cache is not in pages, so passes over a long context cannot be timed alone"
        )
    randomise(kv)
    shapes = [(n, min(b, kv.slots)) for n, b in SHAPES]
    passes: list[TimedPass] = []
    with torch.inference_mode():
        for context in (min(NEAR, longest // 2), longest):
            for slot in range(kv.slots):
                kv.make_room(slot, context + 16)
                kv.length[slot] = context
            time_passes(target, kv, shapes, 1)
            passes += time_passes(target, kv, list(dict.fromkeys(shapes)), rounds, clock)
    return ContextTimes.fit(passes)


def choose(
    times: ContextTimes,
    contexts: Sequence[int],
    batches: Sequence[int],
    candidates: Sequence[Candidate],
    lengths: Sequence[int],
) -> list[ContextChoice]:
    """The best drafter and length for every context and number of sequences."""
    out = []
    for batch in batches:
        for context in contexts:
            best = ContextChoice(context, batch, 0, 1.0, times.plain(batch, context))
            for c in candidates:
                length, gain = (
                    times.best(batch, context, c.view, c.acceptance, lengths, c.by) if context < c.end else (0, 1.0)
                )
                if gain > best.gain:
                    best = replace(best, length=length, gain=gain, draft=c.draft)
            out.append(best)
    return out

"""All levels of a draft's chains in one call of compiled code: logits to tokens, tokens to the next forward, and so on.

It draws what `Levels` draws level by level, and `ByGain` where chains stop early, from the same distributions with the same noise,
bit for bit; these are its plain twins, and what runs where this does not apply (`grow` says where).
"""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.drafters.tree.chances import USUAL, Belief
from outrider.drafters.tree.forest import Forest
from outrider.nn import picks
from outrider.nn.ahead import Ahead
from outrider.noise import Noise
from outrider.types import POINT_MASS, TOLERANCE, Evidence

_CHAINS = struct.Struct("3q16Q")
"""`Chains` of chain.h: sequences, vocab, hidden; depth; first, further; forward, handle, chains, state; seed, position,
temperature; probs, stops; token, total, gain, made."""
_STOPS = struct.Struct("2d3Q")
"""`Stops` of chain.h: usual, least; base, odds, chance."""
ENDED = -1.0
"""The gain of a row whose chain had ended above it."""


class _Made(NamedTuple):
    """Levels that were made, and by row the token, the sum of its distribution, and the gain where chains stop."""

    levels: int
    token: array
    total: array
    gain: array | None


@dataclass(frozen=True, slots=True)
class Stopping:
    """Chains end where a further token is expected to bring no more than `least` (see `ByGain`). beliefs: by sequence; their
    `promised` is filled in."""

    least: float
    beliefs: Sequence[Belief]


@runtime_checkable
class Foreseeing(Protocol):
    """A `NextLogits` whose forwards for chains are known ahead, or that needs none."""

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """live: sequences that have a chain, of depth[j] levels the j-th. logits: what the forwards write, level by level, a row
        for each node that is fed. None: not here."""
        ...

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """Logits of all levels, if they are there already."""
        ...


def grow(
    evidence: Evidence,
    depths: Sequence[int],
    forest: Forest,
    logits: Float[Tensor, "n V"],
    follow: object,
    drawn: bool,
    stopping: Stopping | None = None,
) -> bool:
    """Add to `forest` a chain of depths[i] tokens for each sequence i; False, and nothing has happened, where it does not apply.

    drawn: whether sequences that sample draw; otherwise all take the most likely tokens. stopping: the chains may end earlier; a
    sequence that has ended is fed along unseen until all have. It applies on the CPU with the compiled passes, to requests whose
    distribution is a softmax of their logits (no filters, no edits), where `follow` is `Foreseeing`, and to the noise of `Noise`
    itself.
    """
    live = [i for i, d in enumerate(depths) if d]
    params = [evidence.sequences[i].params for i in live]
    plain = type(evidence.noise) is Noise and not any(p.edits or (drawn and p.filters) for p in params)
    foresees = hasattr(follow, "ahead")  # an isinstance of a protocol takes as long as a level
    library = picks.chain_library(logits) if live and plain and foresees else None
    if library is None or not transfer.on_host(logits):
        return False
    vocab, depth = logits.shape[1], [depths[i] for i in live]
    foreseeing, rows = cast(Foreseeing, follow), sum(depth)
    known, ahead = foreseeing.levels(), None
    if known is None:
        further = logits.new_empty(rows - len(live), vocab)
        ahead = foreseeing.ahead(live, depth, further)
        if ahead is None:
            return False
        sources = logits.data_ptr(), further.data_ptr()
    else:
        sources = known.data_ptr(), known.data_ptr() + 4 * vocab * len(live)
    temperature = [p.temperature if drawn else 0.0 for p in params]
    warm = [d for d, t in zip(depth, temperature, strict=True) if t > 0.0]
    probs = logits.new_empty(sum(warm), vocab)
    noise = evidence.noise if len(live) == len(depths) else evidence.noise.take(live)
    if stopping is not None:
        stopping = Stopping(stopping.least, [stopping.beliefs[i] for i in live])
    made = _run(library, noise, depth, temperature, sources, ahead, probs, stopping)
    chains, read = _plant(forest, live, depth, temperature, made, probs, stopping)
    if ahead is not None:
        ahead.done([chain[: n - 1] for chain, n in zip(chains, read, strict=True)])
    return True


def _run(
    library: ctypes.CDLL,
    noise: Noise,
    depth: list[int],
    temperature: list[float],
    sources: tuple[int, int],
    ahead: Ahead | None,
    probs: Float[Tensor, "d V"],
    stopping: Stopping | None,
) -> _Made:
    """sources: addresses of the logits of the first level, and of the others."""
    at = lambda a: a.buffer_info()[0]  # noqa: E731
    n, rows = len(depth), sum(depth)
    whole, seed, each = array("q", [*depth, *noise.position]), array("Q", noise.keys), array("f", temperature)
    out, sums = array("q", bytes(8 * rows + 8)), array("d", bytes(16 * rows))
    stops = array("B")
    if stopping is not None:
        beliefs = stopping.beliefs
        believed = array("d", [*(b.base for b in beliefs), *(math.exp(-b.log_odds) for b in beliefs), *[1.0] * n])
        stops = array("B", _STOPS.pack(USUAL, stopping.least, *(at(believed) + 8 * n * k for k in range(3))))
    forward = 0, 0, 0, 0
    if ahead is not None:
        forward = ahead.forward, ahead.handle, at(ahead.chains), at(ahead.states) if ahead.states is not None else 0
    status = library.outrider_chain(_CHAINS.pack(
        n, probs.shape[1], 0 if ahead is None else ahead.hidden, at(whole), *sources, *forward,
        at(seed), at(whole) + 8 * n, at(each), probs.data_ptr(), at(stops) if stops else 0,
        at(out), at(sums), at(sums) + 8 * rows, at(out) + 8 * rows,
    ))  # fmt: skip
    if status and ahead is not None:
        ahead.fail(status)
    return _Made(out.pop(), out, sums[:rows], sums[rows:] if stops else None)


def _plant(
    forest: Forest,
    live: list[int],
    depth: list[int],
    temperature: list[float],
    made: _Made,
    probs: Float[Tensor, "d V"],
    stopping: Stopping | None,
) -> tuple[list[list[int]], list[int]]:
    """Add the tokens to the forest, a chain each up to the first row that gave none.

    Returns the chains, and for each the number of its levels whose distributions were read.
    """
    vocab, number, at, read = probs.shape[1], 0, 0, [0] * len(live)
    chains, rows = [list[int]() for _ in live], [list[int]() for _ in live]
    sound = True
    for level in range(made.levels):
        for j, levels in enumerate(depth):
            if levels <= level:
                continue
            if made.gain is None or made.gain[at] != ENDED:
                token, drawn = made.token[at], temperature[j] > 0.0
                if token < vocab and len(chains[j]) == level:
                    chains[j].append(token)
                    rows[j].append(number if drawn else POINT_MASS)
                    if stopping is not None and made.gain is not None:
                        stopping.beliefs[j].promised[level - 1] = made.gain[at]
                read[j] += 1
                number += drawn
            sound = sound and abs(made.total[at] - 1.0) <= TOLERANCE
            at += 1
    first = 0
    if number:
        first = forest.add_distributions(probs if number == probs.shape[0] else probs[:number], sound)
    for i, chain, own in zip(live, chains, rows, strict=True):
        forest.add_chain(i, chain, [row if row == POINT_MASS else first + row for row in own])
    return chains, read

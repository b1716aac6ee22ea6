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
from typing import Protocol, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.drafters.tree.chances import USUAL, Belief
from outrider.drafters.tree.forest import Forest
from outrider.nn import picks
from outrider.nn.ahead import Ahead
from outrider.noise import Noise
from outrider.types import POINT_MASS, TOLERANCE, Evidence

_LEVEL = struct.Struct("q11Q")
"""`Level` of chain.h: rows; sequence, from; logits, at; token, total; call, fed, above, feature; gain."""
_CHAINS = struct.Struct("3q9Q")
"""`Chains` of chain.h: levels, vocab, hidden; forward, handle; seed, position, temperature; probs, level; stops, made."""
_STOPS = struct.Struct("2d3Q")
"""`Stops` of chain.h: usual, least; base, odds, chance."""
ENDED = -1.0
"""The gain of a row whose chain had ended above it."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """Chains end where a further token is expected to bring no more than `least` (see `ByGain`). beliefs: by sequence; their
    `promised` is filled in."""

    least: float
    beliefs: Sequence[Belief]


@runtime_checkable
class Foreseeing(Protocol):
    """A `NextLogits` whose forwards for chains are known ahead, or that needs none."""

    def ahead(self, rows: list[list[int]], token: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """rows[l]: sequences whose node of level l + 1 is fed by forward l. token: addresses of what it reads, in that order.
        logits: what the forwards write, one behind the other. None: not here."""
        ...

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """Logits of all levels, if they are there already."""
        ...


class _Buffers:
    """Numbers of all levels, one after the other: the rows of level l are at `first[l]` and behind it."""

    def __init__(self, rows: list[list[int]], live: list[int]) -> None:
        numbers = [{i: n for n, i in enumerate(own)} for own in (live, *rows)]
        self.first = [0]
        for own in rows:
            self.first.append(self.first[-1] + len(own))
        self.sequence = array("q", [numbers[0][i] for own in rows for i in own])
        self.origin = array("q", [above[i] for above, own in zip(numbers, rows, strict=False) for i in own])
        self.place = array("q", [n for own in rows for n in range(len(own))])
        self.token, self.fed = array("q", bytes(8 * self.first[-1])), array("q", bytes(8 * self.first[-1]))
        self.total, self.gain = (array("d", bytes(8 * self.first[-1])) for _ in range(2))
        self.made = array("q", [0])

    def at(self, column: array, level: int) -> int:
        """The address of a level's numbers."""
        return column.buffer_info()[0] + 8 * self.first[level]


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
    sequence that has ended is fed along unseen until all have. It applies on the CPU with the compiled
    passes, to requests whose distribution is a softmax of their logits (no filters, no edits), where `follow` is `Foreseeing`, and
    to the noise of `Noise` itself.
    """
    live = [i for i, d in enumerate(depths) if d]
    params = [evidence.sequences[i].params for i in live]
    plain = type(evidence.noise) is Noise and not any(p.edits or (drawn and p.filters) for p in params)
    foresees = hasattr(follow, "ahead")  # an isinstance of a protocol takes as long as a level
    library = picks.chain_library(logits) if live and plain and foresees else None
    if library is None or not transfer.on_host(logits):
        return False
    vocab, temperature = logits.shape[1], [p.temperature if drawn else 0.0 for p in params]
    rows = [[i for i in live if depths[i] > level] for level in range(max(depths))]
    foreseeing = cast(Foreseeing, follow)
    known = foreseeing.levels()
    made = _Buffers(rows, live)
    made_logits = logits if known is not None else logits.new_empty(made.first[-1] - len(live), vocab)
    ahead = None
    if known is None:
        goals = [made_logits.data_ptr() + 4 * vocab * (n - len(live)) for n in made.first[1:-1]]
        ahead = foreseeing.ahead(rows[1:], [made.at(made.fed, n) for n in range(1, len(rows))], made_logits)
        if ahead is None:
            return False
        sources = [logits.data_ptr(), *goals]
    else:
        sources = [known.data_ptr() + 4 * vocab * len(live) * n for n in range(len(rows))]
    warm = {i for i, t in zip(live, temperature, strict=True) if t > 0.0}
    probs = logits.new_empty(sum(i in warm for own in rows for i in own), vocab)
    _run(library, evidence, live, temperature, made, sources, ahead, probs, vocab, known is not None, stopping)
    chains, read = _plant(forest, rows[: made.made[0]], made, warm, probs, vocab, stopping)
    if ahead is not None:
        ahead.done([chains[i][: read[i] - 1] for i in rows[1]] if len(rows) > 1 else [])
    return True


def _run(
    library: ctypes.CDLL,
    evidence: Evidence,
    live: list[int],
    temperature: list[float],
    made: _Buffers,
    sources: list[int],
    ahead: Ahead | None,
    probs: Tensor,
    vocab: int,
    known: bool,
    stopping: Stopping | None,
) -> None:
    packed, stops = b"", array("B")
    calls = [] if ahead is None else [array("B", step.call) for step in ahead.steps]
    for level, source in enumerate(sources):
        step = ahead.steps[level - 1] if ahead is not None and level else None
        packed += _LEVEL.pack(
            made.first[level + 1] - made.first[level], made.at(made.sequence, level), made.at(made.origin, level),
            source, made.at(made.sequence if known else made.place, level), made.at(made.token, level),
            made.at(made.total, level), 0 if step is None else calls[level - 1].buffer_info()[0], made.at(made.fed, level),
            0 if step is None else step.above, 0 if step is None else step.feature, made.at(made.gain, level),
        )  # fmt: skip
    noise, levels, each = evidence.noise.take(live), array("B", packed), array("f", temperature)
    seed, position = array("Q", noise.keys), array("q", noise.position)
    at = lambda a: a.buffer_info()[0]  # noqa: E731
    if stopping is not None:
        beliefs = [stopping.beliefs[i] for i in live]
        base, odds = (array("d", own) for own in zip(*((b.base, math.exp(-b.log_odds)) for b in beliefs), strict=True))
        chance = array("d", [1.0] * len(live))
        stops = array("B", _STOPS.pack(USUAL, stopping.least, at(base), at(odds), at(chance)))
    status = library.outrider_chain(_CHAINS.pack(
        len(sources), vocab, 0 if ahead is None else ahead.hidden,
        0 if ahead is None else ahead.forward, 0 if ahead is None else ahead.handle,
        at(seed), at(position), at(each), probs.data_ptr(), at(levels),
        0 if stopping is None else at(stops), at(made.made),
    ))  # fmt: skip
    if status and ahead is not None:
        ahead.fail(status)


def _plant(
    forest: Forest,
    rows: list[list[int]],
    made: _Buffers,
    warm: set[int],
    probs: Tensor,
    vocab: int,
    stopping: Stopping | None,
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Add the tokens of the levels `rows` to the forest, a chain each up to the first row that gave none.

    Returns the chains, and for each sequence the number of its levels whose distributions were read.
    """
    flat = [i for own in rows for i in own]
    there = [stopping is None or gain != ENDED for gain in made.gain[: len(flat)]]
    sound = all(abs(x - 1.0) <= TOLERANCE for x in made.total[: len(flat)])
    written = sum(here and i in warm for i, here in zip(flat, there, strict=True))
    row = forest.add_distributions(probs[:written], sound) if written else 0
    chains: dict[int, list[int]] = {i: [] for i in rows[0]}
    read = dict.fromkeys(rows[0], 0)
    levels = ((level, i) for level, own in enumerate(rows) for i in own)
    for (level, i), token, gain, here in zip(levels, made.token, made.gain, there, strict=False):
        drawn = here and i in warm
        if token < vocab and len(chains[i]) == level:
            if stopping is not None:
                stopping.beliefs[i].promised[level - 1] = gain
            forest.add(i, level - 1, token, row if drawn else POINT_MASS)
            chains[i].append(token)
        read[i] += here
        row += drawn
    return chains, read

"""All levels of a draft's chains in one call of compiled code: logits to tokens, tokens to the next forward, and so on.

It draws what `Levels` draws level by level, from the same distributions with the same noise, bit for bit; that is its plain twin,
and what runs where this does not apply (`grow` says where).
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from typing import Protocol, cast

from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.drafters.tree.forest import Forest
from outrider.nn import picks
from outrider.nn.ahead import Ahead
from outrider.noise import Noise
from outrider.types import POINT_MASS, TOLERANCE, Evidence

_LEVEL = struct.Struct("q10Q")
"""`Level` of chain.h: rows; sequence, from; logits, at; token, total; call, fed, above, feature."""
_CHAINS = struct.Struct("3q7Q")
"""`Chains` of chain.h: levels, vocab, hidden; forward, handle; seed, position, temperature; probs, level."""


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
        self.total = array("d", bytes(8 * self.first[-1]))

    def at(self, column: array, level: int) -> int:
        """The address of a level's numbers."""
        return column.buffer_info()[0] + 8 * self.first[level]


def grow(
    evidence: Evidence, depths: Sequence[int], forest: Forest, logits: Float[Tensor, "n V"], follow: object, drawn: bool
) -> bool:
    """Add to `forest` a chain of depths[i] tokens for each sequence i; False, and nothing has happened, where it does not apply.

    drawn: whether sequences that sample draw; otherwise all take the most likely tokens. It applies on the CPU with the compiled
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
    _run(library, evidence, live, temperature, made, sources, ahead, probs, vocab, known is not None)
    fed = _plant(forest, rows, made, warm, probs, vocab)
    if ahead is not None:
        ahead.done([fed[i][: depths[i] - 1] for i in rows[1]] if len(rows) > 1 else [])
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
) -> None:
    packed = b""
    calls = [] if ahead is None else [array("B", step.call) for step in ahead.steps]
    for level, source in enumerate(sources):
        step = ahead.steps[level - 1] if ahead is not None and level else None
        packed += _LEVEL.pack(
            made.first[level + 1] - made.first[level], made.at(made.sequence, level), made.at(made.origin, level),
            source, made.at(made.sequence if known else made.place, level), made.at(made.token, level),
            made.at(made.total, level), 0 if step is None else calls[level - 1].buffer_info()[0], made.at(made.fed, level),
            0 if step is None else step.above, 0 if step is None else step.feature,
        )  # fmt: skip
    noise, levels, each = evidence.noise.take(live), array("B", packed), array("f", temperature)
    seed, position = array("Q", noise.keys), array("q", noise.position)
    at = lambda a: a.buffer_info()[0]  # noqa: E731
    status = library.outrider_chain(_CHAINS.pack(
        len(sources), vocab, 0 if ahead is None else ahead.hidden,
        0 if ahead is None else ahead.forward, 0 if ahead is None else ahead.handle,
        at(seed), at(position), at(each), probs.data_ptr(), at(levels),
    ))  # fmt: skip
    if status and ahead is not None:
        ahead.fail(status)


def _plant(
    forest: Forest, rows: list[list[int]], made: _Buffers, warm: set[int], probs: Tensor, vocab: int
) -> dict[int, list[int]]:
    """Add the tokens to the forest, a chain each up to the first row that gave none; the chains."""
    sound = all(abs(x - 1.0) <= TOLERANCE for x in made.total)
    row = forest.add_distributions(probs, sound) if warm else 0
    chains: dict[int, list[int]] = {i: [] for i in rows[0]}
    for level, own in enumerate(rows):
        for n, i in enumerate(own):
            token, drawn = made.token[made.first[level] + n], i in warm
            if token < vocab and len(chains[i]) == level:
                forest.add(i, level - 1, token, row if drawn else POINT_MASS)
                chains[i].append(token)
            row += drawn
    return chains

"""One replica of a simulated fleet: what it has admitted, and the steps up to its next event."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from outrider.theory.checks import probabilities
from outrider.theory.fleet.nouns import Array, Ints, Replica, Traffic

POOL = 1 << 14
"""Random numbers are drawn this many at a time."""


class Draws:
    """Random numbers of one kind, from a pool that is drawn anew when it is used up."""

    def __init__(self, rng: np.random.Generator, cdf: Array | None = None, values: Array | None = None) -> None:
        self._rng, self._cdf, self._values = rng, cdf, values
        self._pool, self._at = self._draw(POOL), 0

    def _draw(self, n: int) -> Array | Ints:
        if self._cdf is not None:
            return np.searchsorted(self._cdf, self._rng.random(n), side="right") + 1
        assert self._values is not None
        return self._rng.choice(self._values, n)

    def take(self, n: int) -> Any:
        """The next n numbers, [n]."""
        if n > POOL // 4:
            return self._draw(n)
        if self._at + n > POOL:
            self._pool, self._at = self._draw(POOL), 0
        self._at += n
        return self._pool[self._at - n : self._at]


class Steps:
    """Seconds of steps and tokens of sequences, for all replicas of a fleet: they are alike."""

    def __init__(self, replica: Replica, rng: np.random.Generator) -> None:
        self.replica = replica
        self._jitter = Draws(rng, values=np.asarray(replica.jitter, float)) if len(replica.jitter) else None
        self._tokens = [
            None,
            *(Draws(rng, accepted(replica.acceptance, x)) for x in range(1, max(replica.lengths) + 1)),
        ]
        self._means = [float(1 + np.cumprod(replica.acceptance[:x]).sum()) for x in range(max(replica.lengths) + 1)]
        self._known: dict[tuple[int, int, int], float] = {}

    def length(self, sequences: int) -> int:
        """The draft length at a load."""
        lengths = self.replica.lengths
        return lengths[min(sequences, len(lengths) - 1)]

    def seconds(self, decoding: int, length: int, rows: int) -> float:
        """Mean seconds of a step; ValueError if they are not positive."""
        key = (decoding, length, rows)
        if key not in self._known:
            found = self.replica.seconds(*key)
            if not (math.isfinite(found) and found > 0):
                raise ValueError(f"a step of {key} must take positive seconds, got {found}")
            self._known[key] = found
        return self._known[key]

    def ratios(self, steps: int) -> Array | None:
        """[steps] ratios to the mean; None without jitter."""
        return None if self._jitter is None else self._jitter.take(steps)

    def emitted(self, sequences: int, length: int, least: int, one: bool) -> Ints | None:
        """[sequences, steps] tokens of each sequence after 1, 2, .. steps; None where each step brings one token.

        As many steps as a text of `least` more tokens probably needs, and rarely ends early of it; one: a single step.
        """
        draws = self._tokens[length]
        if draws is None or not sequences:
            return None
        steps = 1 if one else min(least, int(1.1 * least / self._means[length]) + 3)
        tokens = draws.take(sequences * steps).reshape(sequences, steps)
        return tokens if steps == 1 else tokens.cumsum(axis=1)


class Server:
    """The state of one replica. Lists run over its sequences in order of admission.

    A segment is a run of `steps` steps of `seconds` each (or ending at `ends`, where steps vary) from `start` on; `emitted` are the
    tokens of decoding sequences after each of them, and `parts` the prompt rows of each sequence, if it is a step with prompts.
    """

    __slots__ = (
        "decoding", "emitted", "ends", "ids", "left", "missing", "parts", "seconds", "start", "steps", "version", "waiting"
    )  # fmt: skip

    def __init__(self, version: int = 0) -> None:
        self.waiting: deque[int] = deque()
        self.ids: list[int] = []
        self.left: list[int] = []
        self.missing: list[int] = []
        self.parts: list[int] | None = None
        self.emitted: Ints | None = None
        self.ends: Array | None = None
        self.start = self.seconds = 0.0
        self.steps = self.decoding = 0
        self.version = version

    def begin(self, now: float, traffic: Traffic, steps: Steps) -> float | None:
        """Admit what waits, and draw the steps up to the next end of a text, or one step if prompts are read; returns their end.

        None: nothing to do.
        """
        replica = steps.replica
        while self.waiting and len(self.ids) < replica.slots:
            i = self.waiting.popleft()
            self.ids.append(i)
            self.left.append(int(traffic.output[i]))
            self.missing.append(int(traffic.prompt[i]))
        self.start, self.version, self.ends = now, self.version + 1, None
        if not self.ids:
            self.steps = 0
            return None
        length = steps.length(len(self.ids))
        self.parts = self._chunks(traffic, replica.chunk) if any(self.missing) else None
        one = self.parts is not None
        self.decoding = self.missing.count(0) if one else len(self.ids)
        self.seconds = steps.seconds(self.decoding, length, sum(self.parts) if self.parts else 0)
        least = min(self.left)
        self.emitted = steps.emitted(self.decoding, length, least, one)
        if one:
            self.steps = 1
        elif self.emitted is None:
            self.steps = least
        else:
            over = np.flatnonzero((self.emitted >= np.array(self.left)[:, None]).any(axis=0))
            self.steps = int(over[0]) + 1 if len(over) else self.emitted.shape[1]
        ratios = steps.ratios(self.steps)
        if ratios is not None:
            self.ends = now + self.seconds * ratios.cumsum()
        return self.end

    @property
    def end(self) -> float:
        """When the segment ends."""
        return self.start + self.steps * self.seconds if self.ends is None else float(self.ends[self.steps - 1])

    def cut(self, now: float) -> float | None:
        """End the segment with the step that is under way, and return when that is; None if it does end with it."""
        if self.steps == 1:
            return None
        if self.ends is None:
            under_way = max(0, math.ceil((now - self.start) / self.seconds) - 1)
        else:
            under_way = int(np.searchsorted(self.ends[: self.steps], now, side="left"))
        if under_way + 1 >= self.steps:
            return None
        self.steps = under_way + 1
        self.version += 1
        return self.end

    def took(self) -> Array | float:
        """Seconds of each step of the segment; one number if all are alike."""
        return self.seconds if self.ends is None else np.diff(self.ends[: self.steps], prepend=self.start)

    def _chunks(self, traffic: Traffic, chunk: int) -> list[int]:
        """Prompt rows of each sequence in the next step, as our scheduler deals them."""
        budget, parts = chunk, []
        for i, missing in zip(self.ids, self.missing, strict=True):
            part = min(missing, chunk - (int(traffic.prompt[i]) - missing) % chunk)
            taken = part if part <= budget or budget == chunk else 0
            budget -= taken
            parts.append(taken)
        return parts

    def finish(self) -> tuple[list[int], list[int]]:
        """Book the segment: the requests that have just made their first token, and those whose text is whole."""
        row, begun, done, keep = 0, [], [], []
        for at, i in enumerate(self.ids):
            if self.missing[at] == 0:
                self.left[at] -= self.steps if self.emitted is None else int(self.emitted[row, self.steps - 1])
                row += 1
            elif self.parts is not None:
                self.missing[at] -= self.parts[at]
                if self.missing[at] == 0:
                    self.left[at] -= 1
                    begun.append(i)
            (keep if self.left[at] > 0 else done).append(at)
        ended = [self.ids[at] for at in done]
        if done:
            self.ids, self.left, self.missing = ([x[at] for at in keep] for x in (self.ids, self.left, self.missing))
        return begun, ended


def accepted(acceptance: Sequence[float], length: int) -> Array:
    """[length + 1] distribution function of the number of accepted draft tokens; its last entry is 1."""
    reach = np.cumprod([1.0, *acceptance[:length]])
    cdf = np.cumsum(probabilities("accepted", reach - np.append(reach[1:], 0.0), ndim=1))
    cdf[-1] = 1.0
    return cdf

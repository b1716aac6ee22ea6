"""What a simulated fleet is given and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import number, positive_int

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Seconds = Callable[[int, int, int], float]
"""(decoding sequences, draft length, prompt rows) -> seconds of the step. The length is the load's, also where none decodes."""

OK, FAILED, REFUSED = 0, 1, 2
"""How a request ended: whole; its replica failed; nobody took it."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """[n] arrival seconds (rising), prompt tokens (>= 1) and output tokens (>= 1) of every request."""

    arrival: Array
    prompt: Ints
    output: Ints

    def __post_init__(self) -> None:
        if not len(self.arrival) == len(self.prompt) == len(self.output) > 0:
            raise ValueError("traffic needs one arrival, prompt and output for each of at least one request")
        if not (np.isfinite(self.arrival).all() and (np.diff(self.arrival) >= 0).all() and self.arrival[0] >= 0):
            raise ValueError("arrivals must be finite, from 0 on, and rise")
        if self.prompt.min() < 1 or self.output.min() < 1:
            raise ValueError("every request needs a prompt and an output of at least one token")


def poisson(rate: float, requests: int, prompts: npt.ArrayLike, outputs: npt.ArrayLike, seed: int = 0) -> Traffic:
    """`requests` Poisson arrivals at `rate` a second; lengths are drawn together from the pairs (prompts[i], outputs[i])."""
    if number("rate", rate) <= 0:
        raise ValueError(f"the rate of arrivals must be positive, got {rate:g}")
    n, rng = positive_int("requests", requests), np.random.default_rng(seed)
    p, o = np.asarray(prompts, np.int64), np.asarray(outputs, np.int64)
    if p.ndim != 1 or p.shape != o.shape or not len(p):
        raise ValueError("prompts and outputs must be two lists of equal length")
    which = rng.integers(len(p), size=n)
    return Traffic(np.cumsum(rng.exponential(1 / rate, n)), p[which], o[which])


@dataclass(frozen=True, slots=True)
class Replica:
    """One server. seconds: of a step. lengths[b]: the draft length with b sequences, b = 0 .. slots (the last entry beyond).

    acceptance[d]: probability that the draft token at depth d is accepted when those before it were, for every depth in `lengths`.
    chunk: most prompt rows of a step; chunks end at multiples of it. jitter: ratios of a step's time to `seconds`, drawn with
    replacement, or none. overhead: seconds before a request is seen and after a token is made, both together (network, HTTP).
    """

    seconds: Seconds
    slots: int
    lengths: Sequence[int] = (0,)
    acceptance: Sequence[float] = ()
    chunk: int = 256
    jitter: Sequence[float] = ()
    overhead: float = 0.0

    def __post_init__(self) -> None:
        positive_int("slots", self.slots)
        positive_int("chunk", self.chunk)
        number("overhead", self.overhead, 0.0)
        if not self.lengths or max(self.lengths) > len(self.acceptance) or min(self.lengths) < 0:
            raise ValueError(f"lengths {list(self.lengths)} need as many acceptances, got {len(self.acceptance)}")
        if any(not 0 <= a <= 1 for a in self.acceptance):
            raise ValueError("acceptances are probabilities")


@dataclass(frozen=True, slots=True)
class Failures:
    """Replicas fail after exponential times of mean `between` seconds, lose their requests, and are back after `repair` seconds.

    retries: how often a request whose replica failed is sent again, at once and from its start.
    """

    between: float
    repair: float
    retries: int = 0

    def __post_init__(self) -> None:
        if number("between", self.between) <= 0:
            raise ValueError(f"the time between failures must be positive, got {self.between:g}")
        number("repair", self.repair, 0.0)
        positive_int("retries", self.retries, low=0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """[n] what became of every request, in the order of the traffic. first, end: seconds, NaN unless it ended whole.

    gaps: [g] seconds between the pieces of a stream (a piece has the tokens of one step), and weights: how many there were.
    busy: seconds that replicas were in a step, summed; steps: of all replicas; tries: times that requests were given to a replica.
    """

    traffic: Traffic
    status: Ints
    first: Array
    end: Array
    replica: Ints
    busy: float
    steps: int
    tries: int
    gaps: Array
    weights: Array

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        return self.status == OK

    def ttft(self) -> Array:
        """Seconds from arrival to first token, of requests that ended whole."""
        return (self.first - self.traffic.arrival)[self.whole]

    def itl(self) -> Array:
        """Seconds per token after the first, of requests that ended whole and have more than one."""
        some = self.whole & (self.traffic.output > 1)
        return ((self.end - self.first) / np.maximum(self.traffic.output - 1, 1))[some]

    def gap(self, share: float) -> float:
        """The pause between two pieces of a stream that `share` of all pauses do not exceed, to 1%; NaN if there was none."""
        if not self.weights.sum():
            return math.nan
        return float(self.gaps[np.searchsorted(np.cumsum(self.weights), share * self.weights.sum())])

    def throughput(self) -> float:
        """Tokens per second of requests that ended whole, from the first arrival to the last end."""
        ends = self.end[self.whole]
        if not len(ends):
            return 0.0
        return float(self.traffic.output[self.whole].sum() / (ends.max() - self.traffic.arrival[0]))

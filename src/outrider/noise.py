"""Counter-based noise: every random number is a pure function of (seed, place, lane), never of call order.

So a request draws the same numbers in any batch, in any slot and at any time, and a rejected draft does not change the
numbers that follow. The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) applied
once per key; uniforms lie strictly inside (0, 1), so `log(u)` is finite and no zero-probability token can be drawn.

Lanes `accept`, `final` and `draft` are keyed by the anchor *and* the depth below it: two steps that look at the same position
never share a number, which a sequence-level rule (whose decision at one depth reads the drafts below) needs to be exact.
Lane `gumbel` is keyed by the absolute position alone: there sharing is intended (`verify/match.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.errors import OutriderError

LANES = {"accept": 1, "final": 2, "draft": 3, "gumbel": 4}
_MASK = (1 << 64) - 1
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def key_of(*parts: int) -> int:
    """A 64-bit hash of the integer `parts`: the key of `uniforms`."""
    key = 0
    for part in parts:
        key = _mix(key ^ (part & _MASK))
    return key


def uniform(*parts: int) -> float:
    """One number of (0, 1) with 52 random bits, a pure function of the integer `parts`."""
    return open_unit(_mix(key_of(*parts)))


def open_unit(bits: int) -> float:
    """The upper 52 of 64 bits as a number of the open interval (0, 1)."""
    return ((bits >> 12) + 0.5) * 2.0**-52


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def uniforms(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` numbers of (0, 1), float64 [count]; element i equals `uniform(key_parts..., i)` of the scalar twin."""

    def shift(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def mix(x: Tensor) -> Tensor:
        x = x + _signed(_GOLDEN)
        x = (x ^ shift(x, 30)) * _signed(_M1)
        x = (x ^ shift(x, 27)) * _signed(_M2)
        return x ^ shift(x, 31)

    index = torch.arange(count, dtype=torch.int64, device=device)
    return (shift(mix(mix(index ^ _signed(key))), 12).double() + 0.5) * 2.0**-52


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of the B sequences of a step.

    seed:     B request seeds (any integers).
    position: B absolute positions of the anchors; depth 1 is the position after the anchor.
    """

    seed: tuple[int, ...]
    position: tuple[int, ...]

    @property
    def keys(self) -> list[int]:
        """The seeds as compiled code reads them: their lowest 64 bits."""
        return [seed & _MASK for seed in self.seed]

    def uniform(self, b: int, depth: int, lane: str, index: int = 0) -> float:
        """One number of (0, 1) for sequence b, `depth` >= 1 below its anchor; `index` separates siblings."""
        return uniform(self.seed[b], LANES[lane], self.position[b], depth, index)

    def exponential(self, b: int, depth: int, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Unit exponentials float64 [vocab_size] of lane `gumbel`: argmax(p / e) is a draw from p (exponential race)."""
        key = key_of(self.seed[b], LANES["gumbel"], self.position[b] + depth)
        return -torch.log(uniforms(key, vocab_size, device))

    def take(self, index: Sequence[int]) -> Noise:
        """The noise of some sequences, in the order given."""
        return Noise(tuple(self.seed[i] for i in index), tuple(self.position[i] for i in index))


def derive_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th sample of a request (`n` > 1); index 0 keeps the seed itself."""
    if index < 0:
        raise OutriderError(f"sample index must be >= 0, got {index}")
    return seed if index == 0 else key_of(seed, 0x5EED, index)

"""Exhaustive enumeration of small instances: every draft, every coin. Slow on purpose, and an oracle for the rest.

Nothing here uses a closed form, a residual chain or a dynamic program over masses: the algorithms are followed draw by
draw and the probabilities of all their paths are added up. What is shared with `simulate` and with the formulas is only
the definition of the instance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from outrider.theory.chains import Chain
from outrider.theory.checks import positive_int

Array = npt.NDArray[np.float64]
Accept = Callable[[Array, Array], Array]
Paths = dict[tuple[tuple[int, ...], int, int], float]
LIMIT = 2_000_000
"""Most drafts that an enumeration may visit from one prefix; larger instances are refused."""


@dataclass(frozen=True, slots=True, eq=False)
class EnumeratedLaw:
    """The joint law of output, rejections and calls of an algorithm, by marginals.

    Attributes:
        output: (V, ..., V), T axes: the law of x_1 ... x_T, the prompt averaged out.
        rejections: (T + 1,): the law of the number of tokens that came from a rejection.
        calls: (T + 1,): the law of the number of target calls.
    """

    output: Array
    rejections: Array
    calls: Array

    @property
    def expected_rejections(self) -> float:
        return float(self.rejections @ np.arange(len(self.rejections)))

    @property
    def expected_calls(self) -> float:
        return float(self.calls @ np.arange(len(self.calls)))


def target_law(chain: Chain) -> Array:
    """(V, ..., V), T axes: the law of x_1 ... x_T under the target, what every lossless algorithm must return.

    >>> from outrider.theory.chains import iid
    >>> target_law(iid([0.5, 0.5], [0.75, 0.25], horizon=2))
    array([[0.5625, 0.1875],
           [0.1875, 0.0625]])
    """
    _check_size(chain.states**chain.horizon)
    law = chain.start[:, None] * chain.target[0]
    law = law.sum(axis=0)
    for kernel in chain.target[1:]:
        law = law[..., None] * kernel
    return law


def speculative(
    chain: Chain, drafts: int = 1, length: int | None = None, accept: Accept | None = None, residual: str = "optimal"
) -> EnumeratedLaw:
    """The law of speculative decoding with `drafts` drafts a call, over all tuples of drafts and all coins.

    Algorithms 1, 2 and 4 of Yin et al., NeurIPS 2024 (in 4, the last residual is sampled after the loop over drafts
    and is not taken twice, as its proof has it). Visits V^(drafts * length) tuples from every prefix.

    Args:
        drafts: independent drafts a call; their first tokens are tried in order, then the accepted one is followed.
        length: longest draft, cut at the horizon; a fully accepted draft that ends before it earns a bonus token from
            the target. None: drafts to the horizon.
        accept: acceptance probabilities (V,) from the rows (target, draft); None is min(1, p/q). Needs `drafts` = 1.
        residual: what replaces a refused token: "optimal", the normalised (p - b q)_+ that loses least, "target" or
            "draft".

    Raises:
        ValueError: an argument is out of range, or the enumeration too large.

    >>> from outrider.theory.chains import iid
    >>> law = speculative(iid([0.5, 0.5], [0.75, 0.25], horizon=2))
    >>> bool(abs(law.output - target_law(iid([0.5, 0.5], [0.75, 0.25], horizon=2))).max() < 1e-15)
    True
    >>> law.rejections
    array([0.5625, 0.375 , 0.0625])
    """
    drafts = positive_int("drafts", drafts)
    longest = chain.horizon if length is None else positive_int("length", length, low=0)
    if drafts > 1 and (accept is not None or residual != "optimal"):
        raise ValueError(f"drafts must be 1 when accept or residual is given, got {drafts}")
    _check_size(chain.states ** (drafts * min(longest, chain.horizon)))
    rule = _Rule(accept or exact_acceptance, residual)

    @cache
    def suffix(n: int, last: int) -> Paths:
        """All paths of x_{n+1} ... x_T after x_n = last; a call begins here unless n = T."""
        if n == chain.horizon:
            return {((), 0, 0): 1.0}
        size = min(longest, chain.horizon - n)
        found: Paths = {}
        for weight, tokens in _draft_tuples(chain, n, last, drafts, size):
            for chance, output, refused in _judge(chain, rule, n, last, tokens, bonus=n + size < chain.horizon):
                rest = suffix(n + len(output), output[-1])
                _extend(found, weight * chance, output, refused, rest)
        return found

    return _collect(chain, suffix)


def block(chain: Chain, length: int | None = None) -> EnumeratedLaw:
    """The law of block verification (Sun et al., ICLR 2025) with blocks of `length`, over all drafts and all coins.

    A block X^g is drafted; with w_0 = 1, w_i = min(1, w_{i-1} p(X_i)/q(X_i)), S_i = sum (w_i p - q)_+ and
    h_i = S_i / (S_i + 1 - w_i) for i < g, h_g = w_g, coins of chance h_i are tossed for every i and the longest i
    that succeeds is kept; then (w_i p - q)_+, normalised, is sampled, or after a whole block the target. A block is
    cut at the horizon (None: always reaches it); one that ends there has no token after it.

    >>> from outrider.theory.chains import best_guess
    >>> chain = best_guess(states=3, horizon=4, seed=0)
    >>> block(chain).expected_rejections < speculative(chain).expected_rejections
    True
    """
    longest = chain.horizon if length is None else positive_int("length", length)
    _check_size((2 * chain.states) ** min(longest, chain.horizon))

    @cache
    def suffix(n: int, last: int) -> Paths:
        if n == chain.horizon:
            return {((), 0, 0): 1.0}
        size = min(longest, chain.horizon - n)
        found: Paths = {}
        for weight, (tokens,) in _draft_tuples(chain, n, last, 1, size):
            for chance, output, refused in _judge_block(chain, n, last, tokens, bonus=n + size < chain.horizon):
                _extend(found, weight * chance, output, refused, suffix(n + len(output), output[-1]))
        return found

    return _collect(chain, suffix)


def exact_acceptance(target: Array, draft: Array) -> Array:
    """min(1, p/q), and one where q = 0: the acceptance of speculative decoding, elementwise.

    >>> exact_acceptance(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    array([1. , 0.2])
    """
    target, draft = np.broadcast_arrays(target, draft)
    ratio = np.ones(target.shape)
    return np.minimum(np.divide(target, draft, out=ratio, where=draft > 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class _Rule:
    accept: Accept
    residual: str

    def after(self, p: Array, q: Array) -> Array:
        """The law that replaces a refused token."""
        if self.residual == "target":
            return p
        if self.residual == "draft":
            return q
        if self.residual != "optimal":
            raise ValueError(f"residual must be optimal, target or draft, got {self.residual!r}")
        return _normalised(np.maximum(p - self.accept(p, q) * q, 0.0), p)


def _judge(
    chain: Chain, rule: _Rule, n: int, last: int, drafts: tuple[tuple[int, ...], ...], bonus: bool
) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """(chance, tokens, rejections) of every course of one call: first tokens in order, then one draft."""
    if not drafts[0]:
        yield from ((float(c), (y,), 0) for y, c in enumerate(chain.target[n, last]))
        return
    p, q = chain.target[n, last], chain.draft[n, last]
    chance = 1.0
    for tokens in drafts:
        accepted = float(rule.accept(p, q)[tokens[0]])
        yield from _follow(chain, rule, n + 1, tokens, chance * accepted, bonus)
        chance *= 1.0 - accepted
        p = rule.after(p, q)
    yield from ((chance * float(c), (y,), 1) for y, c in enumerate(p))


def _follow(
    chain: Chain, rule: _Rule, n: int, tokens: tuple[int, ...], chance: float, bonus: bool
) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """Judge the second and later tokens of an accepted draft; position `n` follows its first token."""
    for i in range(1, len(tokens)):
        p, q = chain.target[n + i - 1, tokens[i - 1]], chain.draft[n + i - 1, tokens[i - 1]]
        accepted = float(rule.accept(p, q)[tokens[i]])
        yield from ((chance * (1.0 - accepted) * float(c), (*tokens[:i], y), 1) for y, c in enumerate(rule.after(p, q)))
        chance *= accepted
    if not bonus:
        yield chance, tokens, 0
        return
    final = chain.target[n + len(tokens) - 1, tokens[-1]]
    yield from ((chance * float(c), (*tokens, y), 0) for y, c in enumerate(final))


def _judge_block(
    chain: Chain, n: int, last: int, tokens: tuple[int, ...], bonus: bool
) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """(chance, tokens, rejections) of every outcome of the coins of one block."""
    size, before = len(tokens), (last, *tokens)
    w, chances, finals = 1.0, [], []
    for i in range(size + 1):
        if i == size:
            final = chain.target[n + size, before[i]] if bonus else None
            chances.append(w)
        else:
            p, q = chain.target[n + i, before[i]], chain.draft[n + i, before[i]]
            excess = np.maximum(w * p - q, 0.0)
            total = float(excess.sum())
            chances.append(total / (total + 1.0 - w) if total + 1.0 - w > 0.0 else 1.0)
            final = _normalised(excess, p)
            w = min(1.0, w * float(p[tokens[i]]) / float(q[tokens[i]]))
        finals.append(final)
    for coins in itertools.product((False, True), repeat=size):
        kept = max((i + 1 for i in range(size) if coins[i]), default=0)
        chance = float(np.prod([chances[i + 1] if coins[i] else 1.0 - chances[i + 1] for i in range(size)]))
        if finals[kept] is None:
            yield chance, tokens, 0
        else:
            refused = int(kept < size)
            yield from ((chance * float(c), (*tokens[:kept], y), refused) for y, c in enumerate(finals[kept]))


def _draft_tuples(
    chain: Chain, n: int, last: int, drafts: int, size: int
) -> Iterator[tuple[float, tuple[tuple[int, ...], ...]]]:
    """Every tuple of `drafts` drafts of `size` tokens after x_n = last that can be drawn, and its probability."""
    single: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for i in range(size):
        single = [
            (weight * float(c), (*tokens, y))
            for weight, tokens in single
            for y, c in enumerate(chain.draft[n + i, tokens[-1] if tokens else last])
            if c > 0.0
        ]
    for choice in itertools.product(single, repeat=drafts):
        yield float(np.prod([weight for weight, _ in choice])), tuple(tokens for _, tokens in choice)


def _extend(found: Paths, chance: float, output: tuple[int, ...], refused: int, rest: Paths) -> None:
    if chance == 0.0:
        return
    for (tokens, rejections, calls), probability in rest.items():
        key = ((*output, *tokens), rejections + refused, calls + 1)
        found[key] = found.get(key, 0.0) + chance * probability


def _collect(chain: Chain, suffix: Callable[[int, int], Paths]) -> EnumeratedLaw:
    output = np.zeros((chain.states,) * chain.horizon)
    rejections, calls = np.zeros(chain.horizon + 1), np.zeros(chain.horizon + 1)
    for prompt, weight in enumerate(chain.start):
        for (tokens, refused, made), probability in suffix(0, prompt).items():
            output[tokens] += weight * probability
            rejections[refused] += weight * probability
            calls[made] += weight * probability
    return EnumeratedLaw(output, rejections, calls)


def _normalised(mass: Array, otherwise: Array) -> Array:
    """`mass` as a law; `otherwise` where there is none, which happens with probability zero."""
    total = mass.sum()
    return mass / total if total > 0.0 else otherwise


def _check_size(size: int) -> None:
    if size > LIMIT:
        raise ValueError(f"chain must be small enough to enumerate: {size} drafts, at most {LIMIT} are allowed")

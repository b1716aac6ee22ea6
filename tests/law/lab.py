"""The laboratory of these tests: the exact distribution of a rule's output, by running the rule itself on a partition of its
coins.

A rule turns coins of (0, 1) into decisions. `probes` cuts the range of every coin at the places where the decision ought to
change, by a reference in numpy that shares nothing with the rule, and emits one probe per cell of the product: a draft, a
value for each coin, and the measure of the cell. `examine` runs the real rule on all probes and adds up what it *did*. Coin
values are taken from the middle of a cell or from EDGE next to its ends, so a rule that changes its mind anywhere else than
the reference says is seen. Drafts are enumerated with their probabilities, so nothing is sampled and nothing can flake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft, Proposal, Verdict
from tests.law.worlds import Siblings, World, index, prefixes

EDGE = 1e-13
"""How near to the ends of a cell coins are placed: thresholds are checked to this."""
EXACT = 1e-12
"""What is left of a distribution's error in float64: rounding."""
COARSE = 1e-5
"""The same for distributions whose sums are only nearly one: there rule and reference may differ by the error of the sum."""

SHARES = pytest.mark.parametrize("share", [0.125, pytest.param(1.0, marks=pytest.mark.slow)], ids=["some", "all"])
"""Of the cases of a table: an eighth in `make test`, all in `make test-slow`."""

RuleFn = Callable[[torch.Tensor, Draft, Noise], Verdict]


def some(count: int, share: float) -> int:
    """A share of `count` cases, 8 at least: enough for every relation of two distributions to come up (`random_world`)."""
    return min(count, max(8, round(share * count)))


@dataclass
class Probe:
    """One cell of one case: its measure, the tokens of the draft, the coins."""

    case: int
    weight: float
    token: list[int]
    accept: dict[tuple[int, int], float]
    final: float
    final_depth: int


@dataclass(frozen=True, slots=True)
class ScriptedNoise(Noise):
    """Noise that says what a probe tells it to say; coins the probe does not name are the probe's `stray` value."""

    probes: tuple[Probe, ...] = ()
    stray: float = 0.37

    def uniform(self, b: int, depth: int, lane: str, index: int = 0) -> float:
        probe = self.probes[b]
        if lane == "accept":
            return probe.accept.get((depth, index), self.stray)
        assert lane == "final"
        return probe.final if depth == probe.final_depth else self.stray


# ----------------------------------------------------------------- the reference: thresholds and residuals in numpy
def without(distribution: np.ndarray, gone: Sequence[int]) -> np.ndarray:
    out = distribution.copy()
    out[list(gone)] = 0
    total = out.sum()
    return out / total if total > 0 else out


def after(distribution: np.ndarray, gone: Sequence[int], siblings: Siblings) -> np.ndarray:
    """The distribution the next sibling is drawn from, when `gone` have been drawn from `distribution`."""
    if siblings == "iid" or not gone:
        return distribution
    hub = int(distribution.argmax())
    if siblings == "hub" and gone[0] != hub:
        return np.eye(len(distribution))[hub]
    return without(distribution, gone)


def reference_toss(r: np.ndarray, q: np.ndarray | None, x: int) -> tuple[float, np.ndarray]:
    """Acceptance probability of x against the residual distribution r, and the residual distribution after a refusal."""
    if q is None or q[x] == 0:
        threshold = r[x]
        left = r.copy()
        left[x] = 0
    else:
        threshold = 1.0 if r[x] >= q[x] else r[x] / q[x]
        left = np.maximum(r - q, 0)
    total = left.sum()
    return float(threshold), left / total if total > 0 else r


class Enumerator:
    """Emits the probes of one case. near: how near to the ends of a cell its rules' thresholds are checked."""

    near = EDGE

    def __init__(self, case: int, world: World, rng: np.random.Generator, edge: float) -> None:
        self.case, self.world, self.rng, self.edge = case, world, rng, edge
        self.nodes = [world.shape.children(k) for k in range(-1, len(world.shape.parent))]

    def probes(self) -> Iterator[Probe]:
        token = self.rng.integers(self.world.vocab, size=len(self.world.shape.parent)).tolist()
        yield from self._walk(-1, (), 1.0, token, {})

    def _pick(self, low: float, high: float) -> float:
        where = self.rng.integers(3)
        if where == 0 or high - low < 4 * self.edge:
            return (low + high) / 2
        return low + self.edge if where == 1 else high - self.edge

    def _walk(
        self, node: int, prefix: tuple[int, ...], weight: float, token: list[int], coins: dict
    ) -> Iterator[Probe]:
        world, kids = self.world, self.nodes[node + 1]
        distribution = world.p[index(prefix, world.vocab)]
        if not kids:
            yield from self._finals(distribution, len(prefix) + 1, weight, token, coins)
            return
        for drawn, probability in self._draws(prefix, kids, (), 1.0):
            mine = list(token)
            for k, x in zip(kids, drawn, strict=True):
                mine[k] = x
            yield from self._tosses(kids, drawn, prefix, weight * probability, mine, coins, distribution)

    def _tosses(self, kids, drawn, prefix, weight, token, coins, r) -> Iterator[Probe]:
        depth, coins = len(prefix) + 1, dict(coins)
        thresholds, rest = self._tests(kids, drawn, prefix, r)
        for j, (k, x, threshold) in enumerate(zip(kids, drawn, thresholds, strict=False)):
            if weight * threshold > 0:
                accepted = {**coins, (depth, j): self._pick(0.0, threshold)}
                yield from self._walk(k, (*prefix, x), weight * threshold, token, accepted)
            coins[depth, j] = self._pick(threshold, 1.0)
            weight *= 1.0 - threshold
            if weight <= 0:
                return
        yield from self._finals(rest, depth, weight, token, coins)

    def _tests(self, kids, drawn, prefix, r) -> tuple[list[float], np.ndarray]:
        """Each sibling's acceptance given that those before it were refused, up to a certain one; what is left if all are."""
        out, q = [], self.world.q[index(prefix, self.world.vocab)]
        for j, (k, x) in enumerate(zip(kids, drawn, strict=True)):
            gone = [y for y, sibling in zip(drawn[:j], kids, strict=False) if self.world.shape.has_q[sibling]]
            distribution = after(q, gone, self.world.shape.siblings) if self.world.shape.has_q[k] else None
            threshold, r = reference_toss(r, distribution, x)
            out.append(threshold)
            if threshold >= 1.0:
                break
        return out, r

    def _all(self, kids, siblings: Siblings) -> bool:
        """Whether these are two or more siblings drawn in that way from one distribution: what rules for siblings are for."""
        shape = self.world.shape
        return len(kids) >= 2 and shape.siblings == siblings and all(shape.has_q[k] for k in kids)

    def _finals(self, distribution, depth, weight, token, coins) -> Iterator[Probe]:
        low = 0.0
        total = distribution.sum()
        for high in np.cumsum(distribution) / total:
            if high > low:
                yield Probe(self.case, weight * (high - low), token, coins, self._pick(low, high), depth)
            low = high

    def _draws(self, prefix, kids, drawn: tuple[int, ...], weight: float) -> Iterator[tuple[tuple[int, ...], float]]:
        """All token tuples of a node set that an honest drafter may draw, with their probabilities."""
        if len(drawn) == len(kids):
            yield drawn, weight
            return
        world, place = self.world, index(prefix, self.world.vocab)
        if not world.shape.has_q[kids[len(drawn)]]:
            yield from self._draws(prefix, kids, (*drawn, int(world.point[place, len(drawn)])), weight)
            return
        gone = [y for y, k in zip(drawn, kids, strict=False) if world.shape.has_q[k]]
        distribution = after(world.q[place], gone, world.shape.siblings)
        if (
            not distribution.any()
        ):  # the support is used up: an honest drafter can only propose something it has not drawn
            yield from self._draws(prefix, kids, (*drawn, int(world.point[place, len(drawn)])), weight)
        for x in np.flatnonzero(distribution):
            yield from self._draws(prefix, kids, (*drawn, int(x)), weight * float(distribution[x]))


# ----------------------------------------------------------------- running a rule on probes
@dataclass
class Findings:
    """Per case: how far the output distribution is from the target's, and how far the ledger is from its two identities."""

    distribution: np.ndarray
    ledger: np.ndarray
    spread: np.ndarray
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(0))


def assert_exact(found: Findings, tolerance: float) -> None:
    """The output distribution is the target's, and the ledger's two identities hold."""
    assert found.distribution.max() <= tolerance
    assert found.ledger.max() <= tolerance, "E[risk - rejections] is not zero"
    assert found.spread.max() <= tolerance, "E[(risk - rejections)^2] is not E[spread]"


def check_rule(
    rule: RuleFn,
    enumerator: type[Enumerator],
    worlds: Sequence[World],
    seed: int,
    dtype: torch.dtype = torch.float64,
    edge: float | None = None,
    tolerance: float = EXACT,
) -> None:
    """The rule keeps the target's distribution in every one of `worlds`, and its ledger is right; `seed` places the coins."""
    edge = enumerator.near if edge is None else edge
    assert_exact(examine(rule, worlds, np.random.default_rng([seed, 1]), dtype, edge, enumerator), tolerance)


def chances_in_turn(chances: Sequence[float]) -> list[float]:
    """From probabilities of events of which one at most happens to those given that none before did."""
    out, left = [], 1.0
    for chance in chances:
        out.append(min(chance / left, 1.0) if left > 0 else 0.0)
        left = max(left - chance, 0.0)
    return out


def assemble(worlds: Sequence[World], probes: Sequence[Probe], dtype: torch.dtype) -> tuple[torch.Tensor, Draft]:
    """All probes as one step: distributions of the anchors and nodes, and the draft. Worlds share vocabulary, support and mode."""
    vocab, support = worlds[0].vocab, worlds[0].support
    p_first = np.cumsum([0] + [len(w.p) for w in worlds])
    q_first = np.cumsum([0] + [len(w.q) for w in worlds])
    anchors = [int(p_first[probe.case]) for probe in probes]
    nodes: list[int] = []
    token: list[int] = []
    parent: list[int] = []
    row: list[int] = []
    for probe in probes:
        shape, low = worlds[probe.case].shape, len(token)
        paths: list[tuple[int, ...]] = []
        for k, (up, x) in enumerate(zip(shape.parent, probe.token, strict=True)):
            above = paths[up] if up >= 0 else ()
            paths.append((*above, x))
            nodes.append(int(p_first[probe.case]) + index(paths[k], vocab))
            row.append(int(q_first[probe.case]) + index(above, vocab) if shape.has_q[k] else POINT_MASS)
            parent.append(up if up < 0 else up + low)
        token += probe.token
    p = torch.from_numpy(np.concatenate([w.p for w in worlds])[anchors + nodes]).to(dtype)
    q = np.concatenate([w.q for w in worlds])
    distributions = torch.from_numpy(q if support is None else q[:, support]).to(dtype)
    proposal = Proposal(
        distributions, tuple(row), None if support is None else torch.from_numpy(support), worlds[0].shape.siblings
    )
    counts = tuple(len(probe.token) for probe in probes)
    return p, Draft(
        torch.tensor(token, dtype=torch.int64), tuple(parent), counts, proposal if any(r >= 0 for r in row) else None
    )


def examine(
    rule: RuleFn,
    worlds: Sequence[World],
    rng: np.random.Generator,
    dtype: torch.dtype = torch.float64,
    edge: float = EDGE,
    enumerator: type[Enumerator] = Enumerator,
) -> Findings:
    """Run `rule` on every probe of every world and integrate its output distribution and its ledger."""
    probes = [probe for i, world in enumerate(worlds) for probe in enumerator(i, world, rng, edge).probes()]
    p, draft = assemble(worlds, probes, dtype)
    count = len(probes)
    noise = ScriptedNoise((0,) * count, (0,) * count, tuple(probes), float(rng.uniform(0.01, 0.99)))
    verdict = rule(p, draft, noise)
    return _findings(worlds, probes, draft, verdict)


def _findings(worlds, probes, draft: Draft, verdict: Verdict) -> Findings:
    vocab = worlds[0].vocab
    depth = max(w.shape.depth for w in worlds)
    mass = [np.zeros(prefixes(vocab, depth + 1)) for _ in worlds]
    first, second = np.zeros(len(worlds)), np.zeros(len(worlds))
    accepted = np.zeros(len(worlds))
    for b, probe in enumerate(probes):
        path = verdict.path[b]
        tokens = [draft.tokens[k] for k in path]
        mass[probe.case][index([*tokens, verdict.next_token[b]], vocab)] += probe.weight
        error = verdict.risk[b] - (verdict.judged[b] - len(path))
        first[probe.case] += probe.weight * error
        second[probe.case] += probe.weight * (error * error - verdict.spread[b])
        accepted[probe.case] += probe.weight * len(path)
    distribution = np.array([distribution_error(world, m, depth) for world, m in zip(worlds, mass, strict=True)])
    return Findings(distribution, np.abs(first), np.abs(second), accepted)


def distribution_error(world: World, mass: np.ndarray, depth: int) -> float:
    """Largest distance of the distribution of output strings from the target's, over all strings up to the case's depth + 1.

    mass: probability of each output string. Shorter outputs are continued by the target, as decoding would.
    """
    vocab, worst = world.vocab, 0.0
    ended = np.zeros(1)  # probability that the output is a prefix of (or equal to) the string, times the target's rest
    target = np.ones(1)
    for d in range(1, world.shape.depth + 2):
        start = prefixes(vocab, d - 1)
        distributions = world.p[prefixes(vocab, d - 1) - vocab ** (d - 1) : start]
        normal = distributions / distributions.sum(1, keepdims=True)
        ended = (ended[:, None] * normal).ravel() + mass[start : start + vocab**d]
        target = (target[:, None] * normal).ravel()
    worst = float(np.abs(ended - target).max())
    return max(worst, float(mass[prefixes(vocab, world.shape.depth + 1) :].sum()))

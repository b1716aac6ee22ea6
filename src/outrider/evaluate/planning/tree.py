"""The tree to draft on this machine: acceptance by rank and the time of verifying, both measured, then Sequoia's optimum.

Chen et al. 2024 (arXiv 2402.12374): if a child of rank r is accepted with a probability that depends on r alone, the best tree of n
nodes is the n most valuable paths, and the best n is where one more row costs more time than it brings tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from outrider.build import Engine, companion
from outrider.drafters.tree.shapes import Static, accepted, best_tree, best_tree_for
from outrider.engine.prompts import Prompts
from outrider.errors import ConfigError
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import Record
from outrider.noise import Noise
from outrider.params import SamplingParams
from outrider.protocols import Rule
from outrider.types import Draft, Verdict

Report = Callable[[str], None]


@dataclass
class RankCounter:
    """A rule that judges as `rule` does and counts, at every node set of at least `width` children, which child was accepted."""

    rule: Rule
    width: int
    hits: list[int] = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.hits = [0] * self.width
        self.name, self.lossless, self.trees = self.rule.name, self.rule.lossless, self.rule.trees
        self.lane, self.tv_limit = self.rule.lane, self.rule.tv_limit

    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """See `Rule`."""
        verdict = self.rule(p, draft, noise, allowance)
        for b, path in enumerate(verdict.path):
            for up, taken in zip((-1, *path), (*path, None), strict=True):
                children = draft.children(b, up)
                if len(children) >= self.width:
                    self.seen += 1
                    if taken is not None:
                        self.hits[children.index(taken)] += 1
        return verdict


@dataclass(frozen=True, slots=True)
class Ranks:
    """acceptance[r]: probability that the child of rank r is the accepted one. error: its standard error. seen: node sets."""

    acceptance: tuple[float, ...]
    error: tuple[float, ...]
    seen: int


def measure_ranks(engine: Engine, model: str, prompts: Prompts, params: SamplingParams, width: int = 8) -> Ranks:
    """Acceptance by rank of `width` siblings drawn without replacement, on the engine's own text: two levels of `width` children.

    Rounding of counts is taken out by the nearest sequence that does not rise. Raises ConfigError if nothing was judged.
    """
    rule = RankCounter(engine.parts.rule, width)
    one = companion(engine, f"tree:{width}x{width}:{model}", length=2, rule=rule, slots=1)
    for i, prompt in enumerate(engine.encode_all(prompts)):
        one.generate([prompt], [SamplingParams(**{**_plain(params), "seed": i})])
    if not rule.seen:
        raise ConfigError("no node with siblings was judged: more prompts, or more tokens, are needed")
    return by_rank(rule.hits, rule.seen)


def by_rank(hits: Sequence[int], seen: int) -> Ranks:
    """The ranks from counts: neighbours that would rise are pooled, and share the error of their sum.

    Counts enter the error with half a hit and half a miss more, so that no rank is known without error from few node sets.

    >>> found = by_rank([2, 0, 0, 0, 1], seen=5)
    >>> found.acceptance
    (0.4, 0.05, 0.05, 0.05, 0.05)
    >>> [round(e, 4) for e in found.error]
    [0.2205, 0.0484, 0.0484, 0.0484, 0.0484]
    """
    pools = isotonic_regression(np.array(hits) / seen, increasing=False)
    size = np.diff(pools.blocks)
    total = (np.add.reduceat(np.array(hits), pools.blocks[:-1]) + 0.5) / (seen + 1)
    error = np.repeat(np.sqrt(total * (1 - total) / seen) / size, size)
    return Ranks(tuple(float(x) for x in pools.x), tuple(float(x) for x in error), seen)


def _plain(params: SamplingParams) -> dict[str, object]:
    return {
        name: getattr(params, name) for name in ("temperature", "max_tokens", "ignore_eos", "top_k", "top_p", "min_p")
    }


@dataclass(frozen=True, slots=True)
class Times:
    """verify[n]: seconds of a step with n nodes, the target's, the rule's and the engine's; level: of one level of drafting."""

    verify: tuple[float, ...]
    level: float
    measured: tuple[int, ...]


def measure_times(
    engine: Engine, model: str, prompts: Prompts, params: SamplingParams, ranks: Ranks,
    *, most: int, depth: int, repeats: int = 2, seed: int = 0,
) -> Times:  # fmt: skip
    """Steps with the best trees of 1, 2, 4, .. `most` nodes and without a draft, interleaved; between them, straight lines."""
    sizes = sorted({0, most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
    trees = {n: best_tree(ranks.acceptance, n, depth) for n in sizes if n}
    arms = [Arm("0", companion(engine, "none", length=0, slots=1))]
    arms += [
        Arm(str(n), companion(engine, f"{written(tree)}:{model}", length=tree.depth, slots=1))
        for n, tree in trees.items()
    ]
    records = run_arms(arms, prompts, params, repeats=repeats, seed=seed)
    nodes = [0, *(tree.nodes for tree in trees.values())]
    own = [_per_step(records, str(n), ("target", "rule", "host")) for n in sizes]
    own = list(np.maximum.accumulate(own))  # more rows cannot take less time
    level = float(np.median([_per_step(records, str(n), ("draft",)) / t.depth for n, t in trees.items()]))
    verify = np.interp(np.arange(most + 1), nodes, own)
    return Times(tuple(float(x) for x in verify), level, tuple(nodes))


def _per_step(records: Sequence[Record], arm: str, phases: Sequence[str]) -> float:
    """Median over runs of the seconds of a step in these phases."""
    return float(
        np.median(
            [sum(r.phases[p] for p in phases) / r.counts.steps for r in records if r.arm == arm and r.counts.steps]
        )
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """The best tree (None: do not speculate), tokens per second it should give, and those of plain decoding and the best chain."""

    tree: Static | None
    rate: float
    plain: float
    chain: int
    chain_rate: float
    tokens_per_step: float


def advise(ranks: Ranks, times: Times, depth: int) -> Advice:
    """Rank trees of all sizes and depths up to `depth` by expected tokens per second."""
    most = len(times.verify) - 1
    tree, rate = best_tree_for(ranks.acceptance, times.verify, times.level, most, depth)
    first = ranks.acceptance[0]
    chains = [
        (sum(first**i for i in range(n + 1)) / (times.verify[n] + n * times.level), n)
        for n in range(1, min(depth, most) + 1)
    ]
    chain_rate, chain = max(chains)
    plain = 1.0 / times.verify[0]
    tokens = 1.0 + accepted(tree, ranks.acceptance)
    return Advice(tree if rate > plain else None, max(rate, plain), plain, chain, chain_rate, tokens)


def written(tree: Static) -> str:
    """The tree as `load_drafter` reads it: `tree:` and the parent of every node, `a` for the anchor."""
    return "tree:" + ",".join("a" if up < 0 else str(up) for up in tree.parent)

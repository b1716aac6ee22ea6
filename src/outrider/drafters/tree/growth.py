"""How trees grow from logits of any source: level by level in a fixed shape, or best node first.

A drafter passes the logits after the anchor of every live sequence and a function that gives the logits after any nodes. This
module alone decides what is drawn, from which distribution, with which noise, and what is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from outrider.deprecated import current
from outrider.drafters.tree import chain, draws
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.shapes import MAX_NODES, Shape
from outrider.errors import ConfigError, unknown_name
from outrider.nn.ahead import Ahead
from outrider.params import SamplingParams
from outrider.transfer import Pending, fetch, read
from outrider.types import POINT_MASS, Evidence, Siblings

Sample = Literal["sampled", "greedy", "coupled"]
SAMPLES: tuple[Sample, ...] = ("sampled", "greedy", "coupled")
SIBLINGS: tuple[Siblings, ...] = get_args(Siblings)
DRAWS = {"iid": draws.inverse_cdf, "without_replacement": draws.without_replacement, "hub": draws.hub_pairs}
NextLogits = Callable[[list[tuple[int, int]]], Float[Tensor, "n W"]]
"""Logits after nodes (sequence, node), all of one depth and grouped by sequence; called once per level."""


@runtime_checkable
class Growth(Protocol):
    """depth, nodes: of the largest tree. max_expanded_nodes: most nodes of a sequence in the forest while it grows. trees: whether
    nodes may be siblings. siblings: how they are drawn."""

    siblings: Siblings

    @property
    def depth(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def max_expanded_nodes(self) -> int: ...
    @property
    def trees(self) -> bool: ...

    def grow(
        self,
        evidence: Evidence,
        depths: Sequence[int],
        forest: Forest,
        logits: Float[Tensor, "n W"],
        follow: NextLogits,
    ) -> None:
        """Add to `forest` a tree of at most depths[i] levels for each sequence i with depths[i] > 0.

        logits: after the anchor of each of those, in order.
        """
        ...

    def forget(self, slots: Sequence[int]) -> None:
        """Clear what was learnt of these slots; a drafter calls it when they are released."""
        ...


@dataclass(frozen=True, slots=True)
class Level:
    """One level about to be drawn: `frontier[e]` = (sequence, node, state of the shape) whose children row e of the logits decides.

    width: most children of any node of the shape, so that a node's noise does not depend on other nodes.
    kinds[i]: how the nodes of sequence i are chosen, see `Levels.kind`.
    """

    evidence: Evidence
    forest: Forest
    depth: int
    width: int
    frontier: list[tuple[int, int, int]]
    kinds: list[str]

    def uniforms(self, rows: Sequence[int]) -> list[list[float]]:
        """The uniforms of the children of frontier entries `rows`; siblings and cousins differ by their index in the level."""
        first: dict[int, int] = {}
        ordinal = [e - first.setdefault(i, e) for e, (i, _, _) in enumerate(self.frontier)]
        noise, w = self.evidence.noise, self.width
        return [
            [noise.uniform(self.frontier[e][0], self.depth, "draft", ordinal[e] * w + j) for j in range(w)]
            for e in rows
        ]

    def exponentials(self, rows: Sequence[int], vocab_size: int, device: torch.device) -> Float[Tensor, "r V"]:
        """The race noise of the position after each frontier entry of `rows`; cousins share it, as in the target's draw."""
        own = {
            i: self.evidence.noise.exponential(i, self.depth, vocab_size, device)
            for i in {self.frontier[e][0] for e in rows}
        }
        return torch.stack([own[self.frontier[e][0]] for e in rows])


class Chosen(NamedTuple):
    """Children of the frontier entries `rows`, all chosen in one way: `probs` is what they were drawn from, or logits ("raw")."""

    kind: str
    rows: list[int]
    probs: Tensor
    drawn: Pending[draws.Drawn]


class Levels:
    """Trees of a fixed shape, level by level.

    shape:      the number of children of each node. vocab_size: the target's.
    sample:     "sampled": from the request's processed distribution (noise lane `draft`). "greedy": the most likely tokens,
                as point masses. "coupled": by the exponential race of lane `gumbel`, for the rule `match` (with another rule
                the drafts of two steps would share noise); siblings are drawn without replacement.
    siblings:   how several children of a node are drawn: "iid", "without_replacement", or "hub" (pairs only).

    At temperature 0 the draft is greedy for any `sample`: point masses, no distribution computed. Otherwise the proposal's
    distributions are the very rows the tokens were drawn from. A node's draws never depend on the rest of the batch.
    """

    def __init__(
        self, shape: Shape, vocab_size: int, *, sample: Sample = "sampled", siblings: Siblings = "iid"
    ) -> None:
        sample = current(sample, {"law": "sampled"}, "sample")
        if sample not in SAMPLES:
            raise ConfigError(unknown_name("way to sample a draft", sample, SAMPLES))
        if siblings not in SIBLINGS:
            raise ConfigError(unknown_name("way to draw siblings", siblings, SIBLINGS))
        if siblings == "hub" and (shape.width > 2 or sample == "coupled"):
            raise ConfigError(
                "siblings of 'hub' are pairs drawn from one distribution: at most 2 children of a node, not coupled"
            )
        self.shape, self.vocab_size, self.sample = shape, vocab_size, sample
        self.depth, self.nodes, self.trees = shape.depth, shape.nodes, shape.width > 1
        self.max_expanded_nodes = self.nodes
        self.siblings: Siblings = "without_replacement" if sample == "coupled" and self.trees else siblings
        self._chains = shape.width == 1 and sample != "coupled"
        self._draw = self._race if sample == "coupled" else self._inverse_cdf

    def grow(
        self,
        evidence: Evidence,
        depths: Sequence[int],
        forest: Forest,
        logits: Float[Tensor, "n W"],
        follow: NextLogits,
    ) -> None:
        """See `Growth.grow`. Chains grow in one call of compiled code where that applies."""
        if self._chains and logits.shape[-1] == self.vocab_size:
            drawn = self.sample == "sampled"
            if chain.grow(evidence, [min(d, self.depth) for d in depths], forest, logits, follow, drawn):
                return
        frontier = [(i, -1, self.shape.start) for i, d in enumerate(depths) if d]
        kinds = [self.kind(v.params) for v in evidence.sequences]
        for depth in range(1, self.depth + 1):
            level = Level(evidence, forest, depth, self.shape.width, frontier, kinds)
            new = self._level(level, to_vocabulary(logits, self.vocab_size))
            frontier = [(i, k, state) for i, k, state in new if depths[i] > depth and self.shape.children(state)]
            if not frontier:
                return
            logits = follow([(i, k) for i, k, _ in frontier])

    def forget(self, slots: Sequence[int]) -> None:
        """A fixed shape learns nothing."""

    def _level(self, level: Level, logits: Float[Tensor, "n V"]) -> list[tuple[int, int, int]]:
        """Choose the children of every frontier node and add them to the forest; returns new (sequence, node, state) triples."""
        forest = level.forest
        groups = self.choose(level, logits)
        new: list[tuple[int, int, int]] = []
        for (kind, rows, mine, _), drawn in zip(groups, fetch(*(g.drawn for g in groups)), strict=True):
            first = forest.add_distributions(mine, drawn.sound) if kind == "drawn" else POINT_MASS
            for j, (e, chosen) in enumerate(zip(rows, drawn.tokens, strict=True)):
                i, up, state = level.frontier[e]
                row = first + j if kind == "drawn" else POINT_MASS
                tokens = chosen[: self.shape.children(state)]  # their number was decided before any was drawn
                after = self.shape.states(state, tokens)
                new += [(i, forest.add(i, up, t, row), s) for t, s in zip(tokens, after, strict=True)]
        return new

    def choose(self, level: Level, logits: Float[Tensor, "n V"]) -> list[Chosen]:
        """`level.width` children of every frontier entry, entries of one kind together; their distributions, not yet read."""
        views = level.evidence.sequences
        groups: list[Chosen] = []
        for kind in sorted({level.kinds[i] for i, _, _ in level.frontier}):
            rows = [e for e, (i, _, _) in enumerate(level.frontier) if level.kinds[i] == kind]
            mine = logits if len(rows) == len(level.frontier) else logits[rows]
            if kind == "raw":
                chosen = draws.top(mine, level.width)
            else:
                frontier = [level.frontier[e] for e in rows]
                mine = level.evidence.pipeline(
                    mine, [views[i] for i, _, _ in frontier], [level.forest.path(i, k) for i, k, _ in frontier]
                )
                chosen = draws.top(mine, level.width, floor=0.0) if kind == "edited" else self._draw(mine, level, rows)
            groups.append(Chosen(kind, rows, mine, chosen))
        return groups

    def kind(self, params: SamplingParams) -> str:
        """How nodes are chosen: "drawn" from the request's distribution, or the best of that distribution ("edited") or of the
        logits."""
        if self.sample != "greedy" and not params.greedy:
            return "drawn"
        return "edited" if params.edits else "raw"

    def _inverse_cdf(self, q: Float[Tensor, "r V"], level: Level, rows: list[int]) -> Pending[draws.Drawn]:
        uniform = level.uniforms(rows)
        draw = DRAWS[self.siblings] if level.width > 1 else draws.inverse_cdf
        return draw(q, uniform)

    def _race(self, q: Float[Tensor, "r V"], level: Level, rows: list[int]) -> Pending[draws.Drawn]:
        return draws.race(q, level.exponentials(rows, self.vocab_size, q.device), level.width)


class BestFirst:
    """The tree of the most probable nodes, rebuilt in every step (EAGLE-2: Li et al. 2024, section 4).

    The value of a node is the product of the draft's probabilities on its path, an estimate of its acceptance. Level by level
    the `width` best nodes are expanded by their `width` most likely children; of all children the `nodes` best are kept. A
    child's value never exceeds its parent's, so the kept nodes form a tree. All are point masses: the choice of nodes depends
    on the logits alone.
    """

    siblings: Siblings = "iid"
    trees = True

    def __init__(self, nodes: int, depth: int, vocab_size: int, *, width: int = 8) -> None:
        if not 1 <= nodes <= MAX_NODES or depth < 1 or width < 1:
            raise ConfigError(
                f"a dynamic tree needs 1 .. {MAX_NODES} nodes, a depth and a width >= 1, got {nodes}, {depth}, {width}"
            )
        self.nodes, self.depth, self.vocab_size, self.width = nodes, depth, vocab_size, width
        self.max_expanded_nodes = width + (depth - 1) * width * width

    def grow(
        self,
        evidence: Evidence,
        depths: Sequence[int],
        forest: Forest,
        logits: Float[Tensor, "n W"],
        follow: NextLogits,
    ) -> None:
        """See `Growth.grow`. The forest grows by every expanded node and is pruned at the end."""
        live = [i for i, d in enumerate(depths) if d]
        expanding = [(i, -1) for i in live]
        value: dict[int, list[float]] = {i: [] for i in live}
        for depth in range(1, self.depth + 1):
            fresh = self._expand(evidence, forest, value, expanding, to_vocabulary(logits, self.vocab_size))
            # a node that is not among the best so far never will be, and neither will its descendants
            frontier = [n for i in live if depths[i] > depth for n in self._frontier(i, fresh.get(i, []), value[i])]
            if not frontier:
                break
            expanding, logits = frontier, follow(frontier)
        for i in live:
            forest.keep(i, sorted(self._best(value[i])))

    def forget(self, slots: Sequence[int]) -> None:
        """Every tree is made from its own logits alone."""

    def _expand(
        self,
        evidence: Evidence,
        forest: Forest,
        value: dict[int, list[float]],
        frontier: list[tuple[int, int]],
        logits: Float[Tensor, "n V"],
    ) -> dict[int, list[int]]:
        """Add the most likely children of every frontier node; returns the new nodes of each sequence."""
        views = evidence.sequences
        edits = [views[i].params.edits for i, _ in frontier]
        if any(edits):
            q = evidence.pipeline(logits, [views[i] for i, _ in frontier], [forest.path(i, k) for i, k in frontier])
            plain = torch.softmax(logits, -1)
            q = torch.where(torch.tensor(edits, device=logits.device)[:, None], q, plain)
        else:
            q = torch.softmax(logits, -1)
        best = draws.largest(q, self.width)
        fresh: dict[int, list[int]] = {}
        for (i, up), tokens, chances in zip(frontier, *read(*best), strict=True):
            above = 1.0 if up < 0 else value[i][up]
            for token, chance in zip(tokens, chances, strict=True):
                if chance > 0.0:
                    fresh.setdefault(i, []).append(forest.add(i, up, token))
                    value[i].append(above * chance)
        return fresh

    def _frontier(self, i: int, fresh: list[int], value: list[float]) -> list[tuple[int, int]]:
        """The nodes of the newest level to expand: its `width` best, of those among the tree's best nodes."""
        kept = set(self._best(value))
        best = sorted((k for k in fresh if k in kept), key=lambda k: -value[k])[: self.width]
        return [(i, k) for k in sorted(best)]

    def _best(self, value: list[float]) -> list[int]:
        """The `nodes` most valuable nodes; ties go to the one found first, so that parents come before children."""
        return sorted(range(len(value)), key=lambda k: (-value[k], k))[: self.nodes]


class LevelLogits:
    """The `NextLogits` of drafters with one distribution per level, for every path: heads, and the slots of a block.

    logits[d, j]: of level d + 1 for the j-th sequence i with depths[i] > 0. They are there before the draft grows, so a further
    level costs no pass.
    """

    def __init__(self, logits: Float[Tensor, "levels n W"], depths: Sequence[int], forest: Forest) -> None:
        self._number = {i: n for n, i in enumerate(i for i, d in enumerate(depths) if d)}
        self._logits, self._forest = logits, forest

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n W"]:
        level = self._logits[len(self._forest.path(*frontier[0]))]
        alone = len(frontier) == len(self._number) == 1
        return level if alone else level[[self._number[i] for i, _ in frontier]]

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """See `chain.Foreseeing`."""
        fit = self._logits.dtype is torch.float32 and self._logits.is_contiguous()
        return self._logits if fit and self._logits.device.type == "cpu" else None

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """There is no forward."""


def to_vocabulary(logits: Float[Tensor, "n W"], vocab_size: int) -> Float[Tensor, "n V"]:
    """Logits over the target's vocabulary: extra columns are cut off, missing tokens get no mass."""
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    return logits[:, :vocab_size] if missing < 0 else pad(logits, (0, missing), value=-torch.inf)

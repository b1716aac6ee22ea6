"""A language model of its own proposes: chains token by token, trees level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from outrider.drafters import _draw
from outrider.drafters._catchup import TokenCache
from outrider.drafters._forest import Forest
from outrider.drafters.shapes import Shape, levels
from outrider.errors import CapabilityError, ConfigError, unknown_name
from outrider.protocols import Target
from outrider.types import POINT_MASS, Draft, Evidence, Rows, SequenceView

Sample = Literal["law", "greedy", "coupled"]
Siblings = Literal["iid", "without_replacement"]
SAMPLES: tuple[Sample, ...] = ("law", "greedy", "coupled")
SIBLINGS: tuple[Siblings, ...] = ("iid", "without_replacement")
CHUNK = 256
"""Most history tokens of one sequence that one draft forward catches up on."""


@runtime_checkable
class _Params(Protocol):
    """What this drafter reads of a request's sampling parameters."""

    @property
    def greedy(self) -> bool: ...
    @property
    def edits(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Level:
    """One level about to be drawn: `ends[e]` = (sequence, node, state of the shape) whose children row e of the logits decides.

    width: most children of any node of the shape, so that a node's noise does not depend on its neighbours.
    kinds[i]: how the nodes of sequence i are chosen, see `ModelDrafter._kind`.
    """

    evidence: Evidence
    depth: int
    width: int
    ends: list[tuple[int, int, int]]
    kinds: list[str]

    def uniforms(self, rows: Sequence[int]) -> list[list[float]]:
        """The uniforms of the children of the ends `rows`; siblings and cousins differ by their index in the level."""
        first: dict[int, int] = {}
        ordinal = [e - first.setdefault(i, e) for e, (i, _, _) in enumerate(self.ends)]
        noise, w = self.evidence.noise, self.width
        return [
            [noise.uniform(self.ends[e][0], self.depth, "draft", ordinal[e] * w + j) for j in range(w)] for e in rows
        ]

    def exponentials(self, rows: Sequence[int], vocab_size: int, device: torch.device) -> Float[Tensor, "r V"]:
        """The race noise of the position below each of the ends `rows`; cousins share it, as the target will."""
        own = {
            i: self.evidence.noise.exponential(i, self.depth, vocab_size, device)
            for i in {self.ends[e][0] for e in rows}
        }
        return torch.stack([own[self.ends[e][0]] for e in rows])


class ModelDrafter:
    """Drafts with a language model `target` (any `Target`: it is the *draft* model here) and its own KV cache.

    depth:      levels of a draft, >= 1.
    branching:  children of each node of levels 1 .. depth; None is a chain. (2, 2, 1) has 2 + 4 + 4 nodes.
    shape:      any tree of `shapes` instead; its depth counts, not `depth`.
    siblings:   how several children of a node are drawn: "iid", or "without_replacement".
    sample:     "law": from the request's own law on the draft's logits (noise lane `draft`). "greedy": the most likely
                tokens, as point masses. "coupled": by the exponential race of lane `gumbel`, for the rule `match` (with
                another rule the drafts of two steps would share noise); siblings are drawn without replacement.
    vocab_size: of the model that is drafted for; the draft's further tokens are masked, its missing ones have no mass.
                None: the draft's own.
    max_length: most tokens the draft model reads; beyond it a sequence is not drafted for. None: the model's own.

    At temperature 0 the draft is greedy whatever `sample` says: point masses, no law computed. Otherwise the proposal's
    laws are the very rows the tokens were drawn from. A node's draws never depend on the batch around it.
    """

    layers: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        depth: int,
        *,
        branching: Sequence[int] | None = None,
        shape: Shape | None = None,
        siblings: Siblings = "iid",
        sample: Sample = "law",
        vocab_size: int | None = None,
        max_length: int | None = None,
        name: str = "model",
    ) -> None:
        _check(target, depth if shape is None else shape.depth, branching, siblings, sample)
        self.shape = shape or levels(branching or (1,) * depth)
        self.trees = self.shape.width > 1
        _check_trees(target, self.trees)
        self.name, self.model = name, target
        self.vocab_size = target.vocab_size if vocab_size is None else vocab_size
        self.max_length = target.max_length if max_length is None else min(max_length, target.max_length)
        self.sample: Sample = sample
        self.siblings: Siblings = "without_replacement" if sample == "coupled" and self.trees else siblings
        self.max_depth, self.max_nodes = self.shape.depth, self.shape.nodes
        self._draw = self._race if sample == "coupled" else self._inverse_cdf
        self._grow = self._regrow if self.trees else self._append
        self._cache: TokenCache | None = None

    def bind(self, slots: int, length: int) -> None:
        """Make the draft model's own cache."""
        limit = min(length, self.max_length)
        slack = self.max_nodes if self.trees else 0
        self._cache = TokenCache(self.model, slots, limit + slack, limit)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self._bound.release(slots)

    @property
    def _bound(self) -> TokenCache:
        if self._cache is None:
            raise ConfigError("the model drafter has no cache yet: call bind(slots, length) before drafting")
        return self._cache

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Catch up with every sequence, then propose `budget[i]` levels for sequence i, fewer where the context ends.

        A sequence with budget 0 is caught up lazily, in full chunks of its committed tokens.
        """
        cache, views = self._bound, evidence.sequences
        depths = [self._room(v, b) for v, b in zip(views, budget, strict=True)]
        for view in views:
            cache.rewind(view)
        cache.ingest(views, [len(v.tokens) if d else v.cached for v, d in zip(views, depths, strict=True)], CHUNK)
        forest = Forest(len(views))
        live = [i for i, d in enumerate(depths) if d]
        if live:
            self._propose(cache, evidence, depths, live, forest)
        return forest.draft(evidence.scores.logits.device, self.siblings)

    def _room(self, view: SequenceView, budget: int) -> int:
        """Levels to draft: the deepest node that is fed to the model stands at position len + levels - 2."""
        return max(0, min(budget, self.max_depth, self._bound.limit - len(view.tokens) + 1))

    def _propose(
        self, cache: TokenCache, evidence: Evidence, depths: list[int], live: list[int], forest: Forest
    ) -> None:
        views = evidence.sequences
        slots = [views[i].slot for i in live]
        # what the cache lacks and the anchor, in one forward: its last rows give the first level
        logits = cache.append(slots, [views[i].tokens[len(cache.held[s]) :] for i, s in zip(live, slots, strict=True)])
        ends = [(i, -1, self.shape.start) for i in live]
        kinds = [self._kind(cast(_Params, v.params)) for v in views]
        for depth in range(1, self.max_depth + 1):
            new = self._level(_Level(evidence, depth, self.shape.width, ends, kinds), self._fit(logits), forest)
            ends = [(i, k, state) for i, k, state in new if depths[i] > depth and self.shape.children(state)]
            if not ends:
                return
            logits = self._grow(cache, evidence, forest, ends)

    def _level(self, level: _Level, logits: Float[Tensor, "n V"], forest: Forest) -> list[tuple[int, int, int]]:
        """Choose the children of every end and add them to the forest; the new (sequence, node, state) triples."""
        views = level.evidence.sequences
        new: list[tuple[int, int, int]] = []
        for kind in sorted({level.kinds[i] for i, _, _ in level.ends}):
            rows = [e for e, (i, _, _) in enumerate(level.ends) if level.kinds[i] == kind]
            mine = logits if len(rows) == len(level.ends) else logits[rows]
            first = POINT_MASS
            if kind == "raw":
                chosen = _draw.top(mine, level.width)
            else:
                ends = [level.ends[e] for e in rows]
                mine = level.evidence.law(mine, [views[i] for i, _, _ in ends], [forest.path(i, k) for i, k, _ in ends])
                if kind == "edited":
                    chosen = _draw.top(mine, level.width, floor=0.0)
                else:
                    first, chosen = forest.add_laws(mine), self._draw(mine, level, rows)
            for j, (e, tokens) in enumerate(zip(rows, chosen, strict=True)):
                i, up, state = level.ends[e]
                row = first + j if kind == "drawn" else POINT_MASS
                tokens = tokens[: self.shape.children(state)]  # as many as were decided before any was drawn
                after = self.shape.states(state, tokens)
                new += [(i, forest.add(i, up, t, row), s) for t, s in zip(tokens, after, strict=True)]
        return new

    def _kind(self, params: _Params) -> str:
        """How nodes are chosen: "drawn" from the request's law, or the best of that law ("edited") or of the logits."""
        if self.sample != "greedy" and not params.greedy:
            return "drawn"
        return "edited" if params.edits else "raw"

    def _inverse_cdf(self, q: Float[Tensor, "r V"], level: _Level, rows: list[int]) -> list[list[int]]:
        uniform = level.uniforms(rows)
        if level.width > 1 and self.siblings == "without_replacement":
            return _draw.without_replacement(q, uniform)
        return _draw.inverse_cdf(q, uniform)

    def _race(self, q: Float[Tensor, "r V"], level: _Level, rows: list[int]) -> list[list[int]]:
        return _draw.race(q, level.exponentials(rows, self.vocab_size, q.device), level.width)

    def _append(
        self, cache: TokenCache, evidence: Evidence, forest: Forest, ends: list[tuple[int, int, int]]
    ) -> Float[Tensor, "n V"]:
        """The next level of chains: each node's keys and values are kept, and truncated later to what was accepted."""
        return cache.append(
            [evidence.sequences[i].slot for i, _, _ in ends], [[forest.tokens[i][k]] for i, k, _ in ends]
        )

    def _regrow(
        self, cache: TokenCache, evidence: Evidence, forest: Forest, ends: list[tuple[int, int, int]]
    ) -> Float[Tensor, "n V"]:
        """The next level of trees: the anchor and all nodes so far are scored again as one forest."""
        live = list(dict.fromkeys(i for i, _, _ in ends))
        views = [evidence.sequences[i] for i in live]
        nodes = forest.nodes(live, self.model.device)
        rows = Rows.assemble(
            [v.slot for v in views], [v.tokens[-1:] for v in views], [len(v.tokens) - 1 for v in views], nodes
        )
        number = {i: b for b, i in enumerate(live)}
        scored = [len(live) + nodes.offsets[number[i]] + k for i, k, _ in ends]
        return cache.score(replace(rows, scored=rows.scored[scored]))

    def _fit(self, logits: Float[Tensor, "n W"]) -> Float[Tensor, "n V"]:
        """Logits over the target's vocabulary: its padding cut off, or the draft's missing tokens without mass."""
        missing = self.vocab_size - logits.shape[-1]
        if missing == 0:
            return logits
        return logits[:, : self.vocab_size] if missing < 0 else pad(logits, (0, missing), value=-torch.inf)


def _check(target: Target, depth: int, branching: Sequence[int] | None, siblings: str, sample: str) -> None:
    if sample not in SAMPLES:
        raise ConfigError(unknown_name("way to sample a draft", sample, SAMPLES))
    if siblings not in SIBLINGS:
        raise ConfigError(unknown_name("way to draw siblings", siblings, SIBLINGS))
    if depth < 1:
        raise ConfigError(f"a draft model needs a length >= 1, got {depth}; use the drafter 'none' to draft nothing")
    if branching is not None and len(branching) != depth:
        raise ConfigError(
            f"branching needs {depth} numbers >= 1, one for each level of the draft, got {tuple(branching)}"
        )
    if not target.rewinds:
        raise CapabilityError(
            "this draft model cannot forget rejected tokens (recurrent state): choose an attention model"
        )


def _check_trees(target: Target, trees: bool) -> None:
    if trees and not target.trees:
        raise CapabilityError("this draft model cannot score trees: use a chain (branching 1 at every level)")

"""Serving an EAGLE drafter: its own KV cache, catching up with accepted tokens, growing chains and trees.

The model is a `network.EagleNetwork`: EAGLE-3's or EAGLE-1's. Rows of several sequences go through the matrix products
together; attention runs per sequence, over its own context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.checkpoint import read_config
from outrider.drafters.context import Backlog, Context
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.forward import Forward, NativeForward, forward_of
from outrider.drafters.eagle.network import EagleNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.errors import ConfigError
from outrider.nn.ahead import Ahead
from outrider.nn.drafts import Rows
from outrider.nn.row_cache import RowCache
from outrider.protocols import Drafter, Target
from outrider.records import CacheNeed
from outrider.types import Draft, Evidence, SequenceView

ForwardOf = Callable[[Any, int], Forward]
"""From a network and the rows of a slot to its forward."""
CHUNK = 256
"""Most rows of one sequence in one pass."""


class SlotState:
    """What is known of a slot beside its context rows: the state of the last of them, the draft's rows.

    parents: of each row of the draft, its parent's number among them, -1 for the context. nodes: state and row of each node.
    """

    __slots__ = ("nodes", "parents", "state")

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.nodes: dict[int, tuple[Tensor, int]] = {}
        self.parents: list[int] = []


class EagleDrafter:
    """Drafts with a feature model that has its own KV cache of one layer.

    growth: how drafts grow: chains and trees of a fixed shape, sampled or greedy, or best-first trees (EAGLE-2). forward: makes the
    forward of the model for slots of so many rows.

    Every accepted row of the target is a new context row, even if nothing is drafted, because hidden states are available only
    once; while nothing is drafted for a sequence they are put aside, and read together later. A sequence with missed rows starts
    over with the rows it has: its drafts are then less accurate, but still exact.
    """

    def __init__(
        self, model: EagleNetwork, growth: Growth, *, name: str = "eagle", forward: ForwardOf = forward_of
    ) -> None:
        self.name, self.model, self.growth, self._forward_of = name, model, growth, forward
        self.layers: tuple[int, ...] = tuple(sorted(set(model.config.taps)))
        self._order = [self.layers.index(t) for t in model.config.taps]
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self.context = Context(0)
        self.backlog = Backlog(self.context)
        self._states: list[SlotState] = []
        self._run: Forward | None = None

    def bind(self, slots: int, length: int) -> None:
        """Allocate the drafter's KV cache."""
        c, capacity = self.model.config, length + self.growth.max_expanded_nodes
        self._run = self._forward_of(self.model, capacity)
        self.cache = RowCache(1, slots, c.kv_heads, capacity, c.head_dim, self._run.dtype, self.model.fc.weight.device)
        self.context = Context(slots)
        self.backlog = Backlog(self.context)
        self._states = [SlotState() for _ in range(slots)]

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """What `bind` allocates, and rows that are put aside."""
        waiting = Backlog.size(slots, len(self._order), self.model.config.target_hidden, self.model.fc.weight.dtype)
        return CacheNeed(fixed=self.cache_size(slots, length) + waiting)

    def cache_size(self, slots: int, length: int) -> int:
        """Bytes of the KV cache of a network of this shape."""
        c, dtype = self.model.config, self.model.fc.weight.dtype
        return RowCache.size(1, slots, c.kv_heads, length + self.growth.max_expanded_nodes, c.head_dim, dtype)

    def keep_within(self, tokens: int) -> None:
        """Nothing: it has no pages."""

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.cache.release(slots)
        self.context.release(slots)
        self.backlog.release(slots)
        self.growth.forget(slots)
        for slot in slots:
            self._states[slot] = SlotState()

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Catch up with every accepted row, then propose `budget[i]` levels for sequence i."""
        if self._run is None:
            raise ConfigError("the feature drafter has no cache yet: call bind(slots, length) before drafting")
        wanted = {view.slot for view, depth in zip(evidence.sequences, budget, strict=True) if depth > 0}
        read = self._catch_up(self._run, evidence, wanted)
        if not wanted:
            return Draft.empty(len(budget), evidence.scores.logits.device)
        forest, depths = Forest(len(budget)), [0] * len(budget)
        live = []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            place = self._states[view.slot]
            place.nodes = {}
            if depth > 0 and place.state is not None and self.context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                place.nodes, place.parents = {-1: (place.state, -1)}, []
                live.append(view.slot)
        if live:
            slots = [view.slot for view in evidence.sequences]
            starts = [self.context.next[s] for s in slots]
            follow = self.follower(self._run, slots, starts, forest)
            self.growth.grow(evidence, depths, forest, self._first_logits(self._run, live, read), follow)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _catch_up(self, run: Forward, evidence: Evidence, wanted: set[int]) -> list[tuple[list[int], Tensor]]:
        """Feed the pairs (hidden states of a kept row, the token behind it), all sequences in one pass where chunks allow.

        Returns for every pass the slots of `wanted` whose last row was in it, and the logits after those rows.
        """
        found, hidden = self.backlog.due(evidence, self._order, wanted)
        self.cache.release([new.view.slot for new in found if new.gap])
        work, out = [(new.view, new.rows) for new in found], []
        while work:
            last = {view.slot for view, kept in work if len(kept) <= CHUNK} & wanted
            out.append(self._feed(run, hidden, [(v, kept[:CHUNK]) for v, kept in work], last))
            work = [(v, kept[CHUNK:]) for v, kept in work if len(kept) > CHUNK]
        return out

    def _feed(
        self, run: Forward, taps: list[Tensor], work: list[tuple[SequenceView, list[int]]], scored: set[int]
    ) -> tuple[list[int], Tensor]:
        rows, ends = Rows(), []
        for view, kept in work:
            at = self.context.next[view.slot]
            rows.add(
                view.slot,
                self.cache.length[view.slot],
                view.tokens[at + 1 : at + 1 + len(kept)],
                range(at, at + len(kept)),
            )
            ends.append(len(rows.token) - 1)
        slots = [view.slot for view, _ in work]
        rows.scored = [end for slot, end in zip(slots, ends, strict=True) if slot in scored]
        state, logits = run.forward(rows, self.cache, taps=taps, tap_rows=[r for _, kept in work for r in kept])
        self.read_further(rows, state)
        for (view, kept), end in zip(work, ends, strict=True):
            self.cache.length[view.slot] += len(kept)
            self.context.next[view.slot] += len(kept)
            self._states[view.slot].state = state[end].clone()  # a view keeps the rows of the whole step
        return [slot for slot in slots if slot in scored], logits

    def read_further(self, rows: Rows, state: Float[Tensor, "n D"]) -> None:
        """For drafters with more networks: context rows that this one has read, and its outputs, before they are kept."""

    def follower(self, run: Forward, slots: list[int], starts: list[int], forest: Forest) -> Follower:
        """What gives the logits after nodes."""
        places = [self._states[slot] for slot in slots]
        return Follower(run, self.model, self.cache, slots, places, starts, forest)

    def _first_logits(
        self, run: Forward, live: list[int], read: list[tuple[list[int], Tensor]]
    ) -> Float[Tensor, "n V"]:
        """Logits after the last context row of each live slot: those that were just read, or of its kept state."""
        for slots, logits in read:
            if slots == live:
                return logits
        known = {slot: row for slots, logits in read for slot, row in zip(slots, logits, strict=True)}
        states = {slot: self._states[slot].state for slot in live}
        return torch.stack([known[s] if s in known else run.logits(states[s][None])[0] for s in live])  # type: ignore[index]


class Follower:
    """Feeds draft nodes: each sees the context, its ancestors and itself; its feature is its parent's output.

    places: of each sequence, for those that are drafted for. starts: positions of their first nodes.
    """

    def __init__(
        self,
        run: Forward,
        model: EagleNetwork,
        cache: RowCache,
        slots: list[int],
        places: list[SlotState],
        starts: list[int],
        forest: Forest,
    ) -> None:
        self._run, self._model, self._cache, self._forest = run, model, cache, forest
        self._slots, self._places, self._starts = slots, places, starts

    def __call__(self, frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
        forest = self._forest
        depth = len(forest.path(*frontier[0]))
        rows, features = Rows(scored=range(len(frontier))), []
        for i, own in groupby(frontier, key=lambda pair: pair[0]):
            place, slot, nodes = self._places[i], self._slots[i], [k for _, k in own]
            above = [place.nodes[forest.parent[i][k]] for k in nodes]
            first = len(place.parents)
            place.parents += [row for _, row in above]
            place.nodes |= {
                k: (state, row) for row, (k, (state, _)) in enumerate(zip(nodes, above, strict=True), first)
            }
            features += [state for state, _ in above]
            position = [self._starts[i] + depth - 1] * len(nodes)
            rows.add(slot, self._cache.length[slot], [forest.tokens[i][k] for k in nodes], position, place.parents)
        state, logits = self._run.forward(rows, self._cache, feature=self._model.feed(torch.stack(features)))
        for (i, k), own_state in zip(frontier, state, strict=True):
            nodes = self._places[i].nodes
            nodes[k] = (own_state, nodes[k][1])
        return logits

    def levels(self) -> Float[Tensor, "levels n V"] | None:
        """Every level takes a forward."""

    def ahead(self, live: list[int], depth: list[int], logits: Float[Tensor, "r V"]) -> Ahead | None:
        """See `tree.chain.Foreseeing`."""
        as_it_is = type(self._model).feed is EagleNetwork.feed  # compiled code hands a state down unchanged
        if not isinstance(self._run, NativeForward) or not as_it_is:
            return None
        slots, starts = [self._slots[i] for i in live], [self._starts[i] for i in live]
        return self._run.ahead(self._cache, slots, starts, [self._places[i].nodes[-1][0] for i in live], logits)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    network = Eagle1Network if read_config(folder)[1] in ("eagle", "llama") else Eagle3Network
    model = network.load(folder, target).to(target.device)
    forward = partial(forward_of, rounding=spec.rounding_for(model.fc.weight, fits=model.shape.fits))
    return EagleDrafter(model, spec.growth(target.vocab_size), forward=forward)

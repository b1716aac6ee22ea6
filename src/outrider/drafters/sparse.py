"""Self-speculation: the target drafts for itself and looks at a part of its own KV cache (MagicDec, Chen et al. 2025).

At long context most of a step goes into reading keys and values, and most of those get hardly any weight. So the target with a view
of a few hundred cached tokens is a drafter that costs little more than its weights, needs no training and no memory. The view is a
list of ranges of the target's own cache: nothing is copied. Rows of drafted tokens are written behind the committed ones, as those
of a verification are, and dropped again before it begins; the verification writes them anew with full attention.

Which tokens are seen, beside the newest:

    window   the first ones (attention sinks, Xiao et al. 2023) and the newest (StreamingLLM)
    snap     those that the prompt's last rows looked at, chosen again only now and then (after SnapKV, Li et al. 2024)
    pillar   those that the last verification looked at, chosen in every step (after SparseSpec, 2025)

`sparse:int8` sees all of them in fewer bits, which takes a copy: coded.py. The first layers of a target may draft over a view too:
those layers of its cache are theirs.

The target's scores of earlier rows are evidence like any other, and a choice never looks at a drafted token, so the declared
distributions are those that the tokens were drawn from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.coded import WIDTH, CodedDrafter
from outrider.drafters.model.early_exit import early_exit, first_layers
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import Drafter, KVCache, Target
from outrider.theory.context_times import FURTHER_ROW, ContextTimes
from outrider.types import Draft, Evidence, Rows, Segment, SequenceView

Ranges = tuple[tuple[int, int], ...]
KINDS = ("window", "snap", "pillar")
REFRESH = 256
"""Tokens after which `snap` chooses again."""
SINKS = 16
"""First tokens that `snap` and `pillar` always see."""
EXPECTED, ROW = 0.8, 0.02
"""What `worthwhile_from` assumes: acceptance, and the cost of a row as a share of reading the weights."""


@runtime_checkable
class AttendedCache(KVCache, Protocol):
    """A cache that can tell which of its tokens get weight; see `nn.kv.PagedKV`."""

    attended: dict[int, Tensor] | None
    chunk: int


@dataclass(frozen=True, slots=True)
class Sparse:
    """Which cached tokens are seen: `sinks` first and `recent` newest ones, and `chosen` between them by weight.

    refresh: how many new tokens a choice lasts; 0: until the next step.
    """

    kind: Literal["window", "snap", "pillar"]
    sinks: int
    recent: int
    chosen: int = 0
    refresh: int = 0

    @property
    def size(self) -> int:
        """Most cached tokens that are seen."""
        return self.sinks + self.recent + self.chosen


def parse_sparse(spec: str) -> Sparse:
    """`window:SINKS+RECENT`, `snap:SIZE` or `pillar:SIZE`; a quarter of SIZE goes to the newest tokens. Raises ConfigError."""
    if found := re.fullmatch(r"window:(\d{1,6})\+(\d{1,6})", spec):
        sinks, recent = map(int, found.groups())
        if recent > 0:
            return Sparse("window", sinks, recent)
    elif found := re.fullmatch(r"(snap|pillar):(\d{1,6})", spec):
        size = int(found.group(2))
        if size >= 4 * SINKS:
            recent = size // 4
            kind: Literal["snap", "pillar"] = "snap" if found.group(1) == "snap" else "pillar"
            return Sparse(kind, SINKS, recent, size - SINKS - recent, REFRESH if kind == "snap" else 0)
        raise ConfigError(
            f"a sparse view of {size} tokens is too small: give at least {4 * SINKS}, as 'sparse:{spec[:4]}:512'"
        )
    raise ConfigError(
        f"a sparse view is written 'sparse:window:16+496' (first and newest tokens), 'sparse:snap:512', 'sparse:pillar:512' or "
        f"'sparse:int8', got 'sparse:{spec}'"
    )


@dataclass(slots=True)
class _Choice:
    """Ranges chosen for a slot when its sequence had `length` tokens; weight: what they were chosen by."""

    length: int
    weight: Tensor | None = field(default=None, repr=False)


class SparseDrafter:
    """Drafts chains with the target itself over a view of its cache. Nothing is drafted until a context is longer than the view,
    and has `least` tokens.

    Raises CapabilityError for a target that cannot look at a part of its cache, and for trees.
    """

    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, target: Target, view: Sparse, growth: Growth, least: int = 0) -> None:
        if not getattr(target, "views", False):
            raise CapabilityError(
                f"this {type(target).__name__} cannot look at a part of its cache (it has sliding windows, or runs through "
                "transformers): use a draft model, or 'ngram'"
            )
        if growth.trees:
            raise CapabilityError("a sparse view drafts chains only: drop the tree before 'sparse:'")
        self.target, self.view, self.growth, self.least = target, view, growth, least
        self.name = f"sparse:{view.kind}"
        self.max_depth = self.max_nodes = growth.depth
        self._kv: KVCache | None = None
        self._chosen: dict[int, _Choice] = {}

    def bind(self, slots: int, length: int) -> None:
        """Nothing: there is no memory of its own."""

    def borrow(self, kv: KVCache) -> None:
        """The target's cache, which is read, and written to behind its committed tokens. Called once, when the engine is built.

        Raises CapabilityError if a choice by weight is wanted and the cache cannot tell weights.
        """
        self._kv = kv
        if self.view.chosen:
            if not isinstance(kv, AttendedCache):
                raise CapabilityError(
                    "this target's cache does not tell what was looked at: use 'sparse:window:16+496'"
                )
            kv.attended = {}

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self.growth.forget(slots)
        for slot in slots:
            self._chosen.pop(slot, None)

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Chains of at most budget[i] tokens; none where the whole cache would be in view."""
        views = evidence.sequences
        forest = Forest(len(views))
        depths = [min(b, self.max_depth) if self._can(v) else 0 for v, b in zip(views, budget, strict=True)]
        live = [i for i, d in enumerate(depths) if d]
        if live:
            seen = {views[i].slot: self.ranges(views[i]) for i in live}
            try:
                logits = self._feed(views, {i: views[i].tokens[-1] for i in live}, seen)
                self.growth.grow(
                    evidence, depths, forest, logits,
                    lambda frontier: self._feed(views, {i: forest.tokens[i][k] for i, k in frontier}, seen),
                )  # fmt: skip
            finally:
                for i in live:
                    self.kv.truncate(views[i].slot, views[i].cached)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    @property
    def kv(self) -> KVCache:
        """The target's cache."""
        if self._kv is None:
            raise ConfigError("a sparse view has no cache yet: call borrow(kv) before drafting")
        return self._kv

    def _can(self, view: SequenceView) -> bool:
        return view.cached == len(view.tokens) - 1 and view.cached > self.view.size and view.cached >= self.least

    def _feed(
        self, views: Sequence[SequenceView], tokens: dict[int, int], seen: dict[int, Ranges]
    ) -> Float[Tensor, "n V"]:
        """Logits after one more token of some sequences, whose keys and values are kept until the draft is made."""
        slots = [views[i].slot for i in tokens]
        at = [self.kv.length[slot] for slot in slots]
        drafted = Draft.empty(len(slots), self.target.device)
        rows = Rows.assemble(slots, [[token] for token in tokens.values()], at, drafted)
        rows = replace(
            rows,
            segments=tuple(self._limited(s, views[i].cached, seen) for i, s in zip(tokens, rows.segments, strict=True)),
        )
        logits = self.target.forward(rows, self.kv).logits
        self.kv.commit(rows, [()] * len(slots))
        return logits

    @staticmethod
    def _limited(s: Segment, committed: int, seen: dict[int, Ranges]) -> Segment:
        """A row that sees its view of the committed tokens, and all drafted ones."""
        return replace(s, view=merged((*seen[s.slot], (committed, s.cached))))

    # ------------------------------------------------------------------ what is seen
    def ranges(self, view: SequenceView) -> Ranges:
        """The cached tokens of a sequence that are seen now."""
        spec, n = self.view, view.cached
        fixed = ((0, spec.sinks), (n - spec.recent, n))
        weight = self._weight(view) if spec.chosen else None
        if weight is None:
            return merged(((0, spec.sinks), (n - spec.recent - spec.chosen, n)))
        chunk = self.kv.chunk  # type: ignore[attr-defined]
        first, last = -(-spec.sinks // chunk), (n - spec.recent) // chunk  # chunks that lie between
        between = weight[first:last]
        best = torch.topk(between, min(spec.chosen // chunk, len(between))).indices.tolist()
        return merged((*fixed, *(((first + c) * chunk, (first + c + 1) * chunk) for c in best)))

    def _weight(self, view: SequenceView) -> Tensor | None:
        """What each chunk is chosen by: what the target's last rows gave it, or those of the last choice while it lasts."""
        slot, n = view.slot, len(view.tokens)
        held = self._chosen.get(slot)
        if held is None or not self.view.refresh or not held.length <= n < held.length + self.view.refresh:
            attended = self.kv.attended  # type: ignore[attr-defined]
            held = self._chosen[slot] = _Choice(n, attended.get(slot))
        return held.weight


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """The same tokens as increasing ranges that do not touch."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        elif start < end:
            out.append((start, end))
    return tuple(out)


def load_sparse(spec: str, target: Target, growth: Growth, least: int = 0) -> Drafter:
    """The drafter `sparse:SPEC` for a target or its first layers; ConfigError for bad grammar, CapabilityError if the target cannot
    do it.

    least: cached tokens below which nothing is drafted.
    """
    if spec == WIDTH:
        return CodedDrafter(target, growth)
    return SparseDrafter(target, parse_sparse(spec), growth, least)


def load_early(spec: str, target: Target, growth: Growth) -> Drafter:
    """The drafter `early:SPEC`: the target's first layers, over a cache of their own ("4") or over a view of the target's
    ("4:sparse:window:16+496"). Raises as `load_sparse`."""
    found = re.fullmatch(r"(\d{1,4})(?::sparse:(.+))?", spec)
    if found is None:
        raise ConfigError(
            "an early exit is written 'early:LAYERS', as 'early:2', or over a view 'early:2:sparse:window:16+496', got "
            f"'early:{spec}'"
        )
    layers, view = int(found.group(1)), found.group(2)
    if view is None:
        return early_exit(target, layers, growth)
    made = load_sparse(view, first_layers(target, layers), growth)
    made.name = f"early:{layers}:{made.name}"
    return made


def view_beside(spec: str, target: Target, load: Callable[[], tuple[Target, object]], growth: Growth) -> Drafter | None:
    """A view of the target's own cache, from the context on where it is expected to gain more than a draft model, or where that
    model's context ends; None where that is nowhere, or not known. load: loads it, and is called only if a view can gain."""
    view = parse_sparse(spec)
    least = None if worthwhile_from(target, view) is None else worthwhile_from(target, view, load()[0])
    return None if least is None else load_sparse(spec, target, growth, least)


def worthwhile_from(target: Target, view: Sparse, model: Target | None = None) -> int | None:
    """Cached tokens from which one sequence is expected to gain from this view, and more than from a draft model if there is one;
    None where that is not known, or at no context that the target can well reach (half of its longest at most).

    By the bytes that a step reads (`step_bytes` of the target), an acceptance of EXPECTED, and rows as they were measured.
    """
    times = _by_bytes(target)
    if times is None or not getattr(target, "views", False):
        return None
    other = None if model is None else _by_bytes(model)
    if model is None:
        found = times.crossing(1, view.size, EXPECTED)
    elif other is not None:
        found = times.overtakes(1, view.size, EXPECTED, other, model.max_length)
    else:
        return None
    return found if found is not None and 2 * found <= target.max_length else None


def _by_bytes(model: Target) -> ContextTimes | None:
    """Times in bytes, if the model says what a step reads."""
    weights, token = getattr(model, "step_bytes", None) or (0.0, 0.0)
    return ContextTimes(weights, ROW * weights, token, FURTHER_ROW * token) if weights else None

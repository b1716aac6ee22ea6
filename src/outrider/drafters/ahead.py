"""Drafting in parallel with verification: while the target verifies a draft, the drafts for its likely outcomes are made.

A prepared draft is used only if all of its premise came true: how many tokens were accepted, and the token behind them. Noise is
keyed by seed and place, so it is the very draft that the drafter would make now: with or without preparation, in time or too late,
the text is the same (speculative speculation, arXiv 2603.03251, but exact at every miss: the drafter then drafts as always).

The drafts for all outcomes of all sequences grow together, a pass of the draft model for each level. Each outcome has a slot of its
own in the draft model's cache, which begins with the pages of its sequence (`PagedKV.fork`) and gives them back a step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest

import torch

from outrider.drafters.combine import merge, shortened
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.worker import Worker
from outrider.errors import CapabilityError, ConfigError
from outrider.nn.kv import PAGE
from outrider.noise import Noise
from outrider.protocols import Drafter
from outrider.records import CacheNeed
from outrider.types import POINT_MASS, Draft, Evidence, Rows, Scores, SequenceView, Verdict

ACCEPTED = 0.8
"""The acceptance that premises are ordered by, until drafts have been verified."""
MEMORY = 64.0
"""Judged tokens after which what was learnt about acceptance has lost 63% of its weight."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A prepared draft: that of sequence `index` of `drafts`, and the slot that holds its keys and values."""

    drafts: Draft
    index: int
    slot: int


@dataclass(slots=True)
class _Expected:
    """What is expected of a sequence. length: tokens of its text then. made: the drafts, by the tokens behind that text."""

    view: SequenceView
    length: int
    made: dict[tuple[int, ...], _Made] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Premise:
    """An outcome of the verification. tail: the tokens behind the text so far. view: the sequence then, with a slot of its own."""

    expected: _Expected
    tail: tuple[int, ...]
    view: SequenceView
    budget: int


@dataclass(frozen=True, slots=True)
class _Task:
    """Premises whose drafts are made together, and the step that they follow."""

    premises: list[_Premise]
    evidence: Evidence


class Ahead:
    """A draft model that prepares its drafts for up to `premises` outcomes per sequence while the target verifies the last ones.

    inner: a draft model that makes chains, one level deeper than drafts are to be: its last token only predicts the token behind a
    draft that is accepted whole. inline: prepare in the caller's thread, which gains nothing and is deterministic, for tests.
    Raises CapabilityError for a drafter that is no draft model (it needs what only a verification can tell, or has nothing to hide)
    or drafts trees.
    """

    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, inner: Drafter, premises: int, *, inline: bool = False) -> None:
        if not isinstance(inner, ModelDrafter) or inner.trees or hasattr(inner, "borrow"):
            raise CapabilityError(
                f"only chains of a draft model can be drafted ahead, not those of {inner.name!r}: drop 'ahead:'"
            )
        if premises < 1 or inner.max_depth < 2:
            raise ConfigError(
                f"drafting ahead needs premises >= 1 and a draft length >= 1, got {premises} and {inner.max_depth - 1}"
            )
        self.inner, self.premises, self.inline = inner, premises, inline
        self.name = f"ahead:{premises}:{inner.name}"
        self.max_depth = self.max_nodes = inner.max_depth - 1
        self.hits = self.misses = 0
        self.notices: list[str] = []
        self._expected: dict[int, _Expected] = {}  # by slot
        self._slots = 0
        self._within: int | None = None
        self._judged, self._accepted = 0.0, 0.0
        self._worker = Worker()

    def bind(self, slots: int, length: int) -> None:
        """Bind the drafter, with a slot for every premise, and pages for what premises hold apart from their sequences."""
        self._slots = slots
        within = slots * PAGE * -(-length // PAGE) if self._within is None else self._within
        self.inner.keep_within(within + self._extra(slots))
        self.inner.bind(slots * (1 + self.premises), length)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """Of the drafter, and what premises add to their sequences' pages."""
        need = self.inner.cache_need(slots, length)
        return CacheNeed(need.fixed + self._extra(slots) * need.token, need.token)

    def _extra(self, slots: int) -> int:
        """Tokens of the pages that premises do not share with their sequences: a copy of a begun one, and those behind it."""
        return slots * self.premises * PAGE * (2 + 2 * self.inner.max_depth // PAGE)

    def keep_within(self, tokens: int) -> None:
        """Limit the drafter's pages, those of premises apart."""
        self._within = tokens

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots, and what was prepared for them."""
        self._worker.pause()
        self._forget(slots)
        self.inner.release([*slots, *(place for slot in slots for place in self._places(slot))])

    def _forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._expected.pop(slot, None)

    def _places(self, slot: int) -> range:
        """The slots of a sequence's premises."""
        first = self._slots + slot * self.premises
        return range(first, first + self.premises)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The prepared drafts whose premise came true, and the drafter's own for the other sequences."""
        self._worker.pause()
        if error := self._worker.error:
            self._worker.error, self._worker.off = None, True
            self.notices = [f"drafts are no longer prepared ahead, since that failed ({error}): they are made as usual"]
            self.release([v.slot for v in evidence.sequences])  # where it broke off is unknown
        self._learn(evidence.verdict)
        views = evidence.sequences
        found = [self._prepared(v, min(b, self.max_depth)) for v, b in zip(views, budget, strict=True)]
        self._take_over(views, found)  # first: no draft lacks a page that a premise holds
        own = self._own(evidence, found, budget)
        whole = _with_prepared(own, found, [b + 1 for b in budget], evidence.scores.logits.shape[-1])
        if not self._worker.off:
            outcomes = [self._outcomes(v, whole, i, b) for i, (v, b) in enumerate(zip(views, budget, strict=True))]
            # where pages are short the likeliest outcome of every sequence gets them first
            ranks = zip_longest(*outcomes)
            self._start(_Task([p for rank in ranks for p in rank if p is not None], evidence))
        return shortened(whole, [min(b, self.max_depth) for b in budget])

    def _prepared(self, view: SequenceView, depth: int) -> _Made | None:
        """The draft that was made for what has now happened to a sequence; None if there is none."""
        found = self._expected.get(view.slot)
        if depth < 1 or found is None or found.view.seed != view.seed or found.view.params is not view.params:
            return None
        made = found.made.get(tuple(view.tokens[found.length :]))
        self.hits, self.misses = self.hits + (made is not None), self.misses + (made is None)
        return made

    def _own(self, evidence: Evidence, found: Sequence[_Made | None], budget: Sequence[int]) -> Draft:
        """The drafter's drafts, one token longer than asked for, of the sequences that have no prepared one."""
        rest = [i for i, made in enumerate(found) if made is None]
        if not rest:
            return Draft.empty(len(found), evidence.scores.logits.device)
        draft = self.inner.draft(_of(evidence, rest), [budget[i] + 1 if budget[i] else 0 for i in rest])
        number = {i: n for n, i in enumerate(rest)}
        return draft.take([number.get(i, -1) for i in range(len(found))])

    def _take_over(self, views: Sequence[SequenceView], found: Sequence[_Made | None]) -> None:
        """Give sequences the keys and values of the drafts that they use, and premises' pages back."""
        self._forget([v.slot for v in views])
        cache = self.inner.cache
        if cache.forks:
            for view, made in zip(views, found, strict=True):
                if made is not None:
                    cache.fork(made.slot, view.slot, len(cache.held[made.slot]))
                cache.release([place for place in self._places(view.slot) if cache.held[place]])

    def _outcomes(self, view: SequenceView, draft: Draft, i: int, budget: int) -> list[_Premise]:
        """The likeliest outcomes of the verification of sequence i's draft."""
        nodes = draft.nodes(i)
        if (
            budget < 1 or len(nodes) < 2 or view.params.edits
        ):  # the tables of grammars and penalties follow one text only
            return []
        rate = self._accepted / self._judged if self._judged >= 16 else ACCEPTED
        tokens = [draft.tokens[k] for k in nodes]
        kept = min(len(nodes) - 1, budget)  # what is handed over; the token behind it is only a prediction
        found: list[tuple[float, tuple[int, ...]]] = []
        for n in range(kept + 1):
            reached = rate**n * (1.0 if n == kept else 1.0 - rate)
            for chance, token in _next(draft, nodes[n], tokens[n], self.premises, whole=n == kept):
                found.append((reached * chance, (*tokens[:n], token)))
        expected = self._expected[view.slot] = _Expected(view, len(view.tokens))
        tails = [tail for _, tail in sorted(found, reverse=True)[: self.premises]]
        return [
            self._premise(expected, tail, place, budget)
            for tail, place in zip(tails, self._places(view.slot), strict=False)
        ]

    def _premise(self, expected: _Expected, tail: tuple[int, ...], place: int, budget: int) -> _Premise:
        view, cache = expected.view, self.inner.cache
        tokens = [*view.tokens, *tail]
        if cache.forks:
            cache.fork(view.slot, place, len(tokens) - 1)
        then = replace(view, slot=place, tokens=tokens, cached=len(tokens) - 1, shares=False)
        return _Premise(expected, tail, then, budget + 1)

    def _start(self, task: _Task) -> None:
        """Have the drafts made for these premises."""
        if self.inline:
            self._prepare(task)
        elif task.premises:
            self._worker.start(partial(self._prepare, task))

    def _prepare(self, task: _Task) -> None:
        if not task.premises:
            return
        drafts = self.inner.draft(_after(task), [p.budget for p in task.premises])
        for i, premise in enumerate(task.premises):
            if not drafts.counts[i]:  # it had no pages: what its sequence's own slot holds is better than nothing
                continue
            premise.expected.made[premise.tail] = _Made(drafts, i, premise.view.slot)

    def _learn(self, verdict: Verdict) -> None:
        for judged, path in zip(verdict.judged, verdict.path, strict=True):
            keep = max(0.0, 1.0 - judged / MEMORY)
            self._judged, self._accepted = keep * self._judged + judged, keep * self._accepted + len(path)


def _next(draft: Draft, node: int, token: int, most: int, *, whole: bool) -> list[tuple[float, int]]:
    """Likely tokens in the place of a node and their shares. whole: everything before was accepted, and the node is a prediction;
    otherwise the node's own token was rejected."""
    if draft.q is None or draft.q.row[node] < 0:
        return [(1.0, token)] if whole else []
    probs, support = draft.q.probs[draft.q.row[node]], draft.q.support
    best = probs.topk(min(most + 1, len(probs)))
    ids = best.indices if support is None else support[best.indices]
    pairs = [(p, t) for p, t in zip(best.values.tolist(), ids.tolist(), strict=True) if p > 0 and (whole or t != token)]
    share = 1.0 if whole else sum(p for p, _ in pairs) or 1.0
    return [(p / share, t) for p, t in pairs]


def _after(task: _Task) -> Evidence:
    """What a drafter that reads nothing but the text would see of these premises."""
    views = tuple(p.view for p in task.premises)
    scores = task.evidence.scores.logits
    nothing = torch.empty(0, dtype=torch.int64, device=scores.device)
    none = (-1,) * len(views)
    return Evidence(
        rows=Rows(nothing, nothing, (), nothing),
        scores=Scores(scores[:0]),
        draft=Draft.empty(0, scores.device),
        verdict=Verdict((), (), (), (), (), ()),
        sequences=views,
        segment_index=none,
        verdict_index=none,
        noise=Noise(tuple(v.seed for v in views), tuple(v.cached for v in views)),
        pipeline=task.evidence.pipeline,
    )


def _with_prepared(own: Draft, found: Sequence[_Made | None], most: Sequence[int], vocab_size: int) -> Draft:
    """One draft: the prepared ones where there are, of at most `most[i]` tokens, and the drafter's own elsewhere."""
    drafts, chosen = [own], [0] * len(found)
    for i, made in enumerate(found):
        if made is not None:
            chosen[i] = len(drafts)
            one = shortened(_alone(made), [most[i]])
            drafts.append(one.take([0 if i == j else -1 for j in range(len(found))]))
    return own if len(drafts) == 1 else merge(drafts, chosen, vocab_size)


def _alone(made: _Made) -> Draft:
    """A prepared draft without the others that were made with it."""
    one = made.drafts.take([made.index])
    if one.q is None:
        return one
    rows = sorted({r for r in one.q.row if r >= 0})
    number = {r: n for n, r in enumerate(rows)} | {POINT_MASS: POINT_MASS}
    probs = one.q.probs[rows]
    sound = None if one.q.sound is None else probs
    return replace(one, q=replace(one.q, probs=probs, row=tuple(number[r] for r in one.q.row), sound=sound))


def _of(evidence: Evidence, index: Sequence[int]) -> Evidence:
    """What of it concerns some of its sequences, in the order given; rows, draft and verdict are those of all."""
    if list(index) == list(range(len(evidence.sequences))):
        return evidence
    return replace(
        evidence,
        sequences=tuple(evidence.sequences[i] for i in index),
        segment_index=tuple(evidence.segment_index[i] for i in index),
        verdict_index=tuple(evidence.verdict_index[i] for i in index),
        noise=evidence.noise.take(index),
    )

"""Drafting in parallel with verification: while the target verifies a draft, the drafts for its likely outcomes are made.

A prepared draft is used only if all of its premise came true: how many tokens were accepted, and the token behind them. Noise is
keyed by seed and place, so it is the very draft that the drafter would make now: with or without preparation, in time or too late,
the text is the same (speculative speculation, arXiv 2603.03251, but exact at every miss: the drafter then drafts as always).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from outrider.drafters.combine import merge
from outrider.drafters.model.drafter import ModelDrafter
from outrider.errors import CapabilityError, ConfigError
from outrider.noise import Noise
from outrider.protocols import Drafter
from outrider.records import CacheNeed
from outrider.types import Draft, Evidence, Proposal, Rows, Scores, SequenceView, Verdict

logger = logging.getLogger(__name__)
ACCEPTED = 0.8
"""The acceptance that premises are ordered by, until drafts have been verified."""
MEMORY = 64.0
"""Judged tokens after which what was learnt about acceptance has lost 63% of its weight."""


@dataclass(slots=True)
class _Expected:
    """What is expected of a sequence. length: tokens of its text then. made: the drafts so far, by the tokens behind that text."""

    view: SequenceView
    length: int
    made: dict[tuple[int, ...], Draft] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Premise:
    """An outcome of the verification, and the evidence there would be. tail: the tokens behind the text so far."""

    expected: _Expected
    tail: tuple[int, ...]
    chance: float
    evidence: Evidence
    budget: int


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
        self._judged, self._accepted = 0.0, 0.0
        self._worker = _Worker(self._prepare)

    def bind(self, slots: int, length: int) -> None:
        """Bind the drafter."""
        self.inner.bind(slots, length)

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """Of the drafter."""
        return self.inner.cache_need(slots, length)

    def keep_within(self, tokens: int) -> None:
        """Limit the drafter's pages."""
        self.inner.keep_within(tokens)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots, and what was prepared for them."""
        self._worker.pause()
        self._forget(slots)
        self.inner.release(slots)

    def _forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._expected.pop(slot, None)

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
        asked = [0 if f is not None else b + 1 if b else 0 for f, b in zip(found, budget, strict=True)]
        own = self.inner.draft(evidence, asked)
        drafts = [
            own,
            *(f.take([0 if i == j else -1 for j in range(len(views))]) for i, f in enumerate(found) if f is not None),
        ]
        places = iter(range(1, len(drafts)))
        chosen = [next(places) if f is not None else 0 for f in found]
        whole = own if len(drafts) == 1 else merge(drafts, chosen, evidence.scores.logits.shape[-1])
        self._forget([v.slot for v in views])
        if not self._worker.off:
            premises = [
                p
                for i, (v, b) in enumerate(zip(views, budget, strict=True))
                for p in self._outcomes(evidence, v, whole, i, b)
            ]
            self._start(sorted(premises, key=lambda p: -p.chance))
        return _shortened(whole, [min(b, self.max_depth) for b in budget])

    def _prepared(self, view: SequenceView, depth: int) -> Draft | None:
        """The draft that was made for what has now happened to a sequence; None if there is none."""
        found = self._expected.get(view.slot)
        if depth < 1 or found is None or found.view.seed != view.seed or found.view.params is not view.params:
            return None
        draft = found.made.get(tuple(view.tokens[found.length :]))
        self.hits, self.misses = self.hits + (draft is not None), self.misses + (draft is None)
        return draft if draft is None else _shortened(draft, [depth + 1])

    def _outcomes(self, evidence: Evidence, view: SequenceView, draft: Draft, i: int, budget: int) -> list[_Premise]:
        """The likeliest outcomes of the verification of sequence i's draft, likeliest first."""
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
        best = sorted(found, reverse=True)[: self.premises]
        return [_Premise(expected, tail, chance, _after(evidence, view, tail), budget + 1) for chance, tail in best]

    def _start(self, premises: list[_Premise]) -> None:
        """Have the drafts made for these premises."""
        if self.inline:
            for premise in premises:
                self._prepare(premise)
        elif premises:
            self._worker.start(premises)

    def _prepare(self, premise: _Premise) -> None:
        premise.expected.made[premise.tail] = self.inner.draft(premise.evidence, [premise.budget])

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


def _after(evidence: Evidence, view: SequenceView, tail: tuple[int, ...]) -> Evidence:
    """What a drafter that reads nothing but the text will see if `tail` follows."""
    tokens = [*view.tokens, *tail]
    scores = evidence.scores.logits
    nothing = torch.empty(0, dtype=torch.int64, device=scores.device)
    return Evidence(
        rows=Rows(nothing, nothing, (), nothing),
        scores=Scores(scores[:0]),
        draft=Draft.empty(0, scores.device),
        verdict=Verdict((), (), (), (), (), ()),
        sequences=(replace(view, tokens=tokens, cached=len(tokens) - 1),),
        segment_index=(-1,),
        verdict_index=(-1,),
        noise=Noise((view.seed,), (len(tokens) - 1,)),
        pipeline=evidence.pipeline,
    )


def _shortened(draft: Draft, most: Sequence[int]) -> Draft:
    """The first `most[i]` tokens of each chain: fewer were asked for, whatever was drawn."""
    if all(count <= n for count, n in zip(draft.counts, most, strict=True)):
        return draft
    kept = [list(draft.nodes(i))[:n] for i, n in enumerate(most)]
    trees = [([draft.tokens[k] for k in nodes], list(range(-1, len(nodes) - 1))) for nodes in kept]
    q: Proposal | None = draft.q and replace(draft.q, row=tuple(draft.q.row[k] for nodes in kept for k in nodes))
    return Draft.join(trees, q, draft.token.device)


class _Worker:
    """A thread that works through one list at a time, and can be told to stop after the piece that it is at."""

    def __init__(self, work: Callable[[_Premise], None]) -> None:
        self._work = work
        self._lock = threading.Condition()
        self._pending: list[_Premise] = []
        self._busy = False
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        self.off = False

    def start(self, premises: list[_Premise]) -> None:
        """Begin a list. The thread begins with the first one; it ends with the process."""
        with self._lock:
            self._pending = premises
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="outrider-ahead", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def pause(self) -> None:
        """Drop what has not been begun, and wait for what has."""
        with self._lock:
            self._pending = []
            self._lock.wait_for(lambda: not self._busy)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._pending))
                premise, self._busy = self._pending.pop(0), True
            try:
                self._work(premise)
            except BaseException as error:
                logger.warning("drafting ahead failed", exc_info=True)
                self.error = f"{type(error).__name__}: {error}"[:200]
            finally:
                with self._lock:
                    self._busy = False
                    if self.error is not None:
                        self._pending = []
                    self._lock.notify_all()

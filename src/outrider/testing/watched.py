"""A drafter that is watched: every call is compared with what a drafter promises, and the first broken promise is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.contained import defect_of
from outrider.protocols import Drafter
from outrider.testing.report import margin
from outrider.types import POINT_MASS, TOLERANCE, Draft, Evidence

Drawn = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]]
"""A draft as plain data: tokens, parents, counts, and q of each token."""


class Watched:
    """Calls `drafter`, and after the first broken promise drafts nothing. found: the sentence on it, or an empty text.

    drafts: all drafts, in order. Everything else of the drafter is its own.
    """

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size
        self.name, self.layers, self.trees = drafter.name, drafter.layers, drafter.trees
        self.max_nodes, self.max_depth = drafter.max_nodes, drafter.max_depth
        self.found = ""
        self.drafts: list[Drawn] = []
        self._sums = {name: [0.0, 0.0] for name in ("its most likely token", "the lower half of its support")}
        self._nodes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def bind(self, slots: int, length: int) -> None:
        self.drafter.bind(slots, length)

    def release(self, slots: Sequence[int]) -> None:
        self._guarded("release", lambda: self.drafter.release(slots))

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        nothing = Draft.empty(len(evidence.sequences), evidence.scores.logits.device)
        if self.found:
            return nothing
        before, asked = _copied(evidence), list(budget)
        draft = self._guarded("draft", lambda: self.drafter.draft(evidence, budget))
        if self.found:
            return nothing
        self.found = _changed(before, evidence) or ("" if list(budget) == asked else "the budget that it was given")
        if self.found:
            self.found = f"changed {self.found}, which it may only read: copy it first, as in list(view.tokens)"
        else:
            self.found = self._wrong(draft, evidence, asked)
        if self.found:
            return nothing
        self._count(draft)
        return draft

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = f" at line {where.tb_lineno} of {where.tb_frame.f_code.co_filename}" if where else ""
            self.found = (
                f"raised {type(error).__name__} ({error}) in {name}{line}: {name} must return for every step, also for a budget "
                "of 0, "
                "a prompt in several chunks and a sequence without a verdict"
            )
            return None

    def _wrong(self, draft: Any, evidence: Evidence, budget: list[int]) -> str:
        if not isinstance(draft, Draft):
            return f"returned {type(draft).__name__}, not a Draft: see outrider.types.Draft, and Draft.join, which makes one"
        if problem := defect_of(draft, len(evidence.sequences), budget):
            return (
                f"drafted {problem}: a draft has one tree for each sequence of the evidence, in its order, parents before "
                "children, at "
                "most budget[i] levels deep, its tokens int64; Draft.join makes one of a tree for each sequence"
            )
        most = max(draft.counts, default=0)
        if most > self.drafter.max_nodes:
            return f"drafted {most} nodes for a sequence and declares max_nodes={self.drafter.max_nodes}: raise it, or draft fewer"
        if not self.drafter.trees and not draft.is_chain:
            return "drafted siblings and declares trees=False: set it to True, or draft chains"
        wrong = [t for t in draft.tokens if not 0 <= t < self.vocab_size]
        if wrong:
            return f"drafted token {wrong[0]}, outside the vocabulary of {self.vocab_size}: leave such tokens out"
        return "" if draft.q is None else self._wrong_distribution(draft)

    def _wrong_distribution(self, draft: Draft) -> str:
        q = draft.q
        assert q is not None
        width = self.vocab_size if q.support is None else len(q.support)
        if q.probs.shape[1] != width:
            return (
                f"gave distributions over {q.probs.shape[1]} tokens, and the vocabulary has {width}: give `support`, the token of "
                "each column"
            )
        used = sorted({r for r in q.row if r != POINT_MASS})
        probs = q.probs[used].double()
        if bool((probs < 0).any()) or not bool(torch.isfinite(probs).all()):
            return f"gave a distribution with the value {_worst(probs):g}: probabilities are finite and at least 0"
        off = (probs.sum(-1) - 1).abs()
        if len(used) and float(off.max()) > TOLERANCE:
            total = float(probs.sum(-1)[off.argmax()])
            return f"gave a distribution q that sums to {total:.4g}, not to 1: use softmax, or divide by the sum"
        for k, value in enumerate(_values(draft)):
            if value <= 0 and q.siblings != "hub":
                return (
                    f"drafted token {draft.tokens[k]}, which has probability 0 under the q that it gave for it: q is the "
                    "distribution "
                    "that this token was drawn from; without one give q=None, which is always lossless"
                )
        if q.siblings == "without_replacement":
            twice = Counter((draft.parent_rows[k], r, draft.tokens[k]) for k, r in enumerate(q.row) if r != POINT_MASS)
            if twice and max(twice.values()) > 1:
                return f"drafted token {max(twice, key=lambda i: twice[i])[2]} twice among siblings drawn without replacement"
        return ""

    def _count(self, draft: Draft) -> None:
        self.drafts.append((draft.tokens, draft.parent, draft.counts, tuple(_values(draft))))
        q, seen = draft.q, set[tuple[int, int]]()
        if q is None:
            return
        for k, r in enumerate(q.row):
            if r == POINT_MASS or (draft.parent_rows[k], r) in seen:  # later siblings are drawn from what is left
                continue
            seen.add((draft.parent_rows[k], r))
            row = q.probs[r].double()
            own = draft.tokens[k] if q.support is None else int((q.support == draft.tokens[k]).nonzero()[0])
            top, half = int(row.argmax()), len(row) // 2
            self._nodes += 1
            for name, hit, chance in (
                ("its most likely token", own == top, float(row[top])),
                ("the lower half of its support", own < half, float(row[:half].sum())),
            ):
                self._sums[name][0] += hit - chance
                self._sums[name][1] += chance * (1 - chance)

    def not_drawn(self) -> str:
        """A sentence if its tokens were not drawn from the distributions that it gave."""
        for name, (excess, spread) in self._sums.items():
            if abs(excess) > margin(spread):
                return (
                    f"drafted {name} {abs(excess):.0f} times {'more' if excess > 0 else 'less'} often in {self._nodes} nodes "
                    "than its q "
                    f"says (chance explains {margin(spread):.0f}): draw each token from its row of q with the noise of the "
                    "evidence, or "
                    "give q=None, which is always lossless"
                )
        return ""


def _values(draft: Draft) -> list[float]:
    """q of each drafted token; 1 for point masses."""
    q, out = draft.q, list[float]()
    for k, r in enumerate(() if q is None else q.row):
        assert q is not None
        if r == POINT_MASS:
            out.append(1.0)
        elif q.support is None:
            out.append(float(q.probs[r, draft.tokens[k]]))
        else:
            out.append(float(q.probs[r][q.support == draft.tokens[k]].sum()))
    return out


def _worst(probs: Tensor) -> float:
    bad = probs[~torch.isfinite(probs)]
    return float(bad[0]) if len(bad) else float(probs.min())


def _copied(e: Evidence) -> dict[str, Any]:
    """What a drafter may look at, as it is now."""
    return {
        "the tokens of a sequence": [list(v.tokens) for v in e.sequences],
        "the logits of the step": e.scores.logits.clone(),
        "the hidden states of the step": [h.clone() for h in e.scores.hidden],
        "the rows of the step": (e.rows.token.clone(), e.rows.position.clone()),
        "the draft of the step": (e.draft.token.clone(), None if e.draft.q is None else e.draft.q.probs.clone()),
    }


def _changed(before: dict[str, Any], e: Evidence) -> str:
    """The name of what is not as it was."""
    return next((name for name, value in _copied(e).items() if not _same(before[name], value)), "")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b

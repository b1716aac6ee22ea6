"""Contains a drafter's faults: they cost drafts, never requests. They are counted, and too many switch the drafter off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.protocols import Drafter
from outrider.types import POINT_MASS, Draft, Evidence, Verdict

logger = logging.getLogger(__name__)
STRIKES = 3.0
"""A drafter is switched off after this many strikes: one for each fault,"""
FORGIVEN = 1 / 64
"""and this many less for each successful call."""


class Contained:
    """Calls one drafter and returns the empty draft if it raises, or returns an invalid draft (`defect_of`).

    After a fault the drafter's slots are released, since their state is unknown. The output does not depend on any of this: plain
    decoding is the empty draft.
    """

    def __init__(self, drafter: Drafter, on_fault: Callable[[str], None] | None = None) -> None:
        """on_fault: called with a message at every fault of this drafter."""
        self.drafter, self._on_fault = drafter, on_fault
        self.off = False
        self._faults, self._strikes = 0, 0.0
        self._notices: list[str] = []
        self._support: Tensor | None = None

    @property
    def faults(self) -> int:
        """Faults so far, including those that a combination of drafters has contained for its parts."""
        return self._faults + getattr(self.drafter, "faults", 0)

    @property
    def notices(self) -> list[str]:
        """One sentence for each drafter that was switched off."""
        return [*self._notices, *getattr(self.drafter, "notices", ())]

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The drafter's draft, or the empty one."""
        if not self.off:
            try:
                draft = self.drafter.draft(evidence, budget)
                if not (problem := defect_of(draft, len(evidence.sequences), budget) or self._strange(draft, evidence)):
                    self._strikes = max(0.0, self._strikes - FORGIVEN)
                    return draft
            except KeyboardInterrupt:  # the process may continue after it
                self.release([view.slot for view in evidence.sequences])
                raise
            except BaseException as error:  # in every case (a library's sys.exit, a cancellation) the requests continue
                problem = _told(error)
                logger.warning("drafter %r failed (%s)", self.drafter.name, problem, exc_info=not self._faults)
            self._strike(problem)
            self.release([view.slot for view in evidence.sequences])
        return Draft.empty(len(evidence.sequences), evidence.scores.logits.device)

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots in the drafter."""
        try:
            self.drafter.release(slots)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            logger.warning("drafter %r failed to forget slots", self.drafter.name, exc_info=True)
            self._strike(_told(error))

    def _strange(self, draft: Draft, evidence: Evidence) -> str:
        """A problem with the device of its tensors, or with the tokens of its support; a support that was checked before is not
        checked again."""
        tensors = (draft.token,) if draft.q is None else (draft.token, draft.q.probs)
        if len({evidence.scores.logits.device.type, *(t.device.type for t in tensors)}) > 1:
            return f"tensors on {', '.join(sorted({t.device.type for t in tensors}))}"
        support = None if draft.q is None else draft.q.support
        if support is None or support is self._support:
            return ""
        size = evidence.scores.logits.shape[-1]
        if support.numel() and not 0 <= int(support.min()) <= int(support.max()) < size:
            return f"a support outside the vocabulary of {size}"
        self._support = support
        return ""

    def _strike(self, problem: str) -> None:
        self._faults += 1
        self._strikes += 1.0
        if self._on_fault is not None:
            self._on_fault(f"drafter {self.drafter.name!r} ({type(self.drafter).__name__}): {problem}")
        if self._strikes < STRIKES or self.off:
            return
        self.off = True
        reason = " ".join(problem.split())[:160]
        self._notices.append(
            f"drafter {self.drafter.name!r} failed {self._faults} times and is switched off ({reason}): texts stay correct without "
            f"it and are slower; fix {type(self.drafter).__name__} (outrider.testing.check_drafter tries its contracts) or "
            "build the engine "
            "with another draft"
        )
        logger.error("%s", self._notices[-1])


def _told(error: BaseException) -> str:
    """The type and message of an error, if its message can be read."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # reading its message fails
        return type(error).__name__


def strange_verdict(verdict: object, draft: Draft, vocab_size: int) -> str:
    """What a rule did that makes this no verdict on the draft, and what it should do, or an empty string. Host data only."""
    if not isinstance(verdict, Verdict):
        return f"returned {type(verdict).__name__}, not a Verdict: see outrider.types.Verdict"
    many = len(draft.counts)
    for name in ("path", "next_token", "judged", "risk", "spread", "bias"):
        if len(getattr(verdict, name)) != many:
            return f"gave {len(getattr(verdict, name))} values of {name!r} for {many} sequences: give one for each"
    for b in range(many):
        up = -1
        for k in verdict.path[b]:
            if not draft.offsets[b] <= k < draft.offsets[b + 1] or draft.parent[k] != up:
                return (
                    f"accepted node {k} of sequence {b} and not the node above it: a path begins at a child of the anchor and "
                    "goes down, "
                    "in the numbers of the draft"
                )
            up = k
        if not 0 <= verdict.next_token[b] < vocab_size:
            return f"gave the next token {verdict.next_token[b]}, outside the vocabulary of {vocab_size}"
        if verdict.judged[b] < len(verdict.path[b]):
            return f"judged {verdict.judged[b]} positions and accepted {len(verdict.path[b])}: accepted positions are judged"
    return ""


def misshapen(draft: Draft) -> str:
    """The inconsistency between the tensors and tuples of a draft, or an empty string."""
    nodes, q = len(draft.parent), draft.q
    if draft.token.shape != (nodes,) or sum(draft.counts) != nodes or any(n < 0 for n in draft.counts):
        return f"{draft.token.numel()} tokens and {nodes} parents for counts that sum to {sum(draft.counts)}"
    if draft.token.dtype is not torch.int64 or {type(n) for n in (*draft.parent, *draft.counts)} - {int}:
        return f"tokens of type {draft.token.dtype}, or parents and counts that are not whole numbers"
    if q is None:
        return ""
    if not q.probs.is_floating_point() or (q.support is not None and q.support.dtype is not torch.int64):
        return f"distributions of type {q.probs.dtype}, or a support that is not int64"
    if len(q.row) != nodes or q.probs.dim() != 2:
        return f"{len(q.row)} row numbers for {nodes} nodes, and distributions of shape {tuple(q.probs.shape)}"
    if q.support is not None and q.support.shape != q.probs.shape[1:]:
        return f"a support of shape {tuple(q.support.shape)} for distributions of shape {tuple(q.probs.shape)}"
    return ""


def defect_of(draft: Draft, sequences: int, depth: Sequence[int]) -> str:
    """What makes this an invalid draft for `sequences` of at most `depth` levels each, or an empty string. Host data only.

    Tokens and probabilities are not checked.
    """
    if problem := misshapen(draft):
        return problem
    if len(draft.counts) != sequences:
        return f"trees for {len(draft.counts)} sequences instead of {sequences}"
    count = 0 if draft.q is None else draft.q.probs.shape[0]
    if draft.q is not None and not all(POINT_MASS <= row < count for row in draft.q.row):
        return f"row numbers outside its {count} distributions"
    level: list[int] = []
    for b in range(sequences):
        for k in draft.nodes(b):
            up = draft.parent[k]
            if up != -1 and not draft.offsets[b] <= up < k:
                return f"node {k} has parent {up}, which is not an earlier node of its sequence"
            level.append(1 + (level[up] if up >= 0 else 0))
            if level[k] > depth[b]:
                return f"{level[k]} levels for sequence {b}, which was asked for {depth[b]}"
    return ""

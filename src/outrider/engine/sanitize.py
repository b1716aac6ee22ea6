"""What stands between a broken drafter or model and the text: defects become rejected drafts, never wrong tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.types import POINT_MASS, Draft, Proposal

TOLERANCE = 1e-3
"""How far a proposal row may be from summing to one; float32 softmax over 200,000 entries stays below 1e-5."""


def honest(draft: Draft, vocab_size: int) -> tuple[Draft, int]:
    """The draft without its defects, and how many sequences had one.

    A token outside the vocabulary takes its subtree with it; a law that is not one (NaN, infinite, partly negative, not summing to
    one, over another vocabulary) is not used. In a sequence with a defect every remaining node counts as a point mass, which is
    lossless whatever the tokens are and however they were chosen (contract 1), so the output keeps the target's law.
    """
    bad_nodes = {k for k, token in enumerate(draft.tokens) if not 0 <= token < vocab_size}
    bad_rows = _bad_rows(draft.q, vocab_size)
    if not bad_nodes and not bad_rows:
        return draft, 0
    marked = bad_nodes | ({k for k, r in enumerate(draft.q.row) if r in bad_rows} if draft.q else set())
    broken = {b for b in range(len(draft.counts)) if any(draft.offsets[b] <= k < draft.offsets[b + 1] for k in marked)}
    return _repair(draft, bad_nodes, broken), len(broken)


def _bad_rows(q: Proposal | None, vocab_size: int) -> set[int]:
    if q is None or q.probs.shape[0] == 0:
        return set()
    if q.support is None and q.probs.shape[1] != vocab_size:
        return set(range(len(q.probs)))
    error = (
        torch.linalg.vector_norm(q.probs, 1, -1) - 1
    ).abs()  # as fast as a sum, and more than one if a part is negative
    fine = error <= TOLERANCE  # NaN compares false
    return set() if bool(fine.all()) else set(torch.nonzero(~fine).flatten().tolist())


def _repair(draft: Draft, bad_nodes: set[int], broken: set[int]) -> Draft:
    """Prune bad nodes with what hangs below them, and take the laws away from the broken sequences."""
    new: dict[int, int] = {-1: -1}
    keep: list[int] = []
    counts = [0] * len(draft.counts)
    law: list[int] = []
    for b in range(len(draft.counts)):
        for k in range(draft.offsets[b], draft.offsets[b + 1]):
            if k in bad_nodes or draft.parent[k] not in new:
                continue
            new[k] = len(keep)
            keep.append(k)
            counts[b] += 1
            law.append(POINT_MASS if draft.q is None or b in broken else draft.q.row[k])
    q = None
    if draft.q is not None and any(row != POINT_MASS for row in law):
        q = Proposal(draft.q.probs, tuple(law), draft.q.support, draft.q.siblings)
    pick = torch.tensor(keep, dtype=torch.int64, device=draft.token.device)
    return Draft(draft.token[pick], tuple(new[draft.parent[k]] for k in keep), tuple(counts), q)


def silence(logits: Float[Tensor, "M V"], counts: tuple[int, ...]) -> set[int]:
    """Find rows with a NaN, or nothing but -inf, blank them in place, and return the sequences they belong to.

    Blanked rows keep the rule from failing for everybody; what their sequences emit is thrown away. `counts`: nodes of each of
    the B sequences, whose B anchor rows come first.
    """
    peak = logits.amax(-1).tolist()  # NaN wins a maximum, so one reduction sees both
    bad = [i for i, x in enumerate(peak) if not math.isfinite(x)]
    if not bad:
        return set()
    logits[bad] = 0.0
    owner = [*range(len(counts)), *(b for b, n in enumerate(counts) for _ in range(n))]
    return {owner[i] for i in bad}

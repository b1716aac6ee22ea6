"""Protects the text from a broken drafter or model: defects become rejected drafts, never wrong tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from outrider import transfer
from outrider.noise import Noise
from outrider.protocols import Rule
from outrider.sampling.cpu import peaks
from outrider.types import POINT_MASS, TOLERANCE, Draft, Proposal, Tree, Verdict


def sanitize_draft(draft: Draft, vocab_size: int) -> tuple[Draft, int]:
    """The draft without its defects, and how many sequences had one.

    A token outside the vocabulary is removed with its subtree; an invalid distribution (NaN, infinite, partly negative, not
    summing to one, over another vocabulary) is not used. In a sequence with a defect every remaining node counts as a point mass,
    which is lossless for any tokens, however they were chosen (contract 1), so the output keeps the target distribution.
    """
    if draft.q is not None and draft.q.probs.shape[0] == 0:  # all point masses: there is no row to look up
        draft = replace(draft, q=None)
    bad_nodes = {k for k, token in enumerate(draft.tokens) if not 0 <= token < vocab_size}
    bad_rows = _bad_rows(draft.q, vocab_size)
    if not bad_nodes and not bad_rows:
        return draft, 0
    marked = bad_nodes | ({k for k, r in enumerate(draft.q.row) if r in bad_rows} if draft.q else set())
    broken = {b for b in range(len(draft.counts)) if not marked.isdisjoint(draft.nodes(b))}
    return _repair(draft, bad_nodes, broken), len(broken)


def _bad_rows(q: Proposal | None, vocab_size: int) -> set[int]:
    if q is None:
        return set()
    if q.support is None and q.probs.shape[1] != vocab_size:
        return set(range(len(q.probs)))
    if q.sound is q.probs:
        return set()
    error = (
        torch.linalg.vector_norm(q.probs, 1, -1) - 1
    ).abs()  # as fast as a sum, and more than one if a part is negative
    fine = error <= TOLERANCE  # NaN compares false
    return set() if bool(fine.all()) else set(torch.nonzero(~fine).flatten().tolist())


def _repair(draft: Draft, bad_nodes: set[int], broken: set[int]) -> Draft:
    """Remove bad nodes with their subtrees, and drop the distributions of the broken sequences."""
    trees: list[Tree] = []
    row: list[int] = []
    for b in range(len(draft.counts)):
        new, tokens, parent = {-1: -1}, list[int](), list[int]()
        for k in draft.nodes(b):
            if k in bad_nodes or draft.parent[k] not in new:
                continue
            new[k] = len(tokens)
            tokens.append(draft.tokens[k])
            parent.append(new[draft.parent[k]])
            row.append(POINT_MASS if draft.q is None or b in broken else draft.q.row[k])
        trees.append((tokens, parent))
    q = None
    if draft.q is not None and any(r != POINT_MASS for r in row):
        q = replace(draft.q, row=tuple(row))
    return Draft.join(trees, q, draft.token.device)


def blank_nonfinite_rows(logits: Float[Tensor, "M V"]) -> list[int] | Bool[Tensor, "M"]:
    """Blank the rows that have a NaN, or only -inf, in place. Returns their numbers; on a device a mask, which nobody waits for.

    Blanking keeps the rule from failing for the whole batch; the tokens of blanked sequences are discarded.
    """
    if transfer.on_host(logits):
        rows = [i for i, x in enumerate(peaks(logits)) if not math.isfinite(x)]
        if rows:
            logits[rows] = 0.0
        return rows
    bad = ~torch.isfinite(logits.amax(-1))
    logits.masked_fill_(bad.unsqueeze(1), 0.0)  # reading whether there are any would wait for the device
    return bad


def judge(
    rule: Rule,
    p: Float[Tensor, "M V"],
    draft: Draft,
    noise: Noise,
    allowance: Sequence[float],
    bad: list[int] | Bool[Tensor, "M"],
) -> tuple[Verdict, set[int]]:
    """The verdict, and the sequences of the `bad` rows, in one copy from the device if the rule can leave its verdict there.

    Such a rule has an attribute `launch` on its `__call__`: it takes the same arguments and returns a `Pending` verdict, or None
    where the host decides.
    """
    if isinstance(bad, list):
        return rule(p, draft, noise, allowance), {draft.sequence_of_row[i] for i in bad}
    flags = transfer.Pending((bad,), lambda found: {draft.sequence_of_row[i] for i, x in enumerate(found) if x})
    launch = getattr(type(rule).__call__, "launch", None)
    pending = None if launch is None else launch(rule, p, draft, noise, allowance)
    if pending is None:
        return rule(p, draft, noise, allowance), transfer.fetch(flags)[0]
    verdict, unusable = transfer.fetch(pending, flags)
    return verdict, unusable

"""What exact verification would have done on the audited texts, from p and q of the models here, beside what the server reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from outrider.evaluate.audit.alternatives import Candidates
from outrider.integrations.watch.acceptance import Acceptance
from outrider.theory.replay import Drafting, Text, replay

WIDE = 2.576
"""Standard deviations of a 99% interval."""
WAYS: tuple[Drafting, ...] = ("sampled", "greedy")


def text_of(found: Candidates, output: Sequence[int], *, stopped: bool, limit: int) -> Text:
    """The log of one scored text: log-probabilities of its tokens under p and q, and which of them were the draft's first
    choice."""
    at, ids = torch.arange(len(output)), torch.tensor(output, device=found.p.device)
    p, q = (x[at, ids].double().cpu().numpy() for x in (found.p, found.q))
    with np.errstate(divide="ignore"):
        target = np.log(np.clip(p, 1e-300, 1.0))  # a token that the target never draws has been said by the audit
        draft = np.log(np.minimum(q, 1.0))
    hit = (found.q.argmax(1) == ids).cpu().numpy()
    return Text(target, draft, hit, stopped=stopped, limit=limit)


def beside(pairs: Sequence[tuple[Text, Acceptance]]) -> dict[str, Any] | None:
    """Rejections that these texts' own replay expects, for sampled and for greedy drafts of the served length, beside those that
    the replies reported: [expected, low, high] of each (99%, over the coins of the rule alone). None where no reply told them.

    An engine that goes on verifying behind the limit of a text may report up to one rejection more for each.
    """
    told = [(text, found) for text, found in pairs if found.judged_at]
    if not told:
        return None
    length = max(len(found.judged_at) for _, found in told)
    out: dict[str, Any] = {
        "texts": len(told),
        "length": length,
        "observed": sum(sum(found.judged_at) - sum(found.accepted_at) for _, found in told),
    }
    for way in WAYS:
        r = replay([text for text, _ in told], length, way)
        middle, half = float(r.rejected.sum()), WIDE * math.sqrt(float(r.rejected_variance.sum()))
        out[way] = [middle, max(0.0, middle - half), middle + half]
    return out

"""The part of `agreement.py` on several drafts: what the theory says of every rule for them, and what the engine does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from agreement_setting import Setting, score, sums

from outrider.engine.outputs import Result
from outrider.evaluate.scoring import score as predict
from outrider.telemetry.ledger import ledger
from outrider.theory import multidraft
from outrider.theory.transport import optimal_choice

DRAFTS = (1, 2, 4, 8)


def highest_level(p: np.ndarray, q: np.ndarray, drafts: int) -> np.ndarray:
    """The slope of the optimal choice: tokens above it are chosen that many times as often as the draft draws them."""
    return np.divide(optimal_choice(p, q, drafts), q, out=np.zeros_like(q), where=q > 0).max(-1)


SEVERAL = {
    "speculative_sampling": lambda p, q, m: multidraft.recursive(p, q, m).slope,
    "k_seq": lambda p, q, m: multidraft.kseq(p, q, m).slope,
    "optimal_transport": highest_level,
}
"""Rules for several i.i.d. drafts, with their slope s: a first token x is accepted with probability min(1, s q(x) / p(x))."""


def several(s: Setting) -> list[dict[str, Any]]:
    scored = score(s, 1.0, 2, seed=51, rows=1 << 24)  # every distribution of every text
    out = []
    for m in DRAFTS:
        arms = [(rule, f"batch:{m}") for rule in SEVERAL]
        arms += [(rule, f"shared:{m}") for rule in SEVERAL]
        arms += [("speculative_sampling", f"tree:{m}x1x1")]
        for rule, shape in arms if m > 1 else [("speculative_sampling", "chain"), ("block", "chain")]:
            out.append(one_arm(s, m, rule, shape, scored))
    return out


def others(s: Setting) -> list[dict[str, Any]]:
    """Rules whose coins are not known from the text alone, or that need drafts of their own: the ledger predicts."""
    arms = [(1, "match", "chain"), (1, "traversal", "chain"), (2, "spechub", "hub:2x1x1"), (2, "spechub", "hub:2x2x2")]
    arms += [
        (m, "traversal", f"{kind}:{m}{rest}") for m in DRAFTS[1:] for kind, rest in (("batch", ""), ("tree", "x1x1"))
    ]
    return [one_arm(s, *arm, None) for arm in arms]


def one_arm(s: Setting, m: int, rule: str, shape: str, scored: predict.Scored | None) -> dict[str, Any]:
    """One run; predicted before it from the distributions of the text if they are given and the rule's coins follow from them."""
    drafter = s.draft if shape == "chain" else f"{shape}:{s.draft}"
    results = s.run(1.0, 61, length=3, rule=rule, drafter=drafter)
    counts = sums(results)
    book = ledger(counts, 0.05)
    known = scored is not None and rule != "block" and shape.startswith(("chain", "batch"))
    return {
        "drafts": m,
        "rule": rule,
        "shape": shape,
        "tokens_per_step": counts.emitted / counts.steps,
        "first_accepted": counts.accepted_at[0] / counts.judged_at[0],
        "before": predicted_batch(s, scored, results, rule, m) if known and scored is not None else None,
        "predicted": book.predicted,
        "observed": book.observed,
        "low": book.low,
        "high": book.high,
        "agrees": book.agrees,
    }


def predicted_batch(s: Setting, scored: predict.Scored, results: Sequence[Result], rule: str, m: int) -> dict[str, Any]:
    """Tokens per step and first acceptance of m drafts that compete for the first position, from plain text alone.

    Given its token x, a first position was accepted with probability min(1, s q(x)/p(x)), s the slope of the rule at that
    distribution (`SEVERAL`), and a later one with min(1, q(x)/p(x)): the replay recursion with two kinds of coins.
    """
    slope = SEVERAL[rule](scored.target_rows, scored.draft_rows, m)
    rng, calls, spread, first, seen = np.random.default_rng(3), [], [], 0.0, 0.0
    at = 0
    for text in scored.texts:
        ratio = np.exp(text.draft - text.target)
        root, deep = np.minimum(1.0, slope[at : at + len(text)] * ratio), np.minimum(1.0, ratio)
        at += len(text)
        drawn, judged, taken = steps_of(root, deep, 3, rng.random((200, len(text))))
        calls.append(drawn.mean())
        spread.append(drawn.var(ddof=1))
        first, seen = first + taken, seen + judged
    steps = np.array([r.outputs[0].counts.steps for r in results], dtype=float)
    pairs = np.array(calls).reshape(len(steps), -1)
    within = float(((pairs - pairs.mean(1)[:, None]) ** 2).sum() / pairs.shape[0] / (pairs.shape[1] - 1))
    margin = 1.96 * np.sqrt((within * (1 + 1 / pairs.shape[1]) + float(np.mean(spread))) * len(steps))
    total, tokens = pairs.mean(1).sum(), len(steps) * s.tokens
    return {
        "tokens_per_step": tokens / total,
        "low": tokens / (total + margin),
        "high": tokens / (total - margin),
        "agrees": bool(abs(steps.sum() - total) <= margin),
        "first_accepted": first / seen,
    }


def steps_of(root: np.ndarray, deep: np.ndarray, length: int, coins: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Target calls of every row of coins along one text; first positions judged and accepted in all rows together."""
    place, calls = np.zeros(len(coins), int), np.ones(len(coins))  # the prompt's call gives the first token
    judged = taken = 0
    for n in range(1, len(root)):
        fresh, bonus = place == 0, place == length
        kept = (coins[:, n] < np.where(fresh, root[n], deep[n])) & ~bonus
        if n == len(root) - 1:  # the last token a text may have is never a judged draft
            calls += fresh
            break
        calls += fresh
        judged, taken = judged + int(fresh.sum()), taken + int((fresh & kept).sum())
        place = np.where(kept, place + 1, 0)
    return calls, judged, taken

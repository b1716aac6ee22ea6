"""The audit of our own engine from inside: its ledger, and the joint distribution of its rule on a table of known distributions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.evaluate.scoring.score import Clock, chain_rows, logits_along
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.protocols import Rule, Target

VOCAB, LENGTH = 3, 4
AT_ONCE = 256
LEAST = 5.0
"""Least expected count of a cell; rarer strings are pooled."""


@dataclass(frozen=True, slots=True)
class JointDistribution:
    """Chi-square of all strings of LENGTH tokens against their exact probabilities. p_value: uniform for an exact rule."""

    sequences: int
    statistic: float
    cells: int
    p_value: float


def joint_distribution(
    rule: Rule, *, sequences: int = 4000, seed: int = 0, allow_lossy: bool = True
) -> JointDistribution:
    """Decode `sequences` strings with the engine, the rule and a draft table; their joint distribution beside the target's.

    Marginals can be right where the joint distribution is not (noise shared between positions or steps): whole strings are counted.
    """
    target = TableTarget.random(VOCAB, seed=17, positions=LENGTH + 1, sharp=1.0)
    draft = target.perturbed(1.0, 18)
    engine = Engine(
        target,
        ModelDrafter(draft, 2, sample="coupled" if rule.lane == "gumbel" else "sampled"),
        rule,
        Fixed(2),
        slots=64,
        max_length=16,
        allow_lossy=allow_lossy,
    )
    params = [SamplingParams(max_tokens=LENGTH, seed=(seed << 32) + i) for i in range(sequences)]
    strings = []
    for low in range(0, sequences, AT_ONCE):  # the engine looks through all the requests it has for each of them
        some = params[low : low + AT_ONCE]
        strings += [r.outputs[0].token_ids for r in engine.generate([[1]] * len(some), some)]
    places = {s: i for i, s in enumerate(itertools.product(range(VOCAB), repeat=LENGTH))}
    counts = np.bincount([places[s] for s in strings], minlength=len(places))
    expected = sequences * np.array([_probability(target, s) for s in places])
    few = expected < LEAST
    seen = np.append(counts[~few], counts[few].sum())
    due = np.append(expected[~few], expected[few].sum())
    seen, due = (seen, due) if due[-1] >= LEAST else (seen[:-1], due[:-1])
    statistic = float(((seen - due) ** 2 / due).sum())
    return JointDistribution(sequences, statistic, len(due), float(chi2.sf(statistic, len(due) - 1)))


def _probability(target: TableTarget, string: tuple[int, ...]) -> float:
    out, history = 1.0, [1]
    for token in string:
        out *= float(target.distribution(history)[token])
        history.append(token)
    return out


@torch.inference_mode()
def rounding(target: Target, tokens: list[int], rows: int = 5) -> float:
    """Mean total variation between the distributions of one text scored in one pass and scored `rows` tokens at a time.

    It is what the shape of a forward alone does to the distribution on this model, dtype and machine: the tolerance of an audit
    on the same weights. The text needs more tokens than `rows`.
    """
    once = torch.cat(list(logits_along(target, tokens, 0, Clock()))).double().softmax(-1)
    parts, kv = [], target.new_kv(1, len(tokens))
    for start in range(0, len(tokens) - 1, rows):
        piece = tokens[start : min(start + rows, len(tokens) - 1)]
        forward = chain_rows(target, piece, start)
        parts.append(target.forward(forward, kv).logits.double().softmax(-1))
        kv.commit(forward, [list(range(len(piece) - 1))])
    return float(0.5 * (once - torch.cat(parts)).abs().sum(1).mean())

"""The contracts of a rule, tried on small distributions: interface, verdicts, purity, the ledger, and what it makes of the text."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from outrider.contained import strange_verdict
from outrider.engine import contracts
from outrider.noise import Noise
from outrider.protocols import Rule
from outrider.records import Counts
from outrider.telemetry.ledger import ledger
from outrider.testing.report import FALSE_ALARM, BrokenContract, Report, unlikely
from outrider.types import Draft, Proposal, Verdict

V, TOKENS, TEXTS = 3, 3, 600
"""Vocabulary, tokens of a text, and texts of each world."""


@dataclass(frozen=True, slots=True)
class World:
    """What is drafted: two nodes, a chain or siblings, with a distribution or as point masses; nothing at all for 0 nodes."""

    name: str
    nodes: int
    chain: bool = True
    drawn: bool = True


WORLDS = (
    World("without a draft", 0),
    World("on chains drawn from q", 2),
    World("on chains of point masses", 2, drawn=False),
    World("on siblings drawn from q", 2, chain=False),
    World("on siblings that are point masses", 2, chain=False, drawn=False),
)


def check_rule(make: Callable[[], Rule]) -> Report:
    """Try a verification rule against its contracts (docs/step.md).

    make: makes a new rule, as its class does or a lambda. A lossy rule is tried without allowance, where it must be exact.
    Returns what held; raises BrokenContract, one sentence, for the first contract that does not: which class, which contract, what
    was seen, what to do. Statistical checks complain of a good rule with a probability of one in a billion each.
    """
    rule = make()
    contracts.check("rule", rule, contracts.RULE)
    name, checked, counts = (
        type(rule).__name__,
        ["its attributes and its call are those of outrider.protocols.Rule"],
        Counts(),
    )
    for world in WORLDS:
        if world.chain or (
            rule.trees and not (world.drawn and rule.lane == "gumbel")
        ):  # coupled siblings are not drawn apart
            _try(name, rule, world, counts)
    checked += [
        "its verdicts have one path for each sequence, from the anchor down, and a next token of the vocabulary",
        "it is a pure function: the same arguments give the same verdict, and are as they were",
        "the text has the target's distribution" + ("" if rule.lossless else " where it may spend nothing"),
    ]
    book = ledger(counts, FALSE_ALARM)
    if not book.agrees:
        _raise(
            name,
            f"said {book.predicted:.1f} rejections and made {book.observed} ({book.low:.0f} to {book.high:.0f} is what chance "
            "explains): `risk` is the rule's own probability of each rejection before its coin, summed over judged positions",
        )
    checked.append("its ledger: the rejections that it announces are those that it makes")
    left = () if rule.trees else ("trees: it declares trees=False",)
    return Report(rule.name, tuple(checked), left if rule.lossless else (*left, "what it spends where it may"))


def _raise(name: str, found: str) -> None:
    raise BrokenContract(f"the rule {name} {found}")


def _try(name: str, rule: Rule, world: World, counts: Counts) -> None:
    """Texts of three tokens, decoded step by step in one batch, against their exact distribution."""
    rng = np.random.default_rng(5)
    p, q = (torch.from_numpy(rng.dirichlet(np.full(V, 0.8), size=V)) for _ in range(2))
    texts = [[0] for _ in range(TEXTS)]
    while live := [b for b in range(TEXTS) if len(texts[b]) <= TOKENS]:
        noise = Noise(tuple(live), tuple(len(texts[b]) - 1 for b in live))
        draft = _drafted(world, [texts[b][-1] for b in live], q, noise, rule.lane)
        rows = p[[*(texts[b][-1] for b in live), *draft.tokens]].float()
        verdict = _asked(name, rule, rows, draft, noise, twice=len(texts[0]) == 1)
        for i, b in enumerate(live):
            kept = len(verdict.path[i]) + 1
            counts.add(
                draft.counts[i], kept - 1, verdict.judged[i], verdict.risk[i], verdict.spread[i], verdict.bias[i]
            )
            texts[b] += [draft.tokens[k] for k in verdict.path[i]] + [verdict.next_token[i]]
    seen, due, own = np.zeros((V,) * TOKENS), np.zeros((V,) * TOKENS), p.numpy()
    for text in texts:
        seen[tuple(text[1 : 1 + TOKENS])] += 1
    for a, b, c in product(range(V), repeat=3):
        due[a, b, c] = TEXTS * own[0, a] * own[a, b] * own[b, c]
    value = unlikely(seen.ravel(), due.ravel())
    if value is not None:
        _raise(
            name,
            f"changes the distribution of the text {world.name} (chi-square {value:.0f} over {V**TOKENS} cells of three tokens)"
            + (
                ", and declares lossless=True: correct it, or declare a tv_limit"
                if rule.lossless
                else ", and may spend nothing"
            ),
        )


def _asked(name: str, rule: Rule, p: Tensor, draft: Draft, noise: Noise, twice: bool) -> Verdict:
    """The verdict of a call, which is looked at, and compared with that of a second one if asked for."""
    before = (p.clone(), draft.token.clone(), None if draft.q is None else draft.q.probs.clone())
    allowance, found = [0.0] * len(draft.counts), list[Verdict]()
    for _ in range(1 + twice):
        try:
            found.append(rule(p, draft, noise, allowance))
        except Exception as error:
            _raise(
                name, f"raised {type(error).__name__} ({error}): it must decide on every draft, also on an empty one"
            )
        if problem := strange_verdict(found[-1], draft, V):
            _raise(name, problem)
        after = (p, draft.token, None if draft.q is None else draft.q.probs)
        if not all(x is None or torch.equal(x, y) for x, y in zip(before, after, strict=True) if y is not None):
            _raise(name, "changed its arguments: a rule is a pure function, so copy p or q before you write to them")
    if found[0] != found[-1]:
        _raise(
            name,
            "gave two verdicts on the same arguments: it must toss its coins with `noise`, and keep nothing between calls",
        )
    return found[0]


def _drafted(world: World, last: list[int], q: Tensor, noise: Noise, lane: str) -> Draft:
    """Nodes drawn from q[token before], with the noise that drafters for this rule draw with. lane: `Rule.lane`; point masses are
    chosen apart from it."""
    cdf, token, parent, row = q.cumsum(-1).tolist(), list[int](), list[int](), list[int]()
    for i, above in enumerate(last):
        for j in range(world.nodes):
            depth, sibling = (j + 1, 0) if world.chain else (1, j)
            row.append(above)
            if lane == "gumbel" and world.drawn:
                token.append(int((q[above] / noise.exponential(i, depth, V)).argmax()))
            else:
                token.append(min(bisect(cdf[above], noise.uniform(i, depth, "draft", sibling)), V - 1))
            parent.append(len(token) - 2 if world.chain and j else -1)
            above = token[-1] if world.chain else above
    given = Proposal(q.float(), tuple(row)) if world.drawn and world.nodes else None
    return Draft(torch.tensor(token, dtype=torch.int64), tuple(parent), (world.nodes,) * len(last), given)

"""The joint law of four tokens with learned drafters, greedy and sampled, chains and trees: see test_joint_law.py.

False-alarm probability 1e-9 per assertion (chi-square, no reruns). Control: a drafter that declares another law than it drew from.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.drafters._growth import BestFirst, Growth, Levels
from outrider.drafters.eagle import Eagle
from outrider.drafters.heads import Medusa
from outrider.drafters.shapes import levels
from outrider.engine.engine import Engine
from outrider.types import Evidence
from outrider.verify import load_rule
from tests.contract.drafters import learned
from tests.contract.scripted import Budgets
from tests.contract.test_joint_law import TARGET, V, collect, exact_joint, statistic

N = 6_000
CASES: dict[str, tuple[str, Growth]] = {
    "heads, sampled chain": ("medusa", Levels(levels((1, 1, 1)), V)),
    "heads, most likely tokens": ("medusa", Levels(levels((2, 2)), V, sample="greedy")),
    "heads, best first": ("medusa", BestFirst(5, 3, V, width=2)),
    "features, sampled chain": ("eagle", Levels(levels((1, 1, 1)), V)),
    "features, iid tree": ("eagle", Levels(levels((2, 2)), V)),
    "features, tree without replacement": ("eagle", Levels(levels((3, 2)), V, siblings="without_replacement")),
    "features, best first": ("eagle", BestFirst(5, 3, V, width=2)),
}


def build(kind: str, growth: Growth) -> Engine:
    model = learned(kind, TARGET, 3)
    drafter = Medusa(model, growth) if kind == "medusa" else Eagle(model, growth)  # type: ignore[arg-type]
    depth = Budgets(lambda s: (s.seed * 7 + len(s.tokens)) % 4)
    return Engine(TARGET, drafter, load_rule("speculative_sampling"), depth, slots=512, max_length=32)


@pytest.mark.parametrize("case", list(CASES))
def test_joint_law_of_four_tokens(case: str) -> None:
    engine = build(*CASES[case])
    value, bound = statistic(collect(engine, N, seed=5, disturb=True), exact_joint() * N)
    assert value < bound
    assert engine.counts.accepted > 300
    assert engine.counts.rejected > 300


def test_control_a_drafter_that_declares_another_law_is_seen() -> None:
    """Negative control: the laws that are declared are uniform, not those that were drawn from."""
    engine = build(*CASES["heads, sampled chain"])
    honest = engine.parts.drafter.draft

    def lying(evidence: Evidence, budget):
        draft = honest(evidence, budget)
        if draft.q is None:
            return draft
        return replace(draft, q=replace(draft.q, probs=torch.full_like(draft.q.probs, 1 / V)))

    engine.parts.drafter.draft = lying  # type: ignore[method-assign]
    value, bound = statistic(collect(engine, 4 * N, seed=5, disturb=False), exact_joint() * 4 * N)
    assert value > bound

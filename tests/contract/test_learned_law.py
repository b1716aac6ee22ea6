"""The joint distribution of four tokens with learned drafters, greedy and sampled, chains and trees: see test_joint_law.py.

False-alarm probability 1e-9 per assertion (chi-square, no reruns). Control: a drafter that declares another distribution than it
drew from.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.build import Engine
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.tree.gain import ByGain, Dynamic
from outrider.drafters.tree.growth import BestFirst, Growth, Levels
from outrider.drafters.tree.shapes import levels
from outrider.models.toy import TableTarget
from outrider.protocols import Drafter
from outrider.types import Draft, Evidence
from outrider.verify import load_rule
from tests.contract.drafters import DRAFTER_OF, compiled, learned, rounded
from tests.contract.scripted import Budgets
from tests.contract.test_joint_law import TARGET, N, V, collect, exact_joint, statistic
from tests.covering import slow_beyond

CASES: dict[str, tuple[str, Growth]] = {
    "heads, sampled chain": ("medusa", Levels(levels((1, 1, 1)), V)),
    "heads, most likely tokens": ("medusa", Levels(levels((2, 2)), V, sample="greedy")),
    "heads, best first": ("medusa", BestFirst(5, 3, V, width=2)),
    "sequential heads, sampled chain": ("hydra", Levels(levels((1, 1, 1)), V)),
    "sequential heads, tree without replacement": ("hydra", Levels(levels((3, 2)), V, siblings="without_replacement")),
    "sequential heads, best first": ("hydra", BestFirst(5, 3, V, width=2)),
    "features, sampled chain": ("eagle", Levels(levels((1, 1, 1)), V)),
    "features, iid tree": ("eagle", Levels(levels((2, 2)), V)),
    "features, tree without replacement": ("eagle", Levels(levels((3, 2)), V, siblings="without_replacement")),
    "last features, sampled chain": ("eagle1", Levels(levels((1, 1, 1)), V)),
    "last features, best first": ("eagle1", BestFirst(5, 3, V, width=2)),
    "multi-token head, sampled chain": ("mtp", Levels(levels((1, 1, 1)), V)),
    "multi-token head, best first": ("mtp", BestFirst(5, 3, V, width=2)),
    "early exit, sampled chain": ("early", Levels(levels((1, 1, 1)), V)),
    "early exit, iid tree": ("early", Levels(levels((2, 2)), V)),
    "blocks, sampled chain": ("dflash", Levels(levels((1, 1, 1)), V)),
    "blocks, most likely tokens": ("dflash", Levels(levels((1, 1, 1)), V, sample="greedy")),
    "blocks, iid tree": ("dflash", Levels(levels((2, 2)), V)),
    "blocks, best first": ("dflash", BestFirst(5, 3, V, width=2)),
    "features, best first": ("eagle", BestFirst(5, 3, V, width=2)),
    "compiled features, sampled tree": ("eagle compiled", Levels(levels((3, 2)), V, siblings="without_replacement")),
    "compiled last features, chain": ("eagle1 compiled", Levels(levels((1, 1, 1)), V)),
    "compiled multi-token head, chain": ("mtp compiled", Levels(levels((1, 1, 1)), V)),
    "compiled heads, sampled chain": ("medusa compiled", Levels(levels((1, 1, 1)), V)),
    "compiled blocks, sampled chain": ("dflash compiled", Levels(levels((1, 1, 1)), V)),
    "compiled sequential heads, sampled chain": ("hydra compiled", Levels(levels((1, 1, 1)), V)),
    "rounded features, sampled chain": ("eagle rounded", Levels(levels((1, 1, 1)), V)),
    "rounded blocks, sampled chain": ("dflash rounded", Levels(levels((1, 1, 1)), V)),
    "rounded sequential heads, sampled chain": ("hydra rounded", Levels(levels((1, 1, 1)), V)),
    "sequential heads, stopping": ("hydra", ByGain(3, 3, V, least=0.35)),
    "heads, stopping": ("medusa", ByGain(3, 3, V, least=0.35)),
    "features, stopping": ("eagle", ByGain(3, 3, V, least=0.35)),
    "early exit, stopping": ("early", ByGain(3, 3, V, least=0.35)),
    "blocks, stopping": ("dflash", ByGain(3, 3, V, least=0.35)),
    "heads, by gain": ("medusa", Dynamic(5, 3, V, width=2)),
    "features, by gain": ("eagle", Dynamic(5, 3, V, width=2)),
    "early exit, by gain": ("early", Dynamic(5, 3, V, width=2)),
    "blocks, by gain": ("dflash", Dynamic(5, 3, V, width=2)),
}
RULES = {"stopping": "block", "by gain": "traversal"}
"""What `auto` chooses for these; the other cases are judged by speculative sampling."""


QUICK = (
    "heads, sampled chain",
    "heads, most likely tokens",
    "sequential heads, sampled chain",
    "features, tree without replacement",
    "features, by gain",
    "last features, sampled chain",
    "multi-token head, sampled chain",
    "early exit, iid tree",
    "blocks, sampled chain",
    "blocks, best first",
    "blocks, stopping",
    "rounded features, sampled chain",
)
"""Every drafter and every growth, which drafters share; the other pairs of them run in `make test-slow`."""


class Deep(TableTarget):
    """The table with a prefix that is another one: what an early exit of a target of several layers is."""

    def first_layers(self, layers: int) -> TableTarget:
        return self.perturbed(1.0, seed=4)


def build(kind: str, growth: Growth, rule: str = "speculative_sampling") -> Engine:
    if kind == "early":
        drafter: Drafter = early_exit(Deep(TARGET.table), 1, growth)
    elif kind.endswith(" compiled"):
        drafter = compiled(kind.removesuffix(" compiled"), TARGET, growth)
    elif kind.endswith(" rounded"):
        drafter = rounded(kind.removesuffix(" rounded"), TARGET, growth)
    else:
        drafter = DRAFTER_OF.get(kind, EagleDrafter)(learned(kind, TARGET, 3), growth)  # type: ignore[arg-type]
    depth = Budgets(lambda s: (s.seed * 7 + len(s.tokens)) % 4)
    return Engine(TARGET, drafter, load_rule(rule), depth, slots=512, max_length=32)


@pytest.mark.parametrize("case", slow_beyond([(c,) for c in CASES], [(c,) for c in QUICK]))
def test_joint_distribution_of_four_tokens(case: str) -> None:
    engine = build(*CASES[case], RULES.get(case.partition(", ")[2], "speculative_sampling"))
    value, bound = statistic(collect(engine, N, seed=5, disturb=True), exact_joint() * N)
    assert value < bound
    assert engine.counts.accepted > 200
    assert engine.counts.rejected > 200


def test_control_a_drafter_that_declares_another_distribution_is_seen() -> None:
    """Negative control: what is declared for a token is the probability that its neighbour was drawn with."""
    engine = build(*CASES["heads, sampled chain"])
    honest = engine.parts.drafter.draft

    def lying(evidence: Evidence, budget):
        draft = honest(evidence, budget)
        if draft.q is None:
            return draft
        return replace(draft, q=replace(draft.q, probs=draft.q.probs.roll(1, -1)))

    engine.parts.drafter.draft = lying  # type: ignore[method-assign]
    value, bound = statistic(collect(engine, N, seed=5, disturb=False), exact_joint() * N)
    assert value > bound


def test_control_a_chain_that_drops_a_token_after_drawing_it_is_seen() -> None:
    """Negative control of stopping: the same chains, cut before a token that was drawn and came out unlikely."""
    engine = build("eagle", ByGain(3, 3, V, least=0.35), "block")
    honest = engine.parts.drafter.draft

    def choosy(evidence: Evidence, budget):
        draft = honest(evidence, budget)
        if draft.q is None:
            return draft
        trees = []
        rows: list[int] = []
        for b in range(len(draft.counts)):
            mine = list(draft.nodes(b))
            sure = [float(draft.q.probs[draft.q.row[k], draft.tokens[k]]) > 0.25 for k in mine]
            keep = mine[: sure.index(False)] if False in sure else mine
            trees.append(([draft.tokens[k] for k in keep], list(range(-1, len(keep) - 1))))
            rows += [draft.q.row[k] for k in keep]
        return Draft.join(trees, replace(draft.q, row=tuple(rows)) if rows else None)

    engine.parts.drafter.draft = choosy  # type: ignore[method-assign]
    value, bound = statistic(collect(engine, 2 * N, seed=5, disturb=False), exact_joint() * 2 * N)
    assert value > bound

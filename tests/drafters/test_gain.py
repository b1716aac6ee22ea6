"""Drafts that grow by expected gain: what is planned, what is learnt, and that nothing drawn is left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.registry import load_drafter
from outrider.drafters.spec import parse_draft
from outrider.drafters.tree.chances import Belief, by_rank, plan
from outrider.drafters.tree.gain import LEAST, ByGain, Dynamic
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import accepted, best_tree, levels
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.verify import best_exact, load_rule

V = 24
TARGET = TinyLM(V, seed=3, sharp=2.0)
NEAR = TARGET.perturbed(0.3, seed=7)


def engine(growth: Levels | ByGain | Dynamic, rule: str = "auto", length: int = 8, slots: int = 8) -> Engine:
    drafter = ModelDrafter(NEAR, growth.depth, growth=growth, vocab_size=V)
    chosen = best_exact(drafter) if rule == "auto" else load_rule(rule)
    return Engine(TARGET, drafter, chosen, Fixed(length), slots=slots, max_length=80)


def texts(made: Engine, temperature: float, count: int = 8, tokens: int = 24) -> list[list[int]]:
    params = [SamplingParams(temperature=temperature, max_tokens=tokens, seed=i) for i in range(count)]
    return [list(r.outputs[0].token_ids) for r in made.generate([[1 + i % 5, 2, 3] for i in range(count)], params)]


@pytest.mark.parametrize("ranks", [(0.6, 0.2, 0.1), (0.9, 0.05), (0.4, 0.25, 0.2, 0.1)])
@pytest.mark.parametrize("nodes", [1, 3, 7, 12])
def test_a_plan_from_the_anchor_is_the_first_level_of_the_best_tree(ranks: Sequence[float], nodes: int) -> None:
    tree = best_tree(ranks, nodes, 4)
    found = plan([(1.0, ranks)], nodes, 4, ranks)
    first = [k for k, up in enumerate(tree.parent) if up < 0]
    assert found.counts == [len(first)]
    assert found.further == {(0, r) for r, k in enumerate(first) if tree.below[k + 1]}


def test_a_plan_leaves_out_what_does_not_pay_and_what_is_likelier_elsewhere() -> None:
    assert plan([(1.0, (0.5, 0.1)), (0.1, (0.5, 0.1))], 2, 1, (0.5,)).counts == [2, 0]
    assert plan([(1.0, (0.5, 0.1)), (0.1, (0.5, 0.1))], 9, 1, (0.5,), least=0.06).counts == [2, 0]
    assert plan([(1.0, (float("nan"), 0.1))], 9, 1, (0.5,)).counts == [0]


def test_chances_by_rank_are_those_of_disjoint_events() -> None:
    for first in (0.0, 0.3, 0.7, 1.0):
        ranks = by_rank(first, 8)
        assert all(a >= b >= 0 for a, b in pairwise(ranks))
        assert sum(ranks) <= 1.0
    assert accepted(levels((1, 1)), by_rank(0.5, 1)) == 0.75


@pytest.mark.parametrize("greedy", [True, False])
def test_a_belief_follows_what_happens(greedy: bool) -> None:
    """After many verdicts with acceptance 0.9, or 0.2, the promise is near it."""
    for hit, miss in ((9, 1), (1, 4)):
        belief = Belief()
        for turn in range(40 * (hit + miss)):
            chance = belief.best(0.4) if greedy else belief.drawn(0.1)
            belief.promised = {-1: chance}
            belief.learn((0,) if turn % (hit + miss) < hit else (), greedy)
        assert abs(chance - hit / (hit + miss)) < 0.15


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_that_stops_drafts_less_and_loses_little(temperature: float) -> None:
    """Against the same drafter with chains of the full length: the tokens per drafted token rise."""
    whole, stopping = engine(Levels(levels((1,) * 8), V)), engine(ByGain(8, 8, V, least=0.3))
    texts(whole, temperature)
    texts(stopping, temperature)
    a, b = whole.counts, stopping.counts
    assert b.proposed / b.steps < 0.8 * a.proposed / a.steps
    assert b.accepted / b.proposed > a.accepted / a.proposed


def test_greedy_text_does_not_depend_on_stopping() -> None:
    plain = texts(engine(Levels(levels((1,) * 4), V)), 0.0)
    assert texts(engine(ByGain(6, 6, V, least=0.3)), 0.0) == plain
    assert texts(engine(Dynamic(9, 4, V, width=3)), 0.0) == plain


def test_nothing_that_was_drawn_is_left_out() -> None:
    """Every distribution that a chain drew from has its node in the draft, whatever came out of it."""
    made = engine(ByGain(6, 6, V, least=0.3))
    inner, seen = made.parts.drafter.draft, [0]

    def checked(evidence, budget):
        draft = inner(evidence, budget)
        if draft.q is not None:
            assert sorted(draft.q.row) == list(range(len(draft.q.probs)))
            seen[0] += len(draft.q.row)
        return draft

    made.parts.drafter.draft = checked  # type: ignore[method-assign]
    texts(made, 1.0)
    assert seen[0] > 100


def test_a_tree_of_draws_earns_at_least_what_the_chain_of_its_rows_does() -> None:
    """At temperature 1, eight rows and four levels: against point masses of the same tree, and against the chain of four."""
    tree = engine(ByGain(8, 4, V, width=4), length=4)
    chain = engine(Levels(levels((1,) * 4), V), length=4)
    for made in (tree, chain):
        texts(made, 1.0, count=12)
    assert tree.parts.rule.name == "traversal"
    assert tree.counts.tokens / tree.counts.steps > chain.counts.tokens / chain.counts.steps


def test_what_was_learnt_ends_with_the_slot() -> None:
    made = engine(ByGain(6, 6, V, least=0.2), slots=1)
    first = texts(made, 1.0, count=1)
    texts(made, 1.0, count=5)
    assert texts(made, 1.0, count=1) == first
    assert not made.parts.drafter.growth.beliefs  # type: ignore[attr-defined]


def test_the_grammar_of_stopping() -> None:
    growth = parse_draft("stop:PATH", 6, "sampled").growth(V)
    assert isinstance(growth, ByGain) and (growth.depth, growth.least, growth.trees) == (6, LEAST, False)
    other = parse_draft("stop:0.35:greedy:PATH", 6, "sampled")
    assert (other.path, other.sample, other.stop) == ("PATH", "greedy", 0.35)
    assert isinstance(parse_draft("dynamic:8x3:PATH", 4, "sampled").growth(V), Dynamic)
    for wrong in ("stop:1.5:PATH", "stop:0:PATH"):
        with pytest.raises(ConfigError, match="stop:0.3:PATH"):
            parse_draft(wrong, 4, "sampled")
    for wrong in ("stop:tree:2x2:PATH", "stop:dynamic:8:PATH", "stop:stop:PATH"):
        with pytest.raises(ConfigError, match="only chains stop early"):
            parse_draft(wrong, 4, "sampled")
    with pytest.raises(ConfigError, match="drop one of the two"):
        load_drafter("ahead:2:stop:PATH", target=TARGET, length=4, load_model=lambda name: (NEAR, None))


def test_engines_judge_draws_without_replacement_by_traversal() -> None:
    assert best_exact(ModelDrafter(NEAR, 2, growth=Dynamic(6, 2, V))).name == "traversal"
    assert best_exact(ModelDrafter(NEAR, 2, branching=(2, 2))).name == "optimal_transport"

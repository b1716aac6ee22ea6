"""The advised tree: acceptance by rank, the optimum against brute force, and the way from the command to a draft."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from outrider.build import build_engine
from outrider.cli.main import app
from outrider.drafters.registry import load_drafter
from outrider.drafters.tree.shapes import Static, accepted
from outrider.errors import ConfigError
from outrider.evaluate.planning.tree import Ranks, Times, advise, by_rank, measure_ranks, written
from outrider.params import SamplingParams


def test_what_is_written_is_read():
    tree = Static((-1, -1, 0, 0, 2))
    engine = build_engine(length=3, slots=1, max_length=64)
    model = next(iter(engine.loaded.models)).name
    load = lambda path: next(iter(engine.loaded.models.values()))  # noqa: E731
    found = load_drafter(f"{written(tree)}:{model}", target=engine.parts.target, length=3, load_model=load)
    assert (found.max_nodes, found.max_depth, found.trees) == (5, 3, True)
    with pytest.raises(ConfigError, match="raise the length"):
        load_drafter(f"{written(tree)}:{model}", target=engine.parts.target, length=2, load_model=load)
    with pytest.raises(ConfigError, match="parents"):
        load_drafter(f"tree:a,5:{model}", target=engine.parts.target, length=3, load_model=load)


def test_the_advice_is_the_best_of_all_trees():
    """Against every tree of up to 4 nodes, for random acceptances and times."""
    rng = np.random.default_rng(0)
    trees = [p for n in range(1, 5) for p in itertools.product(*(range(-1, k) for k in range(n)))]
    for _ in range(20):
        share = np.sort(rng.dirichlet([2.0, 1.0, 0.5, 2.0]))[::-1][:3].tolist()
        verify = (np.cumsum(rng.random(5) * 0.3) + 1.0).tolist()
        level = float(rng.random() * 0.2)
        ranks, times = Ranks(tuple(share), (0.0,) * 3, 1), Times(tuple(verify), level, (0, 1, 2, 3, 4))
        best = max(
            (1 + accepted(Static(p), share)) / (verify[len(p)] + level * Static(p).depth)
            for p in trees
            if Static(p).depth <= 3
        )
        found = advise(ranks, times, 3)
        assert found.rate == pytest.approx(max(best, 1 / verify[0]), rel=1e-12)
        assert (found.tree is None) == (best <= 1 / verify[0])


def test_acceptance_by_rank_adds_up_to_that_of_the_whole_node():
    """Ranks are disjoint outcomes: their sum is the acceptance of the anchor's children together, as the engine counts it."""
    engine = build_engine(draft="none", length=0, slots=1, max_length=128)
    model = next(iter(build_engine(length=1, slots=1, max_length=64).loaded.models)).name
    prompts = [engine.encode(p) for p in ("import ", "def f(x):\n    return ", "class A:\n    ")]
    ranks = measure_ranks(engine, model, prompts, SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True), 3)
    assert 0 < sum(ranks.acceptance) <= 1
    assert all(a >= b for a, b in itertools.pairwise(ranks.acceptance))
    assert ranks.seen > 50


def test_the_command_prints_a_draft_that_runs():
    result = CliRunner().invoke(
        app, ["tree", "--nodes", "4", "--depth", "2", "--width", "2", "--count", "2", "--max-tokens", "24", "--json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert len(document["acceptance_by_rank"]) == 2
    if document["parent"] is not None:
        engine = build_engine(draft=document["draft"], length=document["length"], slots=1, max_length=64)
        engine.generate(["import "], [SamplingParams(max_tokens=8)])
        assert engine.counts.proposed > 0


def test_ranks_that_were_pooled_share_one_error_and_none_is_without():
    """Ranks 2 to 5 had 0, 0, 0 and 1 of five: each is given a quarter of that sum, and a quarter of its error."""
    found = by_rank([2, 0, 0, 0, 1], seen=5)
    assert found.acceptance == pytest.approx((0.4, 0.05, 0.05, 0.05, 0.05))
    assert found.error[1:] == pytest.approx([(0.25 * 0.75 / 5) ** 0.5 / 4] * 4)
    assert min(by_rank([0, 0], seen=3).error) > 0 and by_rank([3, 0], seen=3).error[0] > 0
    many = by_rank([40000, 10000], seen=100000)
    assert many.error == pytest.approx([(0.4 * 0.6 / 1e5) ** 0.5, (0.1 * 0.9 / 1e5) ** 0.5], rel=1e-3)


@pytest.mark.parametrize("draft", ["ngram", "ngram:2-4", "none", "suffix"])
def test_a_tree_of_a_drafter_without_distributions_is_refused_by_its_name(draft: str):
    result = CliRunner().invoke(app, ["tree", "--draft", draft])
    assert isinstance(result.exception, ConfigError)
    assert repr(draft) in str(result.exception) and "tree:" not in str(result.exception)

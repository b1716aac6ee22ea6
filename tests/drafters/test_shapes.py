"""Shapes of draft trees: counted against brute force, best trees against all trees."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from outrider.drafters.tree.shapes import MAX_NODES, MergedDrafts, Static, accepted, best_tree, best_tree_for, levels
from outrider.errors import ConfigError


@pytest.mark.parametrize(("widths", "nodes"), [((1, 1, 1), 3), ((2, 2, 1), 10), ((4, 1, 1), 12), ((3,), 3)])
def test_levels_have_the_nodes_they_promise(widths, nodes):
    tree = levels(widths)
    assert (tree.nodes, tree.depth, tree.width) == (nodes, len(widths), max(widths))
    states, seen = [tree.start], 0
    for width in widths:
        assert {tree.children(s) for s in states} == {width}
        states = [x for s in states for x in tree.states(s, [0] * width)]
        seen += len(states)
    assert seen == nodes
    assert {tree.children(s) for s in states} == {0}


def test_shared_merges_and_keeps_every_coin():
    tree = MergedDrafts(5, 3)
    assert tree.children(tree.start) == 5
    assert tree.states(5, [7, 3, 7, 7, 3]) == [3, 2, 0, 0, 0]  # the first of equals goes on with the number of all
    assert sum(tree.states(5, [7, 3, 7, 7, 3])) == 5
    assert tree.children(0) == 0


def all_trees(nodes: int, ranks: int):
    """Every tree of `nodes` nodes as parents, in which no node has more children than there are ranks."""
    for parent in product(*[range(-1, k) for k in range(nodes)]):
        ordered = all(a <= b for a, b in pairwise(parent))  # breadth first: every tree once
        if ordered and all(parent.count(up) <= ranks for up in set(parent)):
            yield Static(parent)


@pytest.mark.parametrize("acceptance", [(0.6, 0.2, 0.1), (0.5, 0.5), (0.9, 0.05), (0.3, 0.3, 0.3), (1.0,), (0.4, 0.0)])
@pytest.mark.parametrize("nodes", [1, 2, 4, 6])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_no_tree_is_better_than_the_best(acceptance, nodes, depth):
    best = accepted(best_tree(acceptance, nodes, depth), acceptance)
    rivals = [t for n in range(1, nodes + 1) for t in all_trees(n, len(acceptance)) if t.depth <= depth]
    assert best == pytest.approx(max(accepted(t, acceptance) for t in rivals), abs=1e-12)


def test_the_best_tree_for_a_clock_weighs_nodes_against_time():
    flat, free = [1.0] * 33, 0.0
    tree, rate = best_tree_for((0.6, 0.2, 0.1), flat, free, 32, 6)
    assert tree.nodes == 32  # verification costs nothing more: take everything
    assert rate == pytest.approx(1 + accepted(tree, (0.6, 0.2, 0.1)))
    steep = [1.0 + 2.0 * n for n in range(33)]
    tree, rate = best_tree_for((0.6, 0.2, 0.1), steep, free, 32, 6)
    assert tree.nodes == 1
    assert rate < 1.0 / steep[0]  # below plain decoding: the caller should not speculate


def test_chains_accept_the_geometric_sum():
    assert accepted(levels((1,) * 5), (0.7,)) == pytest.approx(sum(0.7**d for d in range(1, 6)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: levels(()), "at least one level"),
        (lambda: levels((2, 0)), "numbers >= 1"),
        (lambda: levels((64, 64, 64)), f"at most {MAX_NODES}"),
        (lambda: Static((0,)), "come before"),
        (lambda: MergedDrafts(0, 3), "both >= 1"),
        (lambda: best_tree((0.5, 0.6), 4, 2), "must not increase|at most one"),
        (lambda: best_tree((0.2, 0.3), 4, 2), "must not increase"),
        (lambda: best_tree((0.5,), 0, 2), "depth >= 1"),
        (lambda: best_tree_for((0.5,), [1.0], 0.1, 3, 2), "needs times"),
    ],
)
def test_bad_shapes_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()

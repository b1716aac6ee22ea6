"""first_of: per sequence the first that speaks; distributions, supports and hidden states of the parts stay their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from outrider.drafters.combine import FirstOf, first_of, merge
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.tree.forest import chains
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.types import Draft, Evidence, Proposal, Scores
from tests.drafters.drafting import chain, evidence, view

V = 12
CPU = torch.device("cpu")
MODEL = TinyLM(V, seed=5)


class Fake:
    """Says what it is told, remembers what it was asked."""

    trees, max_nodes, max_depth = False, 3, 3

    def __init__(self, name: str, draft: Draft, layers: tuple[int, ...] = ()) -> None:
        self.name, self.answer, self.layers = name, draft, layers
        self.asked: list[list[int]] = []
        self.hidden: tuple[torch.Tensor, ...] = ()
        self.calls: list[object] = []

    def bind(self, slots: int, length: int) -> None:
        self.calls.append((slots, length))

    def release(self, slots: Sequence[int]) -> None:
        self.calls.append(list(slots))

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        self.asked.append(list(budget))
        self.hidden = evidence.scores.hidden
        return self.answer


def test_later_parts_are_asked_only_for_the_silent() -> None:
    a, b, c = (Fake(n, chains(t, CPU)) for n, t in (("a", [[1], [], []]), ("b", [[], [2, 3], []]), ("c", [[], [], []])))
    both = first_of(a, b, c)
    draft = both.draft(evidence([view([1], s) for s in range(3)], V), [3, 3, 3])
    assert [a.asked, b.asked, c.asked] == [[[3, 3, 3]], [[0, 3, 3]], [[0, 0, 3]]]
    assert (draft.counts, draft.tokens, draft.parent, draft.q) == ((1, 2, 0), (1, 2, 3), (-1, -1, 1), None)
    both.bind(3, 9)
    both.release([2])
    assert a.calls == b.calls == c.calls == [(3, 9), [2]]
    assert (both.name, both.max_depth, both.max_nodes, both.trees) == ("a+b+c", 3, 3, False)
    assert first_of(a) is a
    with pytest.raises(ConfigError):
        FirstOf([])


def test_each_part_sees_its_own_hidden_states() -> None:
    nothing = chains([[]], CPU)
    a, b, c = Fake("a", nothing, (3, 1)), Fake("b", nothing, (2,)), Fake("c", nothing)
    both = first_of(a, b, c)
    assert both.layers == (1, 2, 3)
    states = tuple(torch.full((1, 2), float(i)) for i in (1, 2, 3))
    seen = replace(evidence([view([1])], V), scores=Scores(torch.zeros(0, V), states))
    assert both.draft(seen, [1]).counts == (0,)
    assert [[float(h[0, 0]) for h in part.hidden] for part in (a, b, c)] == [[3.0, 1.0], [2.0], []]


def test_point_masses_and_distributions_in_one_draft() -> None:
    """n-gram where the text repeats, the model elsewhere: each node keeps what it was."""
    texts = [[1, 2, 3, 1, 2], [4, 5, 6], [7, 7, 8, 7, 7], [9]]
    views = [view(t, s, seed=s) for s, t in enumerate(texts)]
    model = ModelDrafter(MODEL, 3)
    both = first_of(NGram(3), model)
    both.bind(4, 32)
    draft = both.draft(evidence(views, V), [3, 2, 3, 3])
    assert draft.counts == (3, 2, 3, 3)
    assert [chain(draft, b) for b in (0, 2)] == [[3, 1, 2], [8, 7, 7]]
    assert draft.q is not None
    assert draft.q.row == (-1, -1, -1, 0, 2, -1, -1, -1, 1, 3, 4)
    alone = ModelDrafter(MODEL, 3)
    alone.bind(4, 32)
    expected = alone.draft(evidence([views[1], views[3]], V), [2, 3])
    assert chain(draft, 1) + chain(draft, 3) == list(expected.tokens)
    assert expected.q is not None
    torch.testing.assert_close(draft.q.probs, expected.q.probs)
    # the silent part caught up where it was not asked: the next draft is that of a fresh one
    texts[0] += [3, 9, 9]
    again = both.draft(evidence(views, V), [3, 0, 0, 0])
    other = ModelDrafter(MODEL, 3)
    other.bind(4, 32)
    assert chain(again, 0) == chain(other.draft(evidence(views, V), [3, 0, 0, 0]), 0)


def tree(tokens: list[int], q: Proposal | None) -> Draft:
    """Two children of the anchor."""
    return Draft(torch.tensor(tokens), (-1, -1), (2,), q)


def pad(draft: Draft, sequences: int, at: int) -> Draft:
    """`draft` of one sequence as sequence `at` of several, the others silent."""
    counts = [0] * sequences
    counts[at] = draft.counts[0]
    return Draft(draft.token, draft.parent, tuple(counts), draft.q)


def proposal(rows: int, columns: int, siblings="iid", support=None, row=None) -> Proposal:
    probs = torch.softmax(torch.arange(rows * columns, dtype=torch.float64).view(rows, columns).sin(), -1)
    return Proposal(probs, tuple(range(rows)) if row is None else row, support, siblings)


def test_supports_that_differ_become_dense() -> None:
    few = proposal(1, 3, support=torch.tensor([2, 5, 7]))
    full = proposal(1, V)
    a, b = Draft(torch.tensor([5]), (-1,), (1,), few), Draft(torch.tensor([4]), (-1,), (1,), full)
    merged = merge([pad(a, 2, 0), pad(b, 2, 1)], [0, 1], V)
    assert merged.q is not None
    assert merged.q.support is None
    assert merged.q.row == (0, 1)
    torch.testing.assert_close(merged.q.probs, torch.cat([few.dense([0], V), full.probs]))
    both = merge([pad(a, 2, 0), pad(replace(a, token=torch.tensor([7])), 2, 1)], [0, 1], V)
    assert both.q is not None
    assert both.q.support is not None
    assert both.q.support.tolist() == [2, 5, 7]
    assert both.q.row == (0, 1)


def test_two_ways_of_drawing_siblings_do_not_share_a_proposal() -> None:
    iid = tree([3, 3], proposal(1, V, row=(0, 0)))
    without = tree([4, 5], proposal(1, V, "without_replacement", row=(0, 0)))
    single = Draft(torch.tensor([6]), (-1,), (1,), proposal(1, V))
    merged = merge([pad(iid, 3, 2), pad(without, 3, 0), pad(single, 3, 1)], [1, 2, 0], V)
    assert merged.q is not None
    assert merged.tokens == (4, 5, 6, 3, 3)
    assert merged.q.siblings == "iid"
    assert merged.q.row == (
        -1,
        -1,
        1,
        0,
        0,
    )  # the second way gives up its distribution: point masses are always lossless
    mixed = merge([pad(without, 2, 0), pad(single, 2, 1)], [0, 1], V)
    assert mixed.q is not None
    assert (mixed.q.siblings, mixed.q.row) == ("without_replacement", (0, 0, 1))

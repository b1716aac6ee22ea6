"""The toy targets: exact distributions, and logits that go wrong when a cache is handled wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import ConfigError
from outrider.models.toy import TableTarget, TinyLM
from outrider.nn.kv import PagedKV
from outrider.protocols import Target
from outrider.types import Draft, Rows

V = 11
TOYS: dict[str, Callable[[], TableTarget | TinyLM]] = {
    "markov": lambda: TableTarget.random(V, seed=0),
    "order 2 by position": lambda: TableTarget.random(V, seed=1, order=2, positions=6),
    "order 3": lambda: TableTarget.random(V, seed=2, order=3),
    "tiny": lambda: TinyLM(V, seed=3),
}


def recompute(target: TableTarget | TinyLM, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens`, in one prefix and a fresh cache."""
    rows = Rows.assemble([0], [tokens], [0], Draft.empty(1))
    return target.forward(rows, target.new_kv(1, len(tokens))).logits[0]


@st.composite
def forests(draw: st.DrawFn) -> tuple[list, ...]:
    """Slots, prefixes, a random forest (tokens, parents, counts), a random kept path per sequence (offsets of nodes).

    Plain lists: run-time type checks draw random items to look at, which a strategy may not do.
    """
    slots = draw(st.permutations(range(5)))[: draw(st.integers(1, 4))]
    tokens = st.integers(0, V - 1)
    prefixes = [draw(st.lists(tokens, min_size=1, max_size=5)) for _ in slots]
    counts, parent, paths = [], [], []
    for _ in slots:
        n, low = draw(st.integers(0, 6)), len(parent)
        local = [draw(st.integers(-1, i - 1)) for i in range(n)]
        parent += [p if p < 0 else p + low for p in local]
        counts.append(n)
        node, path = draw(st.integers(-1, n - 1)), list[int]()
        while node >= 0:
            path.insert(0, node)
            node = local[node]
        paths.append(path)
    return slots, prefixes, [draw(tokens) for _ in parent], parent, counts, paths


@pytest.mark.parametrize("name", TOYS)
@settings(max_examples=12, deadline=None)
@given(step=forests(), again=forests())
def test_every_row_equals_a_recomputation_of_its_path(name: str, step: tuple, again: tuple) -> None:
    """Two steps in a row over one cache: the second reads what the first one's commit left behind."""
    target = TOYS[name]()
    kv = target.new_kv(5, 40)
    text: dict[int, list[int]] = {}
    for slots, prefixes, token, parent, counts, paths in (step, again):
        draft = Draft(torch.tensor(token, dtype=torch.int64), tuple(parent), tuple(counts))
        rows = Rows.assemble(slots, prefixes, [len(text.get(s, [])) for s in slots], draft)
        kv.reserve(rows)
        logits = target.forward(rows, kv).logits
        whole = [text.get(s, []) + prefix for s, prefix in zip(slots, prefixes, strict=True)]
        want = list(whole)
        for b in range(len(slots)):
            for k in range(draft.offsets[b], draft.offsets[b + 1]):
                want.append(whole[b] + [draft.tokens[i] for i in draft.path_to(k)])
        for row, tokens in enumerate(want):
            torch.testing.assert_close(logits[row], recompute(target, tokens), atol=1e-12, rtol=0)
        kv.commit(rows, paths)
        for b, slot in enumerate(slots):
            text[slot] = whole[b] + [draft.tokens[draft.offsets[b] + i] for i in paths[b]]


@pytest.mark.parametrize("name", ["markov", "order 2 by position", "order 3"])
def test_the_distribution_of_a_table_is_what_its_logits_say(name: str) -> None:
    target = TOYS[name]()
    assert isinstance(target, TableTarget)
    for tokens in ([4], [4, 7], [4, 7, 1], [1, 2, 3, 4, 5, 6, 7, 8]):
        torch.testing.assert_close(
            torch.softmax(recompute(target, tokens), -1), target.distribution(tokens), atol=1e-14, rtol=0
        )


def test_a_table_is_indexed_by_position_then_oldest_token_first() -> None:
    logits = torch.arange(2 * 3 * 3 * 3, dtype=torch.float64).view(2, 3, 3, 3)
    target = TableTarget(logits, order=2)
    assert torch.equal(recompute(target, [1]), logits[0, 0, 1])  # token 0 stands before the sequence
    assert torch.equal(recompute(target, [1, 2]), logits[1, 1, 2])
    assert torch.equal(recompute(target, [1, 2, 0]), logits[1, 2, 0])  # the last table serves all later positions


@pytest.mark.parametrize("name", ["order 2 by position", "order 3", "tiny"])
@pytest.mark.parametrize("fault", ["kept one row too few", "kept a rejected row", "wrong slot"])
def test_a_faulty_cache_shows(name: str, fault: str) -> None:
    target = TOYS[name]()
    kv = target.new_kv(2, 20)
    draft = Draft(torch.tensor([5, 6, 7]), (-1, 0, -1), (3, 0))
    rows = Rows.assemble([0, 1], [[1, 2, 3], [9, 8, 10, 4, 1]], [0, 0], draft)
    target.forward(rows, kv)
    kept = {"kept one row too few": [[0], []], "kept a rejected row": [[1, 2], []], "wrong slot": [[0, 1], []]}[fault]
    kv.commit(rows, kept)
    slot = int(fault == "wrong slot")
    after = target.forward(Rows.assemble([slot], [[4]], [kv.length[slot]], Draft.empty(1)), kv).logits[0]
    assert float((after - recompute(target, [1, 2, 3, 5, 6, 4])).abs().max()) > 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_taps_and_unembedding(name: str) -> None:
    target = TOYS[name]()
    assert isinstance(target, Target)
    rows = Rows.assemble([1, 0], [[1, 2, 3], [4]], [0, 0], Draft(torch.tensor([5, 6]), (-1, -1), (2, 0)))
    scores = target.forward(rows, target.new_kv(2, 8), layers=(target.layers, 0))
    last, first = scores.hidden
    assert last.shape == first.shape == (rows.count, target.hidden_size)
    torch.testing.assert_close(target.unembed(last)[rows.scored], scores.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(first, target.embed(rows.token))
    assert scores.logits.dtype == torch.float64
    plain = target.forward(rows, target.new_kv(2, 8))
    torch.testing.assert_close(plain.logits, scores.logits, atol=0, rtol=0)


@pytest.mark.parametrize("name", TOYS)
def test_neighbours_do_not_show(name: str) -> None:
    target = TOYS[name]()
    alone = recompute(target, [1, 2, 3])
    many = Rows.assemble([3, 1, 0], [[7] * 9, [1, 2, 3], [4, 5]], [0, 0, 0], Draft.empty(3))
    torch.testing.assert_close(target.forward(many, target.new_kv(4, 9)).logits[1], alone, atol=1e-13, rtol=0)


def test_seeds_make_models_and_perturbation_makes_drafts() -> None:
    """The acceptance (1 - TV) of a perturbed model falls with its scale and is one at scale zero."""
    target = TinyLM(32, seed=0)
    text = torch.randint(32, (60,), generator=torch.Generator().manual_seed(0)).tolist()

    def distributions(model: TinyLM) -> torch.Tensor:
        draft = Draft(torch.tensor(text[1:]), tuple(range(-1, 58)), (59,))
        rows = Rows.assemble([0], [text[:1]], [0], draft)
        return torch.softmax(model.forward(rows, model.new_kv(1, 60)).logits, -1)

    p = distributions(target)
    assert torch.equal(distributions(TinyLM(32, seed=0)), p)
    accepted = [
        float(torch.minimum(p, distributions(target.perturbed(scale, 1))).sum(-1).mean()) for scale in (0.0, 0.05, 0.3)
    ]
    assert accepted[0] == pytest.approx(1.0)
    assert 1 > accepted[1] > 0.7 > accepted[2] > 0.2
    table = TableTarget.random(V, seed=0)
    assert float((table.perturbed(0.1, 1).table - table.table).abs().mean()) == pytest.approx(0.08, abs=0.02)


def test_a_thousand_sequences_fit_in_a_step() -> None:
    target = TableTarget.random(4, seed=0, order=2)
    kv = target.new_kv(1000, 8)
    draft = Draft(torch.arange(2000) % 4, tuple(p for b in range(1000) for p in (-1, 2 * b)), (2,) * 1000)
    rows = Rows.assemble(list(range(1000)), [[b % 4] for b in range(1000)], [0] * 1000, draft)
    logits = target.forward(rows, kv).logits
    assert logits.shape == (3000, 4)
    assert torch.equal(logits[7], target.table[0, 0, 3])
    assert torch.equal(logits[1000 + 15], target.table[0, 14 % 4, 15 % 4])


def test_wrong_shapes_and_caches_are_refused() -> None:
    with pytest.raises(ConfigError, match="order 1"):
        TableTarget(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="order 3"):
        TableTarget(torch.zeros(3, 3), order=3)
    with pytest.raises(ConfigError, match="heads"):
        TinyLM(5, hidden=6, heads=2)
    assert isinstance(TinyLM(5).new_kv(1, 2), PagedKV)

"""Self-speculation over a view of the target's own cache: what is seen, that the cache stays as it was, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.drafters.registry import load_drafter
from outrider.drafters.sparse import Sparse, SparseDrafter, merged, parse_sparse, worthwhile_from
from outrider.drafters.tree.chances import Belief
from outrider.drafters.tree.gain import ByGain
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TinyLM
from outrider.types import Draft, Rows
from tests.drafters.drafting import evidence, view

V = 13


def drafted(
    spec: Sparse, n: int, length: int = 4
) -> tuple[SparseDrafter, TinyLM, Draft, list[torch.Tensor], list[int]]:
    """A drafter after one draft behind `n` cached tokens; the cache's entries before and after it; the text."""
    target = TinyLM(V, sharp=3.0)
    drafter = SparseDrafter(target, spec, Levels(levels((1,) * length), V))
    kv = target.new_kv(2, n + 10)
    drafter.bind(2, n + 10)
    drafter.borrow(kv)
    text = torch.randint(V, (n + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Rows.assemble([1], [text[:n]], [0], Draft.empty(0), [False])
    target.forward(rows, kv)
    kv.commit(rows, [()])
    before = [t.clone() for t in kv.entries(1, n)]
    draft = drafter.draft(evidence([view(text, slot=1, temperature=1.0)], V), [length])
    assert kv.length == [0, n]
    return drafter, target, draft, [*before, *kv.entries(1, n)], text


@pytest.mark.parametrize("spec", [Sparse("window", 2, 6), Sparse("snap", 2, 6, 32, 20), Sparse("pillar", 2, 6, 32)])
def test_the_target_s_cache_stays_as_it_was(spec: Sparse) -> None:
    _, _, draft, entries, _ = drafted(spec, 60)
    assert draft.counts == (4,) and draft.q is not None
    assert torch.equal(entries[0], entries[2]) and torch.equal(entries[1], entries[3])


def test_the_first_distribution_is_that_of_the_view() -> None:
    """q of the first token equals the target over a cache of the seen tokens alone, at their own positions."""
    n, spec = 30, Sparse("window", 2, 6)
    _, target, draft, _, text = drafted(spec, n)
    kv = target.new_kv(1, n + 2)
    rows = Rows.assemble([0], [text[:n]], [0], Draft.empty(0), [False])
    target.forward(rows, kv)
    kv.commit(rows, [()])
    kept = [*range(2), *range(n - 6, n)]
    k, v = (t[:, :, kept].clone() for t in kv.entries(0, n))
    kv.k[:, :, :8], kv.v[:, :, :8] = k, v
    kv.truncate(0, 8)
    row = Rows.assemble([0], [[text[n]]], [8], Draft.empty(1))
    row.position.fill_(n)
    expected = torch.softmax(target.forward(row, kv).logits[0], -1)
    assert draft.q is not None
    assert torch.allclose(draft.q.probs[0].double(), expected.double(), atol=1e-6)


def test_nothing_is_drafted_while_everything_would_be_seen() -> None:
    assert drafted(Sparse("window", 4, 20), 24)[2].counts == (0,)
    assert drafted(Sparse("window", 4, 20), 25)[2].counts == (4,)


class Weighed(TinyLM):
    """A target that says what a step reads."""

    step_bytes = 44e6, 24_000.0


def test_auto_drafts_over_a_view_where_that_is_expected_to_be_faster() -> None:
    """From a context on that is a good part of what a step reads; not where contexts end before, or nothing is known."""
    found = worthwhile_from(Weighed(V, max_length=16_384), parse_sparse("window:16+496"))
    assert found is not None and 512 < found < 44e6 / 24_000 * 1.5
    assert worthwhile_from(Weighed(V, max_length=found), parse_sparse("window:16+496")) is None
    assert worthwhile_from(TinyLM(V, max_length=16_384), parse_sparse("window:16+496")) is None
    auto = load_drafter("auto", target=Weighed(V, max_length=16_384), length=3)
    assert auto.name == "prediction+forced+ngram+sparse:window"
    assert auto.parts[-1].least == found  # type: ignore[attr-defined]
    assert load_drafter("sparse:window:16+496", target=Weighed(V), length=3).least == 0  # type: ignore[attr-defined]


class Light(Weighed):
    """A draft model that reads little, and for 2,000 tokens."""

    step_bytes = 2e6, 1_000.0


def test_auto_drafts_over_a_view_where_the_draft_model_ends_or_is_slower() -> None:
    """Before the draft model in the list, from the context on at which it is the better one."""
    target, window = Weighed(V, max_length=1 << 20), parse_sparse("window:16+496")
    assert worthwhile_from(target, window, Light(V, max_length=2_000)) == 2_000
    longer = worthwhile_from(target, window, Light(V, max_length=1 << 20))
    assert longer is not None and longer > 20_000, "by then its own cache costs what the target's weights do"
    assert worthwhile_from(Weighed(V, max_length=longer), window, Light(V, max_length=1 << 20)) is None
    assert worthwhile_from(target, window, TinyLM(V)) is None, "of it nothing is known"


@pytest.mark.parametrize("most", [2_000, 1 << 20])
def test_auto_joins_a_view_and_a_draft_model(most: int, tmp_path: Path) -> None:
    for part in ("target", "draft"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"model_type": "llama"}')
    model = Light(V, max_length=most)
    found = load_drafter(
        "auto", target=Weighed(V, max_length=8_192), length=3, target_path=str(tmp_path / "target"),
        load_model=lambda path: (model, None), find_folder=Path,
    )  # fmt: skip
    names = [part.name for part in found.parts]  # type: ignore[attr-defined]
    assert names[:2] == ["prediction", "forced"]
    assert names[2:-1] == (["sparse:window"] if most == 2_000 else [])
    assert found.parts[-1].model is model  # type: ignore[attr-defined]


def test_nothing_is_drafted_below_the_least_context() -> None:
    for least, count in ((31, 0), (30, 4)):
        drafter, _, _, _, text = drafted(Sparse("window", 2, 6), 30)
        drafter.least = least
        assert drafter.draft(evidence([view(text, slot=1)], V), [4]).counts == (count,)


def test_pillar_sees_what_got_weight() -> None:
    drafter, _, _, _, text = drafted(Sparse("pillar", 2, 6, 16), 80)
    attended = drafter.kv.attended  # type: ignore[attr-defined]
    attended[1] = torch.tensor([9.0, 0.1, 0.3, 0.2, 0.1, 5.0])
    assert drafter.ranges(view(text, slot=1)) == ((0, 2), (32, 48), (74, 80))
    del attended[1]
    assert drafter.ranges(view(text, slot=1)) == ((0, 2), (58, 80))


def test_snap_keeps_its_choice_for_a_while() -> None:
    drafter, _, _, _, text = drafted(Sparse("snap", 2, 6, 16, refresh=3), 80)
    attended = drafter.kv.attended  # type: ignore[attr-defined]
    drafter.release([1])
    attended[1] = torch.tensor([9.0, 0.1, 0.3, 0.2, 0.1, 5.0])
    first = drafter.ranges(view(text, slot=1))
    attended[1] = torch.tensor([9.0, 0.1, 0.1, 0.2, 0.1, 5.0])
    assert drafter.ranges(view([*text, 1, 1], slot=1))[1] == first[1] == (32, 48)
    assert drafter.ranges(view([*text, 1, 1, 1], slot=1))[1] == (48, 64)


def test_a_released_slot_s_acceptance_is_forgotten() -> None:
    """What a chain that stops has learnt of a sequence says nothing of the next one in its slot."""
    growth = ByGain(4, 4, V)
    drafter = SparseDrafter(TinyLM(V), Sparse("window", 2, 6), growth)
    growth.beliefs |= {0: Belief(base=0.1), 1: Belief(base=0.9)}
    drafter.release([1])
    assert growth.beliefs == {0: Belief(base=0.1)}


def test_ranges_are_merged() -> None:
    assert merged(((8, 12), (0, 4), (4, 6), (5, 7), (9, 9))) == ((0, 7), (8, 12))


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("window:16+496", Sparse("window", 16, 496)),
        ("snap:512", Sparse("snap", 16, 128, 368, 256)),
        ("pillar:64", Sparse("pillar", 16, 16, 32)),
    ],
)
def test_specs(spec: str, found: Sparse) -> None:
    assert parse_sparse(spec) == found and found.size == sum(map(int, spec.partition(":")[2].split("+")))


@pytest.mark.parametrize(
    "spec", ["", "window", "window:16", "window:16+0", "snap:63", "pillar:x", "pillar:512+3", "int4"]
)
def test_bad_specs_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="sparse"):
        load_drafter(f"sparse:{spec}", target=TinyLM(V), length=3)


def test_trees_and_targets_without_views_are_refused() -> None:
    with pytest.raises(CapabilityError, match="chains only"):
        load_drafter("tree:2x2:sparse:window:1+2", target=TinyLM(V), length=3)
    target = TinyLM(V)
    target.views = False  # type: ignore[misc]
    with pytest.raises(CapabilityError, match="part of its cache"):
        load_drafter("sparse:window:1+2", target=target, length=3)

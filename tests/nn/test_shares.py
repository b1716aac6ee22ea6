"""One memory for target and drafter: what `kv_memory` allows is an upper bound of all caches, and drafts give way, never texts."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ahead import Ahead
from outrider.drafters.coded import CodedDrafter
from outrider.drafters.combine import first_of, gated
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapacityError
from outrider.models.lean import LeanTarget
from outrider.models.native.build import load_library
from outrider.models.restricted import Restricted
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.verify import load_rule
from tests.contract.drafters import learned
from tests.covering import slow_beyond
from tests.models.test_native import SHAPES, random_weights, tokens

PAGE = 64
# Texts that are independent of the other rows: the compiled decoder has them in bfloat16, PyTorch in float64 alone.
DTYPE = torch.bfloat16 if load_library() is not None else torch.float64
TARGET = LeanTarget(SHAPES["plain"][0], random_weights(*SHAPES["plain"], DTYPE))
V = TARGET.vocab_size
PROMPTS = [tokens(n, V, seed=n) for n in (130, 70, 128, 9, 200, 40)]


def small() -> LeanTarget:
    """A draft model: the target's first layer."""
    return TARGET.first_layers(1)


def build(drafter: Drafter, memory: int | None, slots: int = 3) -> Engine:
    gb = None if memory is None else memory / 1e9
    return Engine(TARGET, drafter, load_rule("match"), Fixed(3), slots=slots, max_length=250, kv_memory=gb)


def texts(one: Engine) -> list[tuple[int, ...]]:
    asked = [SamplingParams(temperature=1.0, max_tokens=45, seed=i) for i in range(len(PROMPTS))]
    return [r.outputs[0].token_ids for r in one.generate(PROMPTS, asked)]


@cache
def plain_texts() -> list[tuple[int, ...]]:
    return texts(build(NoDraft(), None))


def bytes_of(kv: object) -> int:
    return kv.k.nbytes + kv.v.nbytes  # type: ignore[attr-defined]


DRAFTERS = {
    "model": lambda: ModelDrafter(small(), 3),
    "tree": lambda: ModelDrafter(small(), 2, branching=(2, 2)),
    "copy": lambda: CodedDrafter(TARGET, Levels(levels((1,) * 3), V)),
    "restricted": lambda: ModelDrafter(Restricted(small(), torch.arange(50)), 3, vocab_size=V),
}


@pytest.mark.parametrize("name", slow_beyond([(name,) for name in DRAFTERS], [("model",), ("copy",)]))
def test_all_caches_together_take_no_more_and_texts_stay(name: str) -> None:
    """Pages for little more than one sequence: sequences wait, are sent away, or go without drafts; nobody's text changes."""
    drafter = DRAFTERS[name]()
    each = TARGET.token_bytes + drafter.cache_need(3, 250).token
    memory = 6 * PAGE * each
    one = build(drafter, memory)
    taken = bytes_of(one.parts.kv) + bytes_of(drafter.cache.kv)
    assert 5 * PAGE * each <= taken <= memory
    assert texts(one) == plain_texts()
    assert one.counts.accepted > 0 and not one.notices
    assert drafter.cache.kv.pages.free + drafter.cache.kv.prefixes.idle == drafter.cache.kv.pages.count  # type: ignore[attr-defined]


def test_a_sequence_without_pages_is_not_drafted_for() -> None:
    """A drafter's own pages may be fewer than the target's: then some of the sequences have no drafts, and nothing fails."""
    drafter = DRAFTERS["model"]()
    drafter.keep_within(5 * PAGE)
    one = build(drafter, None)
    assert drafter.cache.kv.pages.count == 5  # type: ignore[attr-defined]
    assert texts(one) == plain_texts()
    roomy = build(DRAFTERS["model"](), None)
    texts(roomy)
    assert 0 < one.counts.proposed < roomy.counts.proposed and not one.notices


@pytest.mark.parametrize("pages", [5, 12])
def test_premises_take_no_page_from_drafts(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pages for premises, every sequence has the drafts that it has without them."""
    alone, ahead = ModelDrafter(small(), 3), Ahead(ModelDrafter(small(), 4), 4, inline=True)
    monkeypatch.setattr(Ahead, "_extra", lambda self, slots: 0)
    engines = []
    for drafter in (alone, ahead):
        drafter.keep_within(pages * PAGE)
        engines.append(build(drafter, None))
        assert texts(engines[-1]) == plain_texts()
    plain, beside = engines
    assert ahead.inner.cache.kv.pages.count == pages  # type: ignore[attr-defined]
    assert 0 < plain.counts.proposed == beside.counts.proposed
    assert plain.counts.accepted == beside.counts.accepted
    assert ahead.hits > 0  # a premise without pages is none


def test_premises_ask_for_their_own_pages_only() -> None:
    """Nothing is allowed or forbidden: pages for whole sequences, and two for each premise, which shares the others."""
    drafter = Ahead(ModelDrafter(small(), 4), 5, inline=True)
    build(drafter, None)
    assert drafter.inner.cache.kv.pages.count == 3 * 4 + 3 * 5 * 2  # type: ignore[attr-defined]


def test_caches_without_pages_are_taken_off_whole() -> None:
    network = learned("eagle", TinyLM(V, 64, 3, heads=2), steps=1)
    drafter = EagleDrafter(network, Levels(levels((1,) * 3), V))  # type: ignore[arg-type]
    need = drafter.cache_need(3, 250 + 3)
    memory = need.fixed + 7 * PAGE * TARGET.token_bytes + 8  # it is given in GB, a rounded number
    one = build(drafter, memory)
    assert drafter.cache.bytes <= need.fixed
    assert one.parts.kv.pages.count == 7  # type: ignore[attr-defined]


def test_wrappers_count_what_they_hold() -> None:
    model, copy = DRAFTERS["model"](), DRAFTERS["copy"]()
    both = model.cache_need(3, 250).token + copy.cache_need(3, 250).token
    joined = first_of(NGram(3), model, copy)
    assert joined.cache_need(3, 250) == gated(joined).cache_need(3, 250) == (0, both)  # type: ignore[attr-defined]
    alone, ahead = model.cache_need(3, 250), Ahead(ModelDrafter(small(), 4), 2).cache_need(3, 250)
    assert ahead == (alone.fixed + 3 * 2 * 2 * PAGE * alone.token, alone.token), (
        "two pages of each slot's premises are their own"
    )
    build(gated(joined), 9 * PAGE * (TARGET.token_bytes + both))
    assert model.cache.kv.pages.count == copy.cache.kv.pages.count == 9  # type: ignore[attr-defined]


def test_too_little_for_one_sequence_is_refused_by_name() -> None:
    with pytest.raises(CapacityError, match="a sequence of 253 tokens and the cache of the drafter 'model' need"):
        build(DRAFTERS["model"](), 4 * PAGE * TARGET.token_bytes)


def test_memory_that_is_short_is_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was asked for, and target and drafter could together fill more than there is."""
    drafter = DRAFTERS["model"]()
    each = TARGET.token_bytes + drafter.cache_need(3, 250).token
    for module in ("outrider.nn.shares", "outrider.nn.kv"):
        monkeypatch.setattr(f"{module}.available_memory", lambda device: int(8.5 * PAGE * each / 0.9))
    one = build(drafter, None)
    assert bytes_of(one.parts.kv) + bytes_of(drafter.cache.kv) <= 8.5 * PAGE * each

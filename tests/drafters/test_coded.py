"""The target over an 8-bit copy of its cache, and its first layers over a view: what is copied, declared and refused."""

from __future__ import annotations

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ahead import Ahead
from outrider.drafters.coded import CodedDrafter
from outrider.drafters.none import NoDraft
from outrider.drafters.registry import load_drafter
from outrider.drafters.sparse import Sparse, SparseDrafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.models.lean import LeanTarget
from outrider.models.toy import TableTarget, TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.covering import slow_beyond
from tests.drafters.drafting import evidence, view
from tests.models.test_native import SHAPES, random_weights, tokens

V = 13


def chain(length: int = 4, vocab: int = V) -> Levels:
    return Levels(levels((1,) * length), vocab)


def fed(target: TinyLM, n: int) -> tuple[CodedDrafter, list[int]]:
    """A drafter that may look at the `n` cached tokens of slot 1; the text."""
    drafter = CodedDrafter(target, chain())
    kv = target.new_kv(2, n + 30)
    drafter.bind(2, n + 30)
    drafter.borrow(kv)
    text = tokens(n + 1, V)
    rows = Rows.assemble([1], [text[:n]], [0], Draft.empty(0), [False])
    target.forward(rows, kv)
    kv.commit(rows, [()])
    return drafter, text


def test_the_copy_is_the_cache_in_codes_and_the_first_distribution_is_over_it() -> None:
    n, target = 40, TinyLM(V, sharp=3.0)
    drafter, text = fed(target, n)
    source = drafter.cache.source
    assert source is not None
    before = [t.clone() for t in source.entries(1, n)]
    draft = drafter.draft(evidence([view(text, slot=1, temperature=1.0)], V), [4])
    copy = drafter.cache.kv
    assert draft.counts == (4,) and draft.q is not None
    assert source.length == [0, n] and all(map(torch.equal, before, source.entries(1, n)))
    for mine, theirs in zip((copy.k, copy.v), before, strict=True):
        assert torch.equal(mine[:, :, copy.places(1, 0, n)], copy.stored.pack(theirs))
    coded = target.storing("int8")
    kv = coded.new_kv(1, n + 2)
    kv.make_room(0, n)
    kv.k[:, :, :n], kv.v[:, :, :n] = map(kv.stored.pack, before)
    kv.length[0] = n
    expected = torch.softmax(coded.forward(Rows.assemble([0], [[text[n]]], [n], Draft.empty(1)), kv).logits[0], -1)
    assert torch.allclose(draft.q.probs[0].double(), expected, atol=1e-6)


def test_what_was_drafted_is_replaced_by_what_the_target_wrote() -> None:
    """After a verification that kept two tokens the copy holds the target's entries, not those of the draft."""
    n, target = 20, TinyLM(V, sharp=3.0)
    drafter, text = fed(target, n)
    drafter.draft(evidence([view(text, slot=1)], V), [4])
    kv = drafter.cache.source
    assert kv is not None
    more = [text[n], 3, 5]
    rows = Rows.assemble([1], [more], [n], Draft.empty(0), [False])
    target.forward(rows, kv)
    kv.commit(rows, [()])
    drafter.draft(evidence([view([*text[:n], *more, 7], slot=1)], V), [4])
    copy = drafter.cache.kv
    found = copy.k[:, :, copy.places(1, 0, n + 3)]
    assert torch.equal(found, copy.stored.pack(kv.entries(1, n + 3)[0]))


def small(name: str = "plain") -> LeanTarget:
    config, extras = SHAPES[name]
    return LeanTarget(config, random_weights(config, extras, torch.bfloat16))


SPECS = (
    "sparse:int8",
    "tree:2x2x1:sparse:int8",
    "early:2:sparse:int8",
    "early:2:sparse:window:4+20",
    "early:2:sparse:pillar:64",
)


@pytest.mark.parametrize("spec", slow_beyond([(spec,) for spec in SPECS], [SPECS[:1], SPECS[-1:]]))
def test_the_lean_runtime_s_texts_are_those_of_plain_decoding(spec: str) -> None:
    """Several sequences, shared beginnings, more requests than slots, greedy and sampled, in the two runs of the same engine."""
    target = small()
    beginning = tokens(90, 100, seed=5)
    prompts = [[*beginning, 1], [*beginning[:70], 2], [3] * 80, [*beginning, 1, 7]]
    asked = [SamplingParams(temperature=i % 2, max_tokens=25, seed=i) for i in range(4)]

    def texts(drafter: object) -> list[tuple[int, ...]]:
        one = Engine(target, drafter, load_rule("match"), Fixed(3), slots=2, max_length=200)  # type: ignore[arg-type]
        found = [r.outputs[0].token_ids for _ in range(2) for r in one.generate(prompts, asked)]
        assert drafter.name == "none" or one.counts.accepted > 0  # type: ignore[attr-defined]
        return found

    assert texts(load_drafter(spec, target=target, length=3)) == texts(NoDraft())


def test_the_first_layers_read_the_target_s_own_cache() -> None:
    """Over all tokens (a view as long as the text) they draft what they draft over a cache of their own."""
    n, target = 30, TinyLM(V, layers=3, sharp=3.0)
    drafter = SparseDrafter(target.first_layers(2), Sparse("window", 1, n - 2), chain())
    own = load_drafter("greedy:early:2", target=target, length=4)
    drafter.growth = Levels(levels((1,) * 4), V, sample="greedy")
    kv = target.new_kv(1, 60)
    drafter.bind(1, 60), own.bind(1, 60)
    drafter.borrow(kv)
    text = tokens(n + 1, V)
    rows = Rows.assemble([0], [text[:n]], [0], Draft.empty(0), [False])
    target.forward(rows, kv)
    kv.commit(rows, [()])
    seen = evidence([view(text, slot=0)], V)
    entries = kv.entries(0, n)[0].clone()
    assert drafter.draft(seen, [4]).counts == (4,)
    assert torch.equal(entries, kv.entries(0, n)[0])
    whole = SparseDrafter(target.first_layers(2), Sparse("window", 0, n - 1), drafter.growth)
    whole.borrow(kv)
    whole.ranges = lambda view: ((0, n),)  # type: ignore[method-assign]
    assert torch.equal(whole.draft(seen, [4]).token, own.draft(seen, [4]).token)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: CodedDrafter(TableTarget.random(V, seed=1), chain()), CapabilityError, "keeps its cache in its own way"),
        (lambda: CodedDrafter(TinyLM(V).storing("int8"), chain()), CapabilityError, "is int8 already"),
        (lambda: Ahead(CodedDrafter(TinyLM(V), chain()), 2), CapabilityError, "only chains of a draft model"),
        (lambda: load_drafter("sparse:int4", target=TinyLM(V), length=3), ConfigError, "or 'sparse:int8', got 'sparse:int4'"),
        (lambda: load_drafter("early:1:window", target=TinyLM(V), length=3), ConfigError, "or over a view 'early:2:sparse"),
        (lambda: load_drafter("early:x", target=TinyLM(V), length=3), ConfigError, "an early exit is written"),
    ],
)  # fmt: skip
def test_refused(make, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_a_drafter_without_the_target_s_cache_says_so() -> None:
    drafter = CodedDrafter(TinyLM(V), chain())
    drafter.bind(1, 40)
    with pytest.raises(ConfigError, match=r"call borrow\(kv\)"):
        drafter.draft(evidence([view(tokens(9, V), slot=0)], V), [4])


def test_the_target_is_named() -> None:
    target: Target = TinyLM(V, layers=3)
    names = [load_drafter(s, target=target, length=3).name for s in ("sparse:int8", "early:2:sparse:window:4+8")]
    assert names == ["sparse:int8", "early:2:sparse:window"]

"""A drafter that fails costs drafts and no text: whatever it raises, wherever and whenever."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from outrider.build import Engine
from outrider.contained import Contained
from outrider.control.fixed import Fixed
from outrider.drafters.combine import first_of
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.engine.parts import Defect
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.types import Draft, Evidence, Proposal
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, params, target, tokens
from tests.contract.drafters import DRAFTERS, small
from tests.covering import slow_beyond

MODEL = target()


class Failing:
    """A drafter that raises when its dice say so: before it drafts, after it has drafted, or when it is to forget."""

    def __init__(self, inner, where: str, share: float, seed: int) -> None:
        self.inner, self.where, self.share = inner, where, share
        self.dice = torch.Generator().manual_seed(seed)
        self.name, self.layers, self.trees = inner.name, inner.layers, inner.trees
        self.max_nodes, self.max_depth = inner.max_nodes, inner.max_depth
        self.raised = 0

    def _maybe(self, where: str) -> None:
        if where == self.where and float(torch.rand((), generator=self.dice)) < self.share:
            self.raised += 1
            raise [RuntimeError("out of memory"), IndexError(3), KeyError("x"), ZeroDivisionError()][self.raised % 4]

    def bind(self, slots: int, length: int) -> None:
        self.inner.bind(slots, length)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        self._maybe("before")
        draft = self.inner.draft(evidence, budget)
        self._maybe("after")
        return draft

    def release(self, slots: Sequence[int]) -> None:
        self._maybe("release")
        self.inner.release(slots)


@cache
def plain(sampling: str) -> list[tuple[int, ...]]:
    return tokens(engine(MODEL, NoDraft(), load_rule("match"), 3).generate(PROMPTS, params(sampling)))


FAILURES = list(
    product(
        ("ngram", "model-coupled", "tree-coupled", "medusa-coupled", "early", "dflash"), ("before", "after", "release")
    )
)


@pytest.mark.parametrize(("name", "where"), slow_beyond(FAILURES, [FAILURES[3 * i + i % 3] for i in range(6)]))
def test_the_text_is_that_of_plain_decoding(name: str, where: str) -> None:
    for seed, share in ((1, 0.1), (2, 1.0)):
        failing = Failing(DRAFTERS[name](MODEL, 3), where, share, seed)
        one = engine(MODEL, failing, load_rule("match"), 3)
        got = tokens(one.generate(PROMPTS, params("top-p with penalties")))
        assert got == plain("top-p with penalties")
        assert one.drafter_faults == failing.raised <= one.defects
        assert one.scheduler.free == 3 and not one.busy
    assert failing.raised and any("switched off" in n and failing.name in n for n in one.notices)


def test_one_part_that_fails_leaves_the_others_their_say() -> None:
    failing = Failing(ModelDrafter(small(MODEL), 3), "before", 1.0, 3)
    one = engine(MODEL, first_of(failing, NGram(4, min_n=1)), load_rule("match"), 3)
    assert tokens(one.generate(PROMPTS, params("greedy"))) == plain("greedy")
    assert failing.raised == 3, "three strikes, and it is not asked any more"
    assert one.counts.accepted > 0 and one.drafter_faults == 3
    assert [n for n in one.notices if "'model'" in n and "'ngram'" not in n]


def spoil(**changes: Callable[[Draft], object]) -> Callable[[Draft], Draft]:
    return lambda d: replace(d, **{name: change(d) for name, change in changes.items()})


MALFORMED: dict[str, Callable[[Draft], Draft]] = {
    "a sequence too many": spoil(counts=lambda d: (*d.counts, 0)),
    "counts that do not add up": spoil(counts=lambda d: (d.counts[0] + 1, *d.counts[1:])),
    "a parent that comes later": spoil(parent=lambda d: (len(d.parent) - 1, *d.parent[1:])),
    "a neighbour's node as parent": spoil(
        parent=lambda d: (*d.parent[:-1], 0) if len(d.counts) > 1 else (0, *d.parent[1:])
    ),
    "tokens of another shape": spoil(token=lambda d: d.token.unsqueeze(1)),
    "rows that are not there": spoil(q=lambda d: Proposal(torch.ones(1, VOCAB) / VOCAB, (5,) * len(d.parent))),
    "too few rows": spoil(q=lambda d: Proposal(torch.ones(1, VOCAB) / VOCAB, ())),
    "a support outside": spoil(
        q=lambda d: Proposal(torch.ones(1, 2) / 2, (0,) * len(d.parent), torch.tensor([0, VOCAB + 3]))
    ),
    "another vocabulary": spoil(q=lambda d: Proposal(torch.ones(1, VOCAB + 2) / (VOCAB + 2), (0,) * len(d.parent))),
    "partly negative": spoil(
        q=lambda d: Proposal(
            torch.tensor([[-1.0, 2.0, *[0.0] * (VOCAB - 2)]], dtype=torch.float64), (0,) * len(d.parent)
        )
    ),
    "tokens that are no whole numbers": spoil(token=lambda d: d.token.double()),
    "tokens that are yes or no": spoil(token=lambda d: d.token > 0),
    "counts that are no whole numbers": spoil(counts=lambda d: tuple(float(n) for n in d.counts)),
    "laws of whole numbers": spoil(
        q=lambda d: Proposal(torch.eye(VOCAB, dtype=torch.int64)[d.token], tuple(range(len(d.parent))))
    ),
    "laws of complex numbers": spoil(
        q=lambda d: Proposal(torch.eye(VOCAB, dtype=torch.complex64)[d.token], tuple(range(len(d.parent))))
    ),
    "a support of fractions": spoil(
        q=lambda d: Proposal(torch.ones(1, 2) / 2, (0,) * len(d.parent), torch.tensor([0.0, 1.0]))
    ),
    "tokens without memory": spoil(token=lambda d: d.token.to("meta")),
    "laws without memory": spoil(q=lambda d: Proposal(torch.ones(1, VOCAB, device="meta"), (0,) * len(d.parent))),
    "nothing at all": lambda d: None,  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("how", list(MALFORMED))
def test_what_is_no_draft_is_not_used(how: str) -> None:
    inner = NGram(4, min_n=1)
    asked = inner.draft
    inner.draft = lambda e, b: MALFORMED[how](d) if (d := asked(e, b)).parent else d  # type: ignore[method-assign]
    one = engine(MODEL, inner, load_rule("speculative_sampling"), 3)
    assert tokens(one.generate(PROMPTS, params("greedy"))) == plain("greedy")
    assert one.defects > 0


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    "fault", [SystemExit(1), GeneratorExit(), CancelledError(), StopIteration(), MemoryError(), Speechless()]
)
@pytest.mark.parametrize("where", ["draft", "release"])
def test_whatever_is_raised_ends_no_request(fault: BaseException, where: str) -> None:
    """Also what is no Exception (a library that ends its program, a cancellation), and what has no words."""
    inner = NGram(4, min_n=1)

    def fail(*_: object) -> Draft:
        raise fault

    setattr(inner, where, fail)
    one = engine(MODEL, inner, load_rule("match"), 3)
    assert tokens(one.generate(PROMPTS, params("greedy"))) == plain("greedy")
    assert one.drafter_faults >= 3 and any(type(fault).__name__ in n for n in one.notices)


def test_an_interrupt_in_a_draft_is_an_interrupt() -> None:
    inner = NGram(4, min_n=1)
    asked = inner.draft

    def stop(*_: object) -> Draft:
        inner.draft = asked  # type: ignore[method-assign]
        raise KeyboardInterrupt

    inner.draft = stop  # type: ignore[method-assign]
    one = engine(MODEL, inner, load_rule("match"), 3)
    with pytest.raises(KeyboardInterrupt):
        one.generate(PROMPTS, params("greedy"))
    assert tokens(one.generate(PROMPTS, params("greedy"))) == plain("greedy") and not one.drafter_faults


def test_deeper_than_asked_is_no_draft() -> None:
    """A request's `draft_length`, the room that is left and the cache's slack are limits, not wishes."""
    inner = NGram(6, min_n=1)
    asked = inner.draft
    inner.draft = lambda e, b: asked(e, [6 if x else 0 for x in b])  # type: ignore[method-assign]
    one = Engine(MODEL, inner, load_rule("match"), Fixed(2), slots=2, max_length=40)
    free = [replace(p, max_tokens=60) for p in params("greedy")]
    honest = Engine(MODEL, NoDraft(), load_rule("match"), Fixed(0), slots=2, max_length=40)
    assert tokens(one.generate(PROMPTS, free)) == tokens(honest.generate(PROMPTS, free))
    assert one.drafter_faults > 0


def test_strikes_are_forgiven_slowly() -> None:
    """Three faults in a row switch a drafter off; one in a hundred does not."""
    calls = iter(range(10_000))

    class Rare(NoDraft):
        def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
            if next(calls) % 100 == 0:
                raise ValueError("now and then")
            return super().draft(evidence, budget)

    one = Engine(MODEL, NoDraft(), load_rule("match"), Fixed(2), slots=1)
    kept: list[Evidence] = []
    one.parts.drafter.draft = lambda e, b: kept.append(e) or Draft.empty(len(e.sequences))  # type: ignore[method-assign]
    one.generate([[1, 2]], SamplingParams(max_tokens=4))
    rare = Contained(Rare())
    for _ in range(1000):
        rare.draft(kept[0], [2])
    assert rare.faults == 10 and not rare.off and not rare.notices


@pytest.mark.parametrize("rule", ["match", "speculative_sampling", "block"])
def test_a_draft_model_that_does_not_know_every_token(rule: str) -> None:
    """The target has three tokens more than the draft's embedding, and the text is full of them: no fault, the same text."""
    draft = TinyLM(VOCAB - 3, 16, 1, seed=11, sharp=2.0)
    for branching in (None, (2, 1, 1)) if rule != "block" else (None,):
        made = ModelDrafter(
            draft, 3, vocab_size=VOCAB, branching=branching, sample="coupled" if rule == "match" else "sampled"
        )
        one = engine(MODEL, made, load_rule(rule), 3, eos=())
        likes = {"logit_bias": {VOCAB - 1: 3.0, VOCAB - 2: 3.0}, "temperature": 1.0 if rule == "match" else 0.0}
        prompts = [[*p, VOCAB - 1, VOCAB - 3] for p in PROMPTS]
        wanted = [replace(p, **likes) for p in params("greedy")]
        plainly = engine(MODEL, NoDraft(), load_rule("match"), 3, eos=()).generate(prompts, wanted)
        assert tokens(one.generate(prompts, wanted)) == tokens(plainly)
        assert any(t >= VOCAB - 3 for text in tokens(plainly) for t in text)
        assert one.drafter_faults == 0 and one.counts.proposed > 0


@pytest.mark.parametrize("where", ["before", "release"])
def test_a_listener_that_fails_ends_no_request_and_keeps_no_slot(where: str) -> None:
    heard: list[str] = []

    def listen(defect: Defect) -> None:
        heard.append(defect.kind)
        raise RuntimeError("the listener")

    failing = Failing(DRAFTERS["ngram"](MODEL, 3), where, 1.0, 1)
    one = Engine(
        MODEL, failing, load_rule("match"), Fixed(4), slots=3, max_length=64, chunk=5, eos=(1,), on_defect=listen
    )
    assert tokens(one.generate(PROMPTS, params("top-p with penalties"))) == plain("top-p with penalties")
    assert heard == ["drafter"] * one.defects and heard
    assert one.scheduler.free == 3 and not one.busy

"""EX-8, EX-10, EX-12: the state after any history equals a fresh one; seeds decide, nothing else does; nothing leaks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.build import Engine
from outrider.drafters.none import NoDraft
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, params, target, tokens
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets

MODEL = target()


def fresh_kv(model: TinyLM, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `text` from one forward into an empty cache."""
    kv = model.new_kv(1, len(text) + 1)
    rows = Rows.assemble([0], [text], [0], Draft.empty(0), [False])
    model.forward(rows, kv)
    return kv.entries(0, len(text))


@pytest.mark.parametrize("drafter", [n for n in DRAFTERS if n != "none"])
def test_the_cache_after_every_step_is_that_of_a_fresh_run(drafter: str) -> None:
    """EX-8, with a random depth per step, 0 included."""
    g = torch.Generator().manual_seed(1)
    one = Engine(
        MODEL,
        DRAFTERS[drafter](MODEL, 2),
        load_rule("speculative_sampling"),
        Budgets(lambda s: int(torch.randint(0, 5, (1,), generator=g))),
        slots=2,
        max_length=64,
        chunk=5,
    )
    for prompt, p in zip(PROMPTS[:2], params("temperature 1"), strict=False):
        one.submit(prompt, p)
    while one.busy:
        one.step()
        for s in one.scheduler.running:
            assert one.parts.kv.length[s.slot] == s.cached
            if not s.cached:
                continue  # admitted, its first chunk not yet fed
            k, v = fresh_kv(MODEL, s.tokens[: s.cached])
            torch.testing.assert_close(one.parts.kv.entries(s.slot, s.cached), (k, v), rtol=0, atol=1e-10)


def test_a_model_that_drafts_for_itself_is_never_rejected() -> None:
    """EX-8: acceptance exactly 1, at temperature 1, over hundreds of steps."""
    from outrider.drafters.model.drafter import ModelDrafter

    one = engine(MODEL, ModelDrafter(MODEL, depth=4), load_rule("speculative_sampling"), 2, eos=())
    p = [SamplingParams(temperature=1.0, max_tokens=40, seed=i) for i in range(20)]
    one.generate([[1 + i % 5, 2] for i in range(20)], p)
    assert one.counts.proposed > 500
    assert one.counts.rejected == 0
    assert one.counts.risk < 1e-9


@pytest.mark.parametrize("name", ["none", "model"])
def test_seeds_decide_and_nothing_else(name: str) -> None:
    """EX-10: the same seed gives the same tokens in any company and after preemption; no seed gives two different ones."""
    build = lambda slots: engine(MODEL, DRAFTERS[name](MODEL, slots), load_rule("speculative_sampling"), slots, eos=())  # noqa: E731
    p = SamplingParams(temperature=1.0, max_tokens=16, seed=7)
    alone = tokens(build(1).generate([PROMPTS[1]], p))[0]
    crowd = build(3)
    ids = [crowd.submit(PROMPTS[i % 6], SamplingParams(temperature=1.3, max_tokens=9 + i, seed=i)) for i in range(5)]
    mine = crowd.submit(PROMPTS[1], p)
    got: list[int] = []
    step = 0
    while crowd.busy:
        for event in crowd.step():
            if event.request == mine:
                got += event.tokens
        step += 1
        if step in (9, 21, 40):  # far enough apart for the prompt to be fed again in between
            crowd.preempt(mine)
        if step == 3:
            crowd.abort(ids[1])
    if name == "none":  # with a draft, a preemption moves where steps begin, which only `match` is blind to
        assert tuple(got) == alone
    other = build(1).generate([PROMPTS[1]] * 2, SamplingParams(temperature=1.0, max_tokens=16))
    assert tokens(other)[0] != tokens(other)[1]


def test_match_survives_preemption_with_a_draft() -> None:
    p = SamplingParams(temperature=1.0, max_tokens=24, seed=7)
    alone = tokens(engine(MODEL, NoDraft(), load_rule("match"), 1, eos=()).generate([PROMPTS[1]], p))[0]
    one = engine(MODEL, DRAFTERS["model"](MODEL, 2), load_rule("match"), 2, eos=())
    name, got = one.submit(PROMPTS[1], p), []
    while one.busy:
        events = one.step()
        got += [t for e in events for t in e.tokens]
        if events and not events[-1].finish_reason:
            one.preempt(name)  # after every step that emits: the whole text is fed again each time
    assert tuple(got) == alone


def test_samples_of_one_request_differ() -> None:
    one = engine(MODEL, NoDraft(), load_rule("speculative_sampling"), 4, eos=())
    result = one.generate([PROMPTS[1]], SamplingParams(temperature=1.0, max_tokens=16, seed=7, n=4))[0]
    assert len({o.token_ids for o in result.outputs}) == 4


class EngineFuzz(RuleBasedStateMachine):
    """EX-12: add, step, abort, preempt in any order; slots, caches and outputs stay consistent with a plain oracle."""

    @initialize(slots=st.integers(1, 4), drafter=st.sampled_from(["none", "ngram", "model", "tree-iid"]))
    def build(self, slots: int, drafter: str) -> None:
        name = drafter if drafter in DRAFTERS else "model"
        self.slots = slots
        self.depth = 3
        self.engine = Engine(
            MODEL,
            DRAFTERS[name](MODEL, slots),
            load_rule("match"),
            Budgets(lambda s: self.depth),
            slots=slots,
            max_length=40,
            chunk=4,
        )
        self.expected: dict[str, tuple[list[int], SamplingParams]] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=11),
        n=st.integers(1, 12),
        seed=st.integers(0, 99),
        hot=st.booleans(),
    )
    def add(self, prompt: list[int], n: int, seed: int, hot: bool) -> None:
        p = SamplingParams(temperature=float(hot), max_tokens=n, seed=seed)
        name = self.engine.submit(prompt, p)
        self.expected[name], self.got[name] = (prompt, p), []

    @rule()
    def step(self) -> None:
        for event in self.engine.step():
            self.got[event.request] += event.tokens
            if event.finish_reason:
                self.ended[event.request] = event.finish_reason

    @rule(depth=st.integers(0, 4))
    def change_depth(self, depth: int) -> None:
        self.depth = depth

    @precondition(lambda self: self.got)
    @rule(data=st.data(), preempt=st.booleans())
    def disturb(self, data: st.DataObject, preempt: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.got)))
        if preempt:
            self.engine.preempt(name)
        elif self.engine.abort(name):
            del self.got[name], self.expected[name]

    @invariant()
    def slots_are_owned_once(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler, kv = self.engine.scheduler, self.engine.parts.kv
        owned = [s.slot for s in scheduler.running]
        assert len(set(owned)) == len(owned)
        assert len(owned) + scheduler.free == self.slots
        for slot in set(range(self.slots)) - set(owned):
            assert kv.length[slot] == 0
        for s in scheduler.running:
            assert kv.length[s.slot] == s.cached < len(s.tokens)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.busy:
            self.step()
        assert self.engine.scheduler.free == self.slots
        oracle = Engine(MODEL, NoDraft(), load_rule("match"), Budgets(lambda s: 0), slots=1, max_length=40)
        for name, (prompt, p) in self.expected.items():
            assert self.got[name] == list(oracle.generate([prompt], p)[0].outputs[0].token_ids)


TestEngineFuzz = EngineFuzz.TestCase
TestEngineFuzz.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)

"""The engine's surface: requests in, events out, log-probabilities, errors, and what is freed when."""

from __future__ import annotations

import pytest
import torch

from outrider.build import Engine
from outrider.drafters.none import NoDraft
from outrider.engine.sequence import Event
from outrider.errors import CapabilityError, ConfigError, RequestError
from outrider.models.toy import TableTarget, TinyLM
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, target
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets

MODEL = target()


def drafted(capacity: int = 2, **more) -> Engine:
    return engine(
        MODEL, DRAFTERS["model"](MODEL, capacity), load_rule("speculative_sampling"), capacity, eos=(), **more
    )


def test_events_add_up_to_the_result() -> None:
    p = SamplingParams(temperature=1.0, max_tokens=20, seed=3)
    whole = drafted().generate([PROMPTS[1]], p)[0].outputs[0]
    events = list(drafted().stream(PROMPTS[1], p))
    assert tuple(t for e in events for t in e.tokens) == whole.token_ids
    assert tuple(o for e in events for o in e.origins) == whole.origins
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "length"
    assert all(set(e.origins[:-1]) <= {"accepted"} for e in events)


def test_leaving_a_stream_frees_its_slot() -> None:
    one = drafted()
    for _ in one.stream(PROMPTS[1], SamplingParams(max_tokens=20)):
        break
    assert one.scheduler.free == 2
    assert not one.busy


def test_abort_while_waiting_and_while_running() -> None:
    one = drafted(1)
    names = [one.submit(PROMPTS[1], SamplingParams(max_tokens=30)) for _ in range(3)]
    for _ in range(8):
        one.step()
    assert one.abort(names[2])
    assert one.abort(names[0])
    assert not one.abort(names[0])
    left = {e.request for e in one.run()}
    assert left == {names[1]}
    assert one.scheduler.free == 1


def test_logprobs_are_those_of_a_fresh_forward() -> None:
    """Read off the verification pass, for accepted, corrected and bonus tokens alike."""
    p = SamplingParams(temperature=0.8, max_tokens=16, seed=5, logprobs=3, frequency_penalty=0.5)
    out = drafted().generate([PROMPTS[3]], p)[0].outputs[0]
    assert "accepted" in out.origins
    assert len(out.logprobs) == 16
    text = [*PROMPTS[3], *out.token_ids]
    kv = MODEL.new_kv(1, len(text))
    for i, entry in enumerate(out.logprobs):
        end = len(PROMPTS[3]) + i
        rows = Rows.assemble([0], [text[:end]], [0], Draft.empty(1))
        want = torch.log_softmax(MODEL.forward(rows, kv).logits[0], -1)
        assert entry.token == text[end]
        assert entry.logprob == pytest.approx(float(want[text[end]]), abs=1e-6)
        assert [v for _, v in entry.top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-6)


def test_counts_balance_and_sinks_see_every_step() -> None:
    records: list = []
    one = Engine(
        MODEL,
        DRAFTERS["model"](MODEL, 3),
        load_rule("speculative_sampling"),
        Budgets(lambda s: 4),
        slots=3,
        sinks=(records.append,),
    )
    results = one.generate(PROMPTS, SamplingParams(temperature=1.0, max_tokens=15, seed=1))
    c = one.counts
    assert c.emitted == sum(len(o.token_ids) for r in results for o in r.outputs)
    assert c.judged == c.accepted + c.dropped + c.rejected
    assert c.emitted == c.tokens
    assert len(records) == one.steps
    assert sum(r.counts.emitted for r in records) == c.emitted
    assert sum(o.counts.steps for r in results for o in r.outputs) == c.steps
    for phase, total in one.seconds.items():
        assert total == pytest.approx(sum(r.seconds[phase] for r in records))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [([], "empty"), ([VOCAB], "vocabulary"), ([-1], "vocabulary"), ([1] * 64, "shorten it"), ("text", "tokenizer")],
)
def test_requests_that_cannot_be_served(prompt, word: str) -> None:
    one = drafted()
    with pytest.raises(RequestError, match=word):
        one.submit(prompt)
    assert not one.busy


def test_names_are_unique_while_running() -> None:
    one = drafted()
    one.submit([1, 2], request="mine")
    with pytest.raises(RequestError, match="already running"):
        one.submit([1, 2], request="mine")


def test_one_set_of_parameters_or_one_each() -> None:
    with pytest.raises(RequestError, match="2 prompts but 3"):
        drafted().generate([[1], [2]], [SamplingParams()] * 3)


class _Chains(TableTarget):
    trees = False


class _Recurrent(TableTarget):
    rewinds = False


def test_parts_that_do_not_fit_are_refused_when_the_engine_is_built() -> None:
    logits = torch.zeros(VOCAB, VOCAB)
    build = lambda model, name: Engine(  # noqa: E731
        model, DRAFTERS[name](MODEL, 1), load_rule("speculative_sampling"), Budgets(lambda s: 1), slots=1, max_length=32
    )
    with pytest.raises(CapabilityError, match="use a chain"):
        build(_Chains(logits), "tree-iid")
    with pytest.raises(CapabilityError, match="'none'"):
        build(_Recurrent(logits), "ngram")
    build(_Recurrent(logits), "none")


def test_a_lossy_rule_needs_consent() -> None:
    class Lossy:
        name, lossless, trees, lane, tv_limit = "lossy", False, False, "draft", 1.0

        def __call__(self, p, draft, noise, allowance=None):
            raise AssertionError

    with pytest.raises(CapabilityError, match="allow_lossy"):
        Engine(MODEL, NoDraft(), Lossy(), Budgets(lambda s: 0), slots=1)


def test_unknown_engine_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_length"):
        Engine.build(target=TinyLM(8, 8, 1, seed=0), draft="none", max_lenght=10)


def test_an_engine_on_ids_alone() -> None:
    one = Engine.build(target=TinyLM(8, 8, 1, seed=0), draft="ngram", slots=1, max_length=32)
    out = one.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0]
    assert len(out.token_ids) == 8
    assert out.text == ""


def test_what_goes_on_is_delivered_before_the_draft_and_what_ends_with_the_step() -> None:
    """The first half of a step hands out its events; a request aborted there is drafted for no more."""
    running = drafted(capacity=3)
    names = [running.submit(PROMPTS[i], SamplingParams(max_tokens=6 + 5 * i, seed=i)) for i in range(3)]
    early, asked, right = list[Event](), list[int](), running.parts.drafter.draft

    def draft(evidence, budget):
        asked.append(len(evidence.sequences))
        return right(evidence, budget)

    def deliver(events: list[Event]) -> None:
        early[:] = events
        if any(e.request == names[2] and e.tokens for e in events):
            running.abort(names[2])

    running.parts.drafter.draft = draft  # type: ignore[method-assign]
    ended = set[str]()
    while running.busy:
        events = running.step(deliver)
        assert early == [e for e in events if e.finish_reason is None]
        ended |= {e.request for e in events if e.finish_reason is not None}
    assert ended == set(names[:2])
    assert max(asked) == 2, "the third was gone before the first draft with all of them"


def test_an_engine_is_warmed_up_before_its_first_request_and_nobody_is_told() -> None:
    told: list[object] = []
    one = drafted(sinks=(told.append,))
    one.warm_up()
    assert not told and one.steps == 0 and one.counts.emitted == 0 and one.scheduler.free == 2
    p = SamplingParams(temperature=1.0, max_tokens=20, seed=3)
    name = one.submit(PROMPTS[1], p)
    (sequence,) = one.sequences(name)
    for _ in range(6):
        one.step()
    with pytest.raises(RequestError, match="before the first"):
        one.warm_up()
    list(one.run())
    assert tuple(sequence.output) == drafted().generate([PROMPTS[1]], p)[0].outputs[0].token_ids


def test_a_controller_may_learn() -> None:
    weight = torch.zeros((), requires_grad=True)

    def depth(_: object) -> int:
        (weight * torch.ones(())).backward()
        return 2

    one = Engine(
        MODEL, DRAFTERS["model"](MODEL, 2), load_rule("speculative_sampling"), Budgets(depth), slots=2, max_length=64
    )
    one.generate([PROMPTS[0]], SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
    assert one.defects == 0 and weight.grad is not None and one.counts.proposed > 0

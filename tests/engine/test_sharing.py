"""One engine in several hands: streams side by side, threads, forks, aborts in the middle, and watchers that raise."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from outrider.build import Engine
from outrider.drafters.none import NoDraft
from outrider.engine.sequence import Event
from outrider.engine.turns import Turns
from outrider.errors import CapabilityError, RequestError
from outrider.params import SamplingParams
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, engine, target
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets

MODEL = target()
PARAMS = [SamplingParams(temperature=1.0, max_tokens=18, seed=i) for i in range(len(PROMPTS))]


def drafted(capacity: int = 3, **more) -> Engine:
    return engine(MODEL, DRAFTERS["model-coupled"](MODEL, capacity), load_rule("match"), capacity, eos=(), **more)


def alone(i: int) -> tuple[int, ...]:
    one = engine(MODEL, NoDraft(), load_rule("match"), 1, eos=())
    return one.generate([PROMPTS[i]], [PARAMS[i]])[0].outputs[0].token_ids


def text(events: list[Event]) -> tuple[int, ...]:
    return tuple(t for e in events for t in e.tokens)


def test_streams_side_by_side_are_whole() -> None:
    """Three open streams read in turn, a `generate` and a `run` in the middle: nobody loses a token."""
    one = drafted()
    streams = [one.stream(PROMPTS[i], PARAMS[i]) for i in range(3)]
    got = [[next(s)] for s in streams]
    assert one.generate([PROMPTS[3]], [PARAMS[3]])[0].outputs[0].token_ids == alone(3)
    name = one.submit(PROMPTS[4], PARAMS[4])
    ran = list(one.run())
    assert text([e for e in ran if e.request == name]) == alone(4)
    for events, stream in zip(got, streams, strict=True):
        events += stream
    assert [text(events) for events in got] == [alone(i) for i in range(3)]
    assert all(events[-1].finish_reason == "length" for events in got)
    assert one.scheduler.free == 3 and not one.busy and not one.state.readers


def test_a_stream_that_is_dropped_disturbs_nobody() -> None:
    one = drafted(2)
    left, kept = one.stream(PROMPTS[0], PARAMS[0]), one.stream(PROMPTS[1], PARAMS[1])
    first = [next(kept)]
    next(left)
    left.close()
    assert one.scheduler.free == 1
    never = one.stream(PROMPTS[2], PARAMS[2])
    del never
    gc.collect()
    assert text(first + list(kept)) == alone(1)
    assert one.scheduler.free == 2 and not one.busy


def test_a_request_that_somebody_aborts_ends_its_stream_and_its_generate() -> None:
    """From outside between two steps, and from a sink inside one."""

    def killer(record: object) -> None:
        if one.steps > 6:
            for name in list(one.state.live):
                one.abort(name)

    one = drafted(2, sinks=(killer,))
    stream = one.stream(PROMPTS[0], PARAMS[0])
    seen = [next(stream)]
    assert one.abort(seen[0].request)
    assert list(stream) == [] and one.scheduler.free == 2

    output = one.generate([PROMPTS[0]], [SamplingParams(max_tokens=40, seed=1)])[0].outputs[0]
    assert output.finish_reason == "abort" and one.scheduler.free == 2


def test_an_abort_within_a_forward_waits_for_its_end() -> None:
    """As when the collector finds a stream in the middle of a step: rows on their way belong to their slot."""
    one = drafted(2)
    names = [one.submit(PROMPTS[i], PARAMS[i]) for i in range(2)]
    inner = one.parts.target.forward
    done = []

    def forward(*args, **more):
        if one.steps == 2 and not done:
            done.append(one.abort(names[0]))
        return inner(*args, **more)

    MODEL.forward = forward  # type: ignore[method-assign]
    try:
        events = list(one.run())
    finally:
        del MODEL.forward  # type: ignore[misc]
    assert done == [True]
    assert text([e for e in events if e.request == names[1]]) == alone(1)
    assert one.scheduler.free == 2 and one.parts.kv.length == [0, 0]


def test_threads_take_turns() -> None:
    """Four threads, streams and lists, on two slots: each gets its own text, whoever makes the steps."""
    one = drafted(2)
    wanted = [alone(i) for i in range(4)]
    wrong: list[object] = []

    def work(i: int) -> None:
        for again in range(3):
            if again % 2:
                got = text(list(one.stream(PROMPTS[i], PARAMS[i])))
            else:
                got = one.generate([PROMPTS[i]], [PARAMS[i]])[0].outputs[0].token_ids
            if got != wanted[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)
    assert one.scheduler.free == 2 and not one.busy


def test_turns_come_in_the_order_of_asking_and_nest() -> None:
    turns, order, ready = Turns(), list[int](), threading.Event()
    threads = []

    def take(i: int) -> None:
        ready.set()
        with turns, turns:
            order.append(i)

    with turns:
        for i in range(4):
            ready.clear()
            threads.append(threading.Thread(target=take, args=(i,)))
            threads[-1].start()
            assert ready.wait(10)
            while turns.waiting <= i:
                threads[-1].join(0.001)
    for t in threads:
        t.join(10)
    assert order == [0, 1, 2, 3]
    with turns:
        pass


def test_no_step_within_a_step() -> None:
    said: list[str] = []

    def again(record: object) -> None:
        try:
            one.generate([PROMPTS[1]], [PARAMS[1]])
        except RequestError as error:
            said.append(str(error))

    one = drafted(2, sinks=(again,))
    assert one.generate([PROMPTS[0]], [PARAMS[0]])[0].outputs[0].token_ids == alone(0)
    assert said and "in the middle of a step" in said[0]
    assert one.scheduler.free == 2 and not one.busy


def _in_a_fork(work: Callable[[], object], answer) -> None:
    try:
        work()
        answer.send("worked")
    except CapabilityError as error:
        answer.send(str(error))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, and a new one: the threads that compute are not in a fork, and waiting for them would hang. Where one thread
    computes there are none to wait for: a new engine works."""
    one = drafted(2)
    one.generate([PROMPTS[0]], [PARAMS[0]])
    fork = multiprocessing.get_context("fork")
    used = (lambda: one.generate([PROMPTS[0]], [PARAMS[0]]), lambda: list(one.stream([1], PARAMS[0])))
    new = lambda: drafted(2).generate([PROMPTS[0]], [PARAMS[0]])  # noqa: E731
    for work, threads, said in (*((w, 1, "'spawn'") for w in used), (new, 2, "'spawn'"), (new, 1, "worked")):
        monkeypatch.setattr("outrider.engine.turns.torch.get_num_threads", lambda n=threads: n)
        here, there = fork.Pipe()
        child = fork.Process(target=_in_a_fork, args=(work, there))
        child.start()
        assert here.poll(20), "the child hangs"
        assert said in here.recv()
        child.join(20)
        assert child.exitcode == 0
    assert one.generate([PROMPTS[0]], [PARAMS[0]])[0].outputs[0].token_ids == alone(0)


def test_a_name_is_taken_until_its_last_sample_has_ended() -> None:
    one = drafted(2)
    one.submit(PROMPTS[0], SamplingParams(n=2, max_tokens=30, seed=1, ignore_eos=True), request="mine")
    one.step()
    one.state.forget(one.sequences("mine")[0])  # as if its first sample had ended
    with pytest.raises(RequestError, match="already running"):
        one.submit(PROMPTS[1], request="mine")
    assert one.submit(PROMPTS[1], request="request-1") == "request-1"
    assert one.submit(PROMPTS[1]) != "request-1"


def test_a_list_with_a_bad_prompt_leaves_nothing_behind() -> None:
    one = drafted(2)
    with pytest.raises(RequestError, match="vocabulary"):
        one.generate([PROMPTS[0], [10**6]], PARAMS[:2])
    assert not one.busy


def test_a_sink_and_a_controller_that_raise_end_nobody() -> None:
    """Counted, told once, and a sink that goes on raising gets no more records; the others do."""
    records: list[object] = []

    def full(record: object) -> None:
        raise OSError("no space left on device")

    class Broken(Budgets):
        def budget(self, sequences):
            raise ValueError("no idea")

    one = Engine(
        MODEL, NoDraft(), load_rule("match"), Broken(lambda s: 3), slots=2, max_length=64, sinks=(full, records.append)
    )
    assert one.generate([PROMPTS[0]], [PARAMS[0]])[0].outputs[0].token_ids == alone(0)
    assert len(records) == one.steps
    assert one.defects >= 3 + one.steps - 1
    assert sum("no space left" in n for n in one.notices) == 1 and sum("no idea" in n for n in one.notices) == 1


def test_a_step_that_fails_leaves_an_engine_that_goes_on() -> None:
    """The target raises once: the draft of that step is gone, and the text is what it would have been."""
    one = drafted(2)
    inner, calls = MODEL.forward, iter(range(1000))

    def forward(rows, kv, **more):
        if kv is one.parts.kv and next(calls) == 4:
            raise MemoryError("once")
        return inner(rows, kv, **more)

    name = one.submit(PROMPTS[0], PARAMS[0])
    got: list[Event] = []
    MODEL.forward = forward  # type: ignore[method-assign]
    try:
        while one.busy:
            with suppress(MemoryError):
                got += one.step()
    finally:
        del MODEL.forward  # type: ignore[misc]
    assert text([e for e in got if e.request == name]) == alone(0)


class _Picky:
    """A tokenizer that cannot decode one of its tokens."""

    def encode(self, text: str) -> list[int]:
        return [1]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        if 7 in ids:
            raise UnicodeError("token 7")
        return "".join(chr(97 + t) for t in ids)


def test_a_text_that_cannot_be_decoded_is_its_own_requests_trouble() -> None:
    one = Engine(MODEL, NoDraft(), load_rule("match"), Budgets(lambda s: 0), slots=2, max_length=64, tokenizer=_Picky())
    bad = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={7: 100.0})
    good = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={7: -100.0})
    first, second = (r.outputs[0] for r in one.generate([[1, 2], [1, 3]], [bad, good]))
    assert first.finish_reason == "error" and first.error and "tokenizer" in first.error and first.token_ids == ()
    assert second.finish_reason == "length" and len(second.token_ids) == 9

"""Draft lengths on steps as vLLM's scheduler sees them, and the scheduler on a stub of vLLM's."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.integrations.vllm import lengths
from outrider.integrations.vllm.lengths import PAUSE, WINDOW, LiveLengths, Request, SeenStep
from outrider.integrations.vllm.scheduler import NOTE, LiveScheduling
from tests.integrations.vllm_stubs import config


def within(draw: random.Random) -> float:
    return draw.uniform(0.95, 1.05)


def drive(
    control: LiveLengths,
    cost: Callable[[int, int], float],
    accept: float,
    load: int,
    steps: int,
    noise: Callable[[random.Random], float] = within,
) -> list[int]:
    """Steps of `load` sequences: cost(verified, drafted) seconds with noise, tokens accepted with this probability each."""
    draw, used, before = random.Random(steps), list[int](), 0
    for _ in range(steps):
        now = control.next(load)
        accepted = []
        for _ in range(load):
            n = 0
            while n < before and draw.random() < accept:
                n += 1
            accepted.append(n)
        control.saw(SeenStep(load, before, now, False, cost(before, now) * noise(draw), accepted))
        used.append(now)
        before = now
    return used


def share(used: list[int], length: int) -> float:
    last = used[-500:]
    return sum(x == length for x in last) / len(last)


def test_it_finds_plain_decoding_where_drafts_lose_and_long_drafts_where_they_gain() -> None:
    dear = lambda verified, drafted: 1.0 + 0.6 * drafted + 0.1 * verified  # noqa: E731
    cheap = lambda verified, drafted: 1.0 + 0.02 * drafted + 0.01 * verified  # noqa: E731
    assert share(drive(LiveLengths(4, 4), dear, 0.5, 1, 3000), 0) > 0.85
    assert share(drive(LiveLengths(2, 4), cheap, 0.9, 1, 3000), 4) > 0.85


def test_drafting_and_verifying_in_one_step_do_not_mislead_it() -> None:
    """All of the cost is in drafting: a controller that charged a step to the length it verified would see no difference."""
    used = drive(LiveLengths(4, 4), lambda verified, drafted: 1.0 + (2.0 if drafted else 0.0), 0.4, 2, 3000)
    assert share(used, 0) > 0.85


def test_a_length_that_is_5_percent_faster_is_found_though_single_steps_vary_by_4() -> None:
    """The speeds of eight sequences inside vLLM: 3 is the best, and it begins with 4. Two pairs in three show the margin
    of 3%; seven in ten were asked once, and half of these runs stayed with 4."""
    accept, speeds = 0.79, (1.0, 1.15, 1.18, 1.2, 1.14)
    tokens = [sum(accept**i for i in range(n + 1)) for n in range(5)]
    more = [t / s - 1.0 for t, s in zip(tokens, speeds, strict=True)]
    cost = lambda verified, drafted: 1.0 + (more[verified] + more[drafted]) / 2  # noqa: E731
    noise = lambda draw: draw.gauss(1.0, 0.04)  # noqa: E731
    found = [share(drive(LiveLengths(4, 4), cost, accept, 8, 6000 + n, noise), 3) > 0.85 for n in range(8)]
    assert sum(found) >= 7


def test_each_load_has_its_own_length() -> None:
    control = LiveLengths(3, 3)
    cost = lambda load: lambda verified, drafted: 1.0 + (0.02 if load == 1 else 1.0) * drafted  # noqa: E731
    for _ in range(12):
        few, many = (drive(control, cost(load), 0.8, load, 400) for load in (1, 8))
    assert sum(few) / len(few) > 2.3 and sum(many) / len(many) < 0.4


def test_texts_are_told_apart_beyond_the_names_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is given twice would take two texts for one."""
    monkeypatch.setattr(lengths, "NAMES", 3)
    control, slots = LiveLengths(2, 2), dict[str, set[int]]()
    observe = control.control.observe
    monkeypatch.setattr(control.control, "observe", lambda record: (seen.append(record.each), observe(record)))
    seen = list[Any]()
    for text in "abcdefgh":
        for _ in range(12):
            now = control.next(1)
            control.saw(SeenStep(1, now, now, False, 1.0, [0], [text]))
        slots[text] = {one.slot for each in seen for one in each}
        seen.clear()
    every = [slot for mine in slots.values() for slot in mine]
    assert all(slots.values()) and len(set(every)) >= len(slots)


def test_a_load_that_comes_for_a_step_at_a_time_does_what_its_neighbour_found() -> None:
    """Two of eight sequences end together, and two others follow a step later: there the first length would be drafted for ever."""
    control, dear = LiveLengths(4, 4), lambda verified, drafted: 1.0 + 0.6 * drafted + 0.1 * verified
    drive(control, dear, 0.3, 8, 1500)
    assert control.next(8) == 0
    few = list[int]()
    for _ in range(20):
        few += drive(control, dear, 0.3, 6, 1)
        drive(control, dear, 0.3, 8, 6)
    assert set(few) == {0}


def test_a_load_that_comes_for_a_few_steps_at_a_time_is_spared_trials_that_it_could_not_end() -> None:
    """A batch ends raggedly: of its last sequences every few steps one is gone."""
    control, cost = LiveLengths(4, 4), lambda verified, drafted: 1.0 + 0.02 * drafted + 0.01 * verified
    while set(drive(control, cost, 0.8, 6, 14)) == {4}:
        pass  # until a trial is under way
    tail = list[int]()
    for _ in range(100):
        drive(control, cost, 0.8, 8, 20)
        tail += drive(control, cost, 0.8, 6, 3)
    assert set(tail) == {4}


def test_steps_that_cannot_be_compared_are_not_counted() -> None:
    control = LiveLengths(2, 4)
    length = control.next(1)
    for step in (
        SeenStep(1, length, length, True, 1.0, [1]),  # it read prompts
        SeenStep(1, length, length, False, None, [1]),  # the engine had been idle
        SeenStep(1, 0, length, False, 1.0, [0]),  # it verified another length
        SeenStep(3, length, length, False, 1.0, [1, 1, 1]),  # another load
    ):
        for _ in range(50):
            control.saw(step)
    assert control.control.tokens_per_step(2) == LiveLengths(2, 4).control.tokens_per_step(2), "nothing was learnt"


def test_a_request_whose_drafts_collapse_is_left_alone_for_a_while() -> None:
    one = Request()
    for _ in range(WINDOW):
        assert one.cut(4) == 4
        one.saw(4, 0)
    assert [one.cut(4) for _ in range(PAUSE + 1)] == [0] * PAUSE + [4]
    assert Request(most=1).cut(4) == 1 and Request(most=0).cut(4) == 0


# ----------------------------------------------------------------- the scheduler on a stub
class Stub:
    """As much of vLLM's synchronous scheduler as ours touches."""

    def __init__(self, own: Any, table: bool = True) -> None:
        self.vllm_config, self.num_spec_tokens = own, 4
        self.dynamic_sd_lookup = [4] * 5 if table else None
        self.requests = {n: SimpleNamespace(spec_token_ids=[], sampling_params=None) for n in "abcd"}
        self.running, self.drafts = [], {}

    def schedule(self) -> Any:
        names = list(self.running)
        length = self.dynamic_sd_lookup[len(names)] if self.dynamic_sd_lookup else 4
        drafts = {n: self.drafts[n] for n in names if self.drafts.get(n)}
        count = {n: 1 + len(drafts.get(n, ())) for n in names}
        return SimpleNamespace(
            num_scheduled_tokens=count,
            total_num_scheduled_tokens=sum(count.values()),
            scheduled_spec_decode_tokens=drafts,
            num_spec_tokens_to_schedule=length,
        )

    def update_from_output(self, out: Any, result: Any) -> str:
        return "vllm's"

    def update_draft_token_ids(self, drafts: Any) -> None:
        self.drafts = dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=True))


class Ours(LiveScheduling, Stub):
    """Ours before the stub."""


def step(scheduler: Any, accept: int = 1) -> tuple[Any, str]:
    """A whole step of two sequences: scheduled, verified, and drafted for."""
    scheduler.running = ["a", "b"]
    out = scheduler.schedule()
    tokens = [[0] * (1 + min(accept, len(out.scheduled_spec_decode_tokens.get(n, ())))) for n in "ab"]
    result = SimpleNamespace(sampled_token_ids=tokens, req_id_to_index={"a": 0, "b": 1})
    said = scheduler.update_from_output(out, result)
    drafted = [[9] * out.num_spec_tokens_to_schedule for _ in "ab"]
    scheduler.update_draft_token_ids(SimpleNamespace(req_ids=["a", "b"], draft_token_ids=drafted))
    return out, said


def test_the_scheduler_writes_our_length_into_vllms_table() -> None:
    made = Ours(config(lengths=[3, 0, 2]))
    seen = [step(made) for _ in range(6)]
    assert [out.num_spec_tokens_to_schedule for out, _ in seen] == [3, 0, 2, 3, 0, 2]
    verified = [[len(t) for t in out.scheduled_spec_decode_tokens.values()] for out, _ in seen]
    assert verified == [[], [3, 3], [], [2, 2], [3, 3], []] and {said for _, said in seen} == {"vllm's"}


def test_what_it_learns_is_what_was_verified() -> None:
    made = Ours(config(lengths="adaptive", first=2))
    seen = list[SeenStep]()
    made.lengths.saw = seen.append  # type: ignore[method-assign]
    for _ in range(4):
        out, _ = step(made, accept=1)
    assert [(s.verified, s.drafted, list(s.accepted)) for s in seen[1:]] == [(2, 2, [1, 1])] * 3
    assert seen[0].seconds is None and seen[1].seconds is not None
    assert getattr(out, NOTE)["outlook"][1] == 2


def test_a_request_may_opt_out() -> None:
    made = Ours(config(lengths="fixed"))
    made.requests["b"].sampling_params = SimpleNamespace(extra_args={"outrider_length": 0})
    step(made)
    out, _ = step(made)
    assert {n: len(t) for n, t in out.scheduled_spec_decode_tokens.items()} == {"a": 4}


@pytest.mark.parametrize("method", ["eagle3", "custom_class"])
def test_limits_of_requests_that_have_ended_are_forgotten(method: str) -> None:
    own = config(lengths="fixed")
    own.speculative_config.method = method
    made = Ours(own)
    for n in range(500):
        made.limit_of(f"ended {n}")
    step(made)
    assert set(made.limits) <= {"a", "b"}


def test_without_a_table_it_says_which_line_to_add() -> None:
    with pytest.raises(ConfigError, match=r'"num_speculative_tokens_per_batch_size": \[\[1, 4, 4\]\]'):
        Ours(config(), table=False)
    own = config()
    own.speculative_config = None
    with pytest.raises(ConfigError, match="speculative-config"):
        Ours(own)
    own = config()
    own.speculative_config.method = "custom_class"
    Ours(own, table=False)  # the proposer has the lengths then

"""Sequences that use each other's pages: the same texts as without, whoever drafts, and also where pages run out."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.engine.outputs import Result
from outrider.errors import ConfigError
from outrider.models.guided import FreeText, Guided
from outrider.models.toy import TinyLM
from outrider.nn.kv import PagedKV
from outrider.params import SamplingParams
from outrider.protocols import KVCache
from outrider.types import Draft, Rows, Scores
from outrider.verify import load_rule
from tests.contract.asked import VOCAB
from tests.contract.drafters import DRAFTERS

PAGE = 4


class SmallPages(TinyLM):
    """Pages of 4 tokens, `limit` of them. Its rows differ by rounding at most, in float64: no text depends on it."""

    limit: int | None = None
    uniform_rows = 1 << 30
    broken: int | None = None  # a token that makes the keys and logits of its rows NaN

    def new_kv(self, slots: int, length: int) -> PagedKV:
        size = self.hidden_size // self.heads
        return PagedKV(
            self.layers, slots, self.heads, length, size, self.dtype, self.device, page=PAGE, limit=self.limit
        )

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        scores = super().forward(rows, kv, layers=layers)
        if self.broken is not None:
            scores.logits[rows.token[rows.scored] == self.broken] = float("nan")
        return scores


def model(limit: int | None = None, **attributes: object) -> SmallPages:
    made = SmallPages(VOCAB, 16, 2, seed=0, sharp=4.0)
    for name, value in {"limit": limit, **attributes}.items():
        setattr(made, name, value)
    return made


def engine(
    target: TinyLM, drafter: str = "none", rule: str = "match", slots: int = 3, chunk: int = 8, **more
) -> Engine:
    made = DRAFTERS[drafter](target, slots)
    return Engine(target, made, load_rule(rule), Fixed(4), slots=slots, max_length=64, chunk=chunk, eos=(1,), **more)


def pages_of(one: Engine) -> PagedKV:
    assert isinstance(one.parts.kv, PagedKV)
    return one.parts.kv


def check_nothing_is_held(one: Engine) -> None:
    kv = pages_of(one)
    assert not one.busy and kv.spare == kv.pages.count and not any(kv.pages.uses) and not any(kv.length)


SYSTEM = [(5 * i + i * i) % VOCAB for i in range(19)]


def talk(one: Engine, temperature: float) -> list[tuple[int, ...]]:
    """Two chats of three turns with the same system prompt, their turns side by side, two samples of each last answer."""
    histories, said = [[*SYSTEM, 2, 3], [*SYSTEM, 4]], []
    for turn in range(3):
        p = [
            SamplingParams(temperature=temperature, seed=10 * turn + i, max_tokens=9, n=1 + turn // 2) for i in range(2)
        ]
        results = one.generate(histories, p)
        said += [o.token_ids for r in results for o in r.outputs]
        histories = [h + list(r.outputs[0].token_ids) + [7, turn] for h, r in zip(histories, results, strict=True)]
    return said


@pytest.mark.parametrize(
    ("drafter", "rule", "temperature"),
    [
        *((name, "match", 1.0) for name in ("none", "ngram", "medusa", "suffix-shared")),
        ("tree-iid", "speculative_sampling", 0.0),
        ("model", "speculative_sampling", 1.0),
        *(pytest.param(name, "match", 1.0, marks=pytest.mark.slow) for name in ("eagle", "ahead-inline")),
        pytest.param("eagle-tree", "speculative_sampling", 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_same_texts_with_and_without(drafter: str, rule: str, temperature: float) -> None:
    """`match` and greedy decoding are blind to what is drafted: feature drafters draft less behind a prompt they did not see.
    Others draft the same."""
    found = {}
    for on in (True, False):
        one = engine(model(), drafter, rule, prefix_cache=on)
        found[on] = talk(one, temperature)
        assert (one.state.room.sums.reused > 60) == on
        check_nothing_is_held(one)
    assert found[True] == found[False]


def test_a_second_turn_feeds_only_what_is_new() -> None:
    one = engine(model())
    first = one.generate([SYSTEM], SamplingParams(max_tokens=6, seed=1, ignore_eos=True))[0].outputs[0]
    rows: list[int] = []
    forward = one.parts.target.forward
    one.parts.target.forward = lambda r, kv, layers=(): (rows.append(r.count), forward(r, kv, layers=layers))[1]  # type: ignore[method-assign]
    text = SYSTEM + list(first.token_ids) + [5, 6]
    one.submit(text, SamplingParams(max_tokens=1, seed=1), request="second")
    sequence = one.sequences("second")[0]
    list(one.run())
    full = (len(SYSTEM) + 6 - 1) // PAGE * PAGE  # the answer's last token was never fed
    assert sequence.reused == full and sum(rows) == len(text) - full
    assert one.state.room.sums.asked == len(SYSTEM) + len(text)
    one.submit(text, SamplingParams(max_tokens=1, seed=1), request="again")
    again = one.sequences("again")[0]
    list(one.run())
    assert again.reused == len(text) // PAGE * PAGE - (len(text) % PAGE == 0)


def test_a_prompt_of_whole_pages_leaves_its_last_token_to_be_scored() -> None:
    text, p = SYSTEM[:16], SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    one = engine(model())
    first, second = (one.generate([text], p)[0].outputs[0].token_ids for _ in range(2))
    assert first == second and one.state.room.sums.reused == 15
    kept = pages_of(one).prefixes.find((None, 0), text)
    assert len(kept) == 4  # the copy that the second wrote its last place into was given back


def test_where_rows_are_not_alike_only_whole_chunks_of_prompts_are_shared() -> None:
    one = engine(model(uniform_rows=0), chunk=8)
    one.generate([[*SYSTEM, 2, 3]], SamplingParams(max_tokens=9, seed=1, ignore_eos=True))
    assert len(pages_of(one).prefixes.find((None, 0), [*SYSTEM, 2, 3])) == 16 // PAGE
    talk(one, 1.0)
    assert one.state.room.sums.reused > 0 and one.state.room.sums.reused % 8 == 0


def test_requests_share_within_their_salt_only() -> None:
    one = engine(model())
    for salt, reused in ((None, 0), ("a", 0), ("b", 0), ("a", 16), (None, 16)):
        before = one.state.room.sums.reused
        one.generate([SYSTEM], SamplingParams(max_tokens=2, seed=1, cache_salt=salt))
        assert one.state.room.sums.reused - before == reused


def test_what_a_broken_sequence_wrote_is_forgotten() -> None:
    one = engine(model(broken=21))
    ruined = one.generate([[*SYSTEM[:12], 21]], SamplingParams(max_tokens=3, seed=1))[0].outputs[0]
    assert ruined.error and not pages_of(one).prefixes.find(None, SYSTEM[:12])
    check_nothing_is_held(one)


def schedule(seed: int, limit: int | None, on: bool) -> tuple[Engine, dict[str, tuple[int, ...]]]:
    """Requests that come, are aborted and preempted at random; the outputs of those that ended."""
    one = engine(model(limit), random.Random(seed).choice(["none", "model"]), prefix_cache=on)
    got: dict[str, list[int]] = {}
    ended: dict[str, tuple[int, ...]] = {}
    turns = random.Random(seed)
    for turn in range(70):
        if turn < 40 and turns.random() < 0.45:
            prompt = SYSTEM[: turns.choice((3, 9, 17))] + [
                turns.randrange(VOCAB) for _ in range(turns.randrange(1, 22))
            ]
            name = f"r{turn}"
            got[name] = []
            salt = turns.choice((None, "x"))
            one.submit(
                prompt, SamplingParams(seed=turn, max_tokens=turns.randrange(1, 24), cache_salt=salt), request=name
            )
        chance, victim = turns.random(), turns.randrange(VOCAB)
        names = sorted(got)
        if names and chance < 0.08:
            one.abort(names[victim % len(names)])
            got.pop(names[victim % len(names)])
        elif names and chance < 0.16:
            one.preempt(names[victim % len(names)])
        for _ in range(3):
            for event in one.step():
                got[event.request] += event.tokens
                if event.finish_reason:
                    ended[event.request] = tuple(got.pop(event.request))
    for event in one.run():
        if event.request in got:
            got[event.request] += event.tokens
            if event.finish_reason:
                ended[event.request] = tuple(got.pop(event.request))
    check_nothing_is_held(one)
    return one, ended


@pytest.mark.parametrize("seed", range(4))
def test_a_small_cache_sends_sequences_back_and_changes_no_text(seed: int) -> None:
    """Whole schedules with room for one sequence and a half, and with room for all, sharing nothing: whoever ended in both has the
    same text. (Aborts hit whoever is left, so a few end in one only.)"""
    tight, few = schedule(seed, 26, on=True)
    _, plenty = schedule(seed, None, on=False)
    both = few.keys() & plenty.keys()
    assert len(both) >= 5 and {name: few[name] for name in both} == {name: plenty[name] for name in both}
    assert tight.state.room.sums.reused > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_schedules_of_an_engine() -> None:
    preempted = 0
    for seed in range(1000):
        tight, few = schedule(seed, 18, on=True)
        plenty = schedule(seed, None, on=False)[1]
        assert all(few[name] == plenty[name] for name in few.keys() & plenty.keys())
        preempted += tight.state.room.sums.preempted
    assert preempted > 100


def test_the_youngest_goes_back_when_pages_run_out() -> None:
    """Three of 30 tokens each on 20 pages of 4: they enter together, and do not fit to their end."""
    prompts, p = [[i, 2, 3, i] for i in range(3)], SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    roomy, tight = engine(model()), engine(model(17))
    expected = roomy.generate(prompts, p)
    running: list[Result] = tight.generate(prompts, p)
    assert [r.outputs[0].token_ids for r in running] == [r.outputs[0].token_ids for r in expected]
    assert tight.state.room.sums.preempted > 0 == roomy.state.room.sums.preempted
    check_nothing_is_held(tight)


def test_a_prompt_counts_once_however_often_it_is_computed() -> None:
    """Sent back after its first token, it is read again in chunks."""
    one = engine(model(), prefix_cache=False)
    one.submit([(5 * i) % VOCAB for i in range(30)], SamplingParams(max_tokens=4, ignore_eos=True), request="a")
    while not one.step():
        pass
    assert one.preempt("a") and one.state.room.sums.asked == 30
    assert sum(len(e.tokens) for e in one.run()) == 3 and one.state.room.sums.asked == 30


def test_who_does_not_fit_beside_the_others_waits() -> None:
    one = engine(model(24))
    for name in ("first", "second"):
        one.submit(
            [(3 * i) % VOCAB for i in range(50)][:: 1 if name == "first" else -1],
            SamplingParams(max_tokens=4),
            request=name,
        )
    one.step()
    assert [s.request for s in one.scheduler.running] == ["first"] and len(one.scheduler.waiting) == 1
    assert {e.request for e in one.run()} == {"first", "second"}
    assert one.state.room.sums.preempted == 0


@pytest.mark.parametrize("free", [FreeText({2: 3}), FreeText(mark=2, prompt=(2,)), FreeText(mark=2, prompt=(5,) * 20)])
def test_guided_texts_wait_for_pages_too(free: FreeText) -> None:
    """Each takes the pages of two, shares nothing, and is the same text in a small cache."""
    prompts, p = [[i, 2, 3, i] for i in range(3)], SamplingParams(max_tokens=24, seed=5, ignore_eos=True)
    texts, sent = [], 0
    for limit in (None, 40):
        one = Engine(Guided(model(limit), free, 1.5), NoDraft(), load_rule("match"), Fixed(0), slots=3, max_length=64)
        texts.append([r.outputs[0].token_ids for r in one.generate(prompts, p)])
        sent += one.state.room.sums.preempted
    assert texts[0] == texts[1]
    assert sent > 0


def test_memory_that_cannot_be_limited_is_said_so() -> None:
    with pytest.raises(ConfigError, match="kv_memory was given, and the cache of SmallPages is not"):
        engine(model(), kv_memory=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_slots_of_a_long_context_take_the_memory_of_their_tokens() -> None:
    """8 x 32k tokens of the shipped target would be 6.2 GB; 8 x 64 tokens are 12 MB."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = resident()
    kv = PagedKV(21, 8, 6, 32_768, 48, torch.bfloat16, torch.device("cpu"))
    assert 2 * kv.k.nbytes > 6e9
    rows = Rows.assemble(list(range(8)), [[1] * 64] * 8, [0] * 8, Draft.empty(8))
    kv.reserve(rows)
    for slot in range(8):
        where = kv.places(slot, 0, 64)
        kv.k[:, :, where] = kv.v[:, :, where] = 1.0
    assert resident() - before < 60e6

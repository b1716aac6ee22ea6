"""Questions of several turns: each is asked behind the model's own replies, is measured apart, and is named in reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.evaluate.bench import spec_bench as sb
from outrider.evaluate.measure import Arm, run_arms, run_group
from outrider.evaluate.records import Record
from outrider.evaluate.scoring.quality import text_nll, with_quality
from outrider.evaluate.workloads import Question, Row, load_rows, ready, told
from outrider.noise import derive_seed
from outrider.params import SamplingParams
from outrider.verify import load_rule
from tests.evaluate.liars import DRAFT, TARGET
from tests.evaluate.test_workloads import speaker, written  # noqa: F401

ASK = SamplingParams(max_tokens=7, ignore_eos=True)


def toy(length: int, slots: int = 2) -> Engine:
    drafter = ModelDrafter(DRAFT, length) if length else NoDraft()
    return Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(length), slots=slots, max_length=96)


def again(most: int):
    """Asks `most` more times: what has been said, and a token that counts the replies."""

    def later(replies: Sequence[Sequence[int]]) -> list[int] | None:
        if len(replies) > most:
            return None
        return [1, *(t for i, reply in enumerate(replies, 1) for t in (*reply, i % 2))]

    return later


@pytest.mark.parametrize("length", [0, 2])
def test_a_turn_is_what_its_prompt_gives_alone(length: int) -> None:
    """Two dialogues and a question that is asked once, decoded together: each turn has the text of its prompt asked alone, with the
    seed of its turn; prompts hold the replies; counts, tokens and steps add up."""
    arm = Arm("a", toy(length, slots=3))
    params = [replace(ASK, seed=s) for s in (5, 6, 7)]
    record = run_group(arm, [[1], [2, 2], [1, 2]], params, (0, 0, 0), [again(2), None, again(1)])
    assert record.failed == 0 and len(record.outputs) == 3 + 1 + 2 == len(record.asked) == len(record.timings)
    a, b, c, alone, d, e = record.outputs
    assert record.asked == ((1,), (1, *a, 1), (1, *a, 1, *b, 0), (2, 2), (1, 2), (1, *d, 1)) and len(c) == len(e) == 7
    seeds = [5, derive_seed(5, 1) >> 1, derive_seed(5, 2) >> 1, 6, 7, derive_seed(7, 1) >> 1]
    if not length:  # a draft changes which of the target's texts a seed draws
        for prompt, text, seed in zip(record.asked, record.outputs, seeds, strict=True):
            one = toy(0).generate([list(prompt)], replace(ASK, seed=seed))[0]
            assert one.outputs[0].token_ids == text
    assert record.tokens == 42 == record.counts.tokens and len(alone) == 7
    assert all(0 < t.first <= t.end and t.tokens == 7 and 1 <= t.steps <= record.counts.steps for t in record.timings)
    assert Record.from_dict(asdict(record)) == record


def test_turns_of_one_dialogue_share_its_time_and_its_steps() -> None:
    """Alone in its group, the steps of its turns are those of the engine, and its seconds are within the group's."""
    record = run_group(Arm("a", toy(2)), [[1]], [replace(ASK, seed=3)], (0, 0, 0), [again(3)])
    assert len(record.timings) == 4 and sum(t.steps for t in record.timings) == record.counts.steps
    assert sum(t.end for t in record.timings) <= record.seconds


def test_writing_the_next_prompt_is_no_part_of_the_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a group is moved by a whole hour while a prompt is written: nothing that is measured knows of it."""
    from outrider.evaluate import measure

    now = SimpleNamespace(lost=0.0, clock=measure.perf_counter)
    monkeypatch.setattr(measure, "perf_counter", lambda: now.clock() + now.lost)

    def slow(replies: Sequence[Sequence[int]]) -> list[int] | None:
        now.lost += 3600.0
        return again(2)(replies)

    record = run_group(Arm("a", toy(0)), [[1]], [ASK], (0, 0, 0), [slow])
    assert len(record.outputs) == 3 and record.seconds < 3600 and all(t.end < 3600 for t in record.timings)


def refused(replies: Sequence[Sequence[int]]) -> list[int] | None:
    raise ConfigError("the target's chat template refuses it")


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (lambda replies: [1] * 96, "its 96 tokens do not fit into a context of 96"),
        (refused, "the target's chat template refuses it"),
    ],
)
def test_a_turn_that_cannot_be_asked_behind_its_replies_ends_its_dialogue(
    later, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """That is chance and no failure: another arm's replies may be shorter. It is told, and the others of its group go on."""
    record = run_group(Arm("a", toy(2)), [[1], [2]], [ASK, ASK], (0, 0, 0), [later, again(1)])
    assert (record.failed, record.shortened) == (0, 1)
    assert [len(o) for o in record.outputs] == [7, 7, 7] and len(record.timings) == 3
    assert [r.getMessage() for r in caplog.records] == [
        f"turn 2 of conversation 1 and all behind it are left out: {said}"
    ]
    assert Record.from_dict(asdict(record)) == record


def test_a_later_turn_that_the_engine_refuses_is_a_failure() -> None:
    record = run_group(Arm("a", toy(2)), [[1]], [ASK], (0, 0, 0), [lambda replies: [999]])
    assert (record.failed, record.shortened, record.outputs[1]) == (1, 0, ())


def test_turns_that_the_template_refuses_whatever_is_replied_are_refused_at_the_start(speaker, tmp_path) -> None:  # noqa: F811
    rows = load_rows(written(tmp_path, {"prompt": "ho"}, {"turns": ["hi", "FORBIDDEN"]}), 9)
    tokenizer = speaker.tokenizer
    kept = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if 'FORBIDDEN' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}" + kept
    )
    try:
        with pytest.raises(ConfigError, match=r"prompt 2: the target's chat template refuses it \(no\)"):
            ready(speaker, tmp_path, rows, whole=True)
        assert len(ready(speaker, tmp_path, rows).ids) == 2  # its first turn alone is asked
    finally:
        tokenizer.chat_template = kept


def test_every_arm_goes_on_from_its_own_replies() -> None:
    arms = [Arm("plain", toy(0)), Arm("two", toy(2))]
    records = run_arms(arms, [[1], [2], [1, 1]], ASK, batch=2, repeats=2, warmup=1, later=[again(1), None, again(2)])
    assert [len(r.outputs) for r in records if r.arm == "two" and r.group == 0] == [3, 3]
    assert [len(r.outputs) for r in records if r.arm == "plain" and r.group == 1] == [3, 3]
    for r in records:
        for i, prompt in enumerate(r.asked):
            assert len(prompt) < 3 or any(prompt[1 : 1 + 7] == text for text in r.outputs[:i])
    assert not any(r.asked for r in run_arms(arms, [[1]], ASK, repeats=1, warmup=0))


def test_likelihood_is_that_behind_the_prompts_that_were_asked() -> None:
    engine = toy(2)
    record = run_group(Arm("a", engine), [[1]], [ASK], (0, 0, 0), [again(1)])
    nll = sum(text_nll(TARGET, p, o) for p, o in zip(record.asked, record.outputs, strict=True))
    assert with_quality(TARGET, [[1]], record).nll == pytest.approx(nll)


def test_an_answer_file_has_every_turn() -> None:
    """As Spec-Bench writes it: a list over turns, whose tokens and steps are those of the whole."""
    record = run_group(Arm("two", toy(2)), [[1]], [replace(ASK, seed=1)], (0, 0, 0), [again(1)])
    (row,) = sb.answers([record], [Question(81, "writing")], lambda ids: " ".join(map(str, ids)), "two")
    choice = row["choices"][0]
    assert choice["turns"] == [" ".join(map(str, text)) for text in record.outputs] and choice["new_tokens"] == [7, 7]
    assert sum(choice["decoding_steps"]) == record.counts.steps == len(choice["accept_lengths"])
    assert choice["wall_time"] == [t.end for t in record.timings]
    base = [replace(record, arm="plain")]
    speed = sb.report([record, *base], "plain", [Question(81, "writing")], str, lambda text: 8)["two"][0]
    assert speed.tokens_per_second == pytest.approx(14 / sum(choice["wall_time"]))
    assert speed.baseline_tokens_per_second == pytest.approx(14 / sum(choice["wall_time"]))


def test_the_prompt_of_a_turn_is_the_conversation_by_the_template(speaker, tmp_path) -> None:  # noqa: F811
    """The replies are cut at their end of text, are written without special tokens, and stand as the assistant's; without a
    template all contents stand one per line. Where one turn alone is asked, the report says how many are left out."""
    rows = load_rows(written(tmp_path, {"turns": ["hi", "more", "last"]}, {"prompt": "ho"}), 9)
    found = ready(speaker, tmp_path, rows, whole=True)
    assert found.later[1] is None and found.data["later_turns"] == 2 and "2 later turns" in told(found.data)
    ids = lambda text: list(speaker.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    end = speaker.tokenizer.eos_token_id
    first, second = [*ids("ho"), end, *ids("never shown")], ids("yes")
    later = found.later[0]
    assert later is not None and later([first, second, second]) is None
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "hi"), ("assistant", "ho"), ("user", "more"), ("assistant", "yes"), ("user", "last"))
    ]
    ask = lambda some: speaker.tokenizer.apply_chat_template(some, add_generation_prompt=True, return_dict=False)  # noqa: E731
    assert later([first]) == ask(talk[:3]) and later([first, second]) == ask(talk)
    plain = ready(speaker, tmp_path, rows, template=False, whole=True).later[0]
    assert plain is not None and plain([first]) == speaker.encode("hi\nho\nmore")
    alone = ready(speaker, tmp_path, rows)
    assert alone.later == [None, None] and "without 2 later turns" in told(alone.data)
    assert "turn" not in told(ready(speaker, Path("x"), [Row("hi")], whole=True).data)

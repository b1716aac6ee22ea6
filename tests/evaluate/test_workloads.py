"""Prompt files of every shape, and odd ones; and prompts by a target's chat template."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from outrider import conversations
from outrider.assets import chat_prompts_file
from outrider.conversations import Conversation, conversation_in, prompt_ids, whole_text
from outrider.errors import ConfigError
from outrider.evaluate.scoring.score import given_text, ready_items
from outrider.evaluate.workloads import Row, load_prompts, load_rows, questions_of, ready, told
from outrider.files import read_text
from outrider.models.gguf.template import render
from outrider.theory.logs import read_log
from tests.checkpoints import make_tokenizer

HI, HO, MORE = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "ho"), ("user", "more")))


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def speaker(tmp_path: Path) -> Any:
    """What `ready` reads of an engine whose model has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    encode = lambda p: list(tokenizer.encode(p)) if isinstance(p, str) else p  # noqa: E731
    return SimpleNamespace(tokenizer=tokenizer, encode=encode, eos=(tokenizer.eos_token_id,))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [HI, HO, MORE]}, [HI, HO, MORE]),
        ({"messages": [HI, HO]}, [HI]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "human", "value": "more"}]},
         [HI, HO, MORE]),
        ({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [HI]}}, [HI]),
        ({"messages": [{"role": "developer", "content": "be brief"}, HI]}, [{"role": "system", "content": "be brief"}, HI]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}]}]}, [HI]),
        ({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": []}, MORE]},
         [HI, {"role": "assistant", "content": ""}, MORE]),
        ({"messages": [HI, {"role": "assistant", "content": []}, MORE]}, [HI, {"role": "assistant", "content": ""}, MORE]),
        ({"prompt": [HI, HO, MORE]}, [HI, HO, MORE]),
        ({"messages": [
            HI,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "tool_call_id": "a", "content": "2"}]},
         [HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]},
          {"role": "tool", "content": "2", "tool_call_id": "a"}]),
    ],
)  # fmt: skip
def test_conversations_of_every_kind(row: dict, messages: list, tmp_path: Path) -> None:
    path = written(tmp_path, row)
    found = load_prompts(path, 9)
    assert found == [Conversation(tuple(messages))]
    assert load_prompts(written(tmp_path, json.dumps([row, row]), name="rows.json"), 9) == found * 2
    assert [row.text for row in load_rows(path, 9)] == ["\n".join(m["content"] for m in messages)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [HO]}, "no message of a user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no message of a user"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "'wizard'"),
        ({"messages": ["hi"]}, "message 1 is no object"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "an image"),
        ({"messages": [HI, {"role": "assistant", "content": "x", "tool_calls": [3]}, MORE]}, "without a `function`"),
        ({"messages": []}, "no `prompt`"),
        ({"messages": [{"role": "user", "content": []}]}, "message 1 has no text"),
        ({"turns": ["a", 3]}, "`turns` are not all texts"),
        ({"turns": ["a", ""]}, "or one is empty"),
        ({"prompt": "b", "turns": ["a", "c"]}, "`prompt` is not the first of its `turns`"),
        ({"turns": ["a", "c\ud800"]}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "c\ud800"}]}, "half a surrogate pair"),
        ({"prompt": "a", "completion": "c\ud800"}, "half a surrogate pair"),
        ({"prompt": "a", "completion": 3}, "`completion` is neither"),
        ({"prompt": "a", "completion": [HI]}, "`completion` is neither"),
        ({"prompt": "a", "completion": [HO, HO]}, "`completion` is neither"),
        ({"messages": [HI, HO], "completion": "x"}, "ends with an answer, and there is a `completion` too"),
        ({"prompt": ""}, "no `prompt`"),
        ({"prompt": None}, "no `prompt`"),
        ([1], "expected an object"),
        ("[" * 100_000, "lists in lists"),
        ("1" * 5_000, "4300 digits"),
        ("{", "not JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a"}, "", row)
    with pytest.raises(ConfigError, match=said) as error:
        load_prompts(path, 9)
    assert str(error.value).startswith(f"{path}:3: ")


def test_what_editors_and_systems_leave_in_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\r\n'.encode())
    assert load_prompts(path, 9) == ["a\u2028b", "c\x85d"], "only a line feed ends a line"
    path.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert load_prompts(path.with_suffix(".txt"), 9) == ["one", "two"]
    with pytest.raises(ConfigError, match="no prompts found"):
        load_prompts(written(tmp_path, "", name="empty.jsonl"), 9)
    with pytest.raises(ValueError, match="log:1: lists in lists"):
        read_log(["[" * 100_000], "log")


def test_files_are_read_up_to_a_bound_and_pipes_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_text(Path("/dev/zero"), 1 << 20)
    with pytest.raises(ConfigError, match="is a folder"):
        read_text(tmp_path, 1 << 20)
    code = "import sys; from pathlib import Path; from outrider.files import read_text; print(read_text(Path('/dev/stdin'), 99))"
    done = subprocess.run([sys.executable, "-c", code], input="piped", capture_output=True, text=True)
    assert done.stdout == "piped\n", done.stderr


def through_a_pipe(text: str) -> Path:
    """The name of a pipe from which a text comes once."""
    end, start = os.pipe()
    os.write(start, text.encode())
    os.close(start)
    return Path(f"/dev/fd/{end}")


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "hi"}]}\n', ["a", Conversation((HI,))]),
        ('\n  {"prompt": "a"}\n', ["a"]),
        ('[{"prompt": "a"}, {"prompt": "b"}]', ["a", "b"]),
        ('[\n {"prompt": "a"}\n]\n', ["a"]),
        ('{\n "prompt": "a"\n}\n', ["a"]),
        ("{\n  return x;\n}", ["{", "  return x;", "}"]),
        ("one\ntwo\n", ["one", "two"]),
        ("[INST] one [/INST]\n", ["[INST] one [/INST]"]),
        ("{not an object}\n", ["{not an object}"]),
        ("7\n", ["7"]),
    ],
)
def test_what_comes_through_a_pipe_is_told_by_what_it_holds(text: str, prompts: list, tmp_path: Path) -> None:
    pipe = through_a_pipe(text)
    assert load_prompts(pipe, 9) == prompts
    with pytest.raises(ConfigError, match="no prompts found"):
        load_prompts(pipe, 9)  # a second reader finds nothing
    os.close(int(pipe.name))
    named = tmp_path / "prompts.txt"
    named.write_text(text, encoding="utf-8")
    assert load_prompts(named, 9) == [line for line in text.splitlines() if line.strip()], (
        "a name that tells is believed"
    )


@pytest.mark.parametrize("text", ["[]", " [\n]\n", ""])
def test_a_list_without_prompts_is_none(text: str, tmp_path: Path) -> None:
    pipe, named = through_a_pipe(text), tmp_path / "prompts.json"
    named.write_text(text)
    for path in (pipe, named):
        with pytest.raises(ConfigError, match="no prompts found"):
            load_prompts(path, 9)
    os.close(int(pipe.name))


def test_an_object_over_several_lines_is_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{\n  "prompt": "a"\n}\n')
    assert load_prompts(path, 9) == ["a"]
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ConfigError, match=r"prompts\.json:2: not JSON"):
        load_prompts(path, 9)


def test_questions_are_of_the_rows_that_were_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"question_id": 81, "category": "qa", "turns": ["a", "b"]}, {"turns": ["c"]})
    rows = load_rows(path, 9)
    assert [(row.prompt, row.turns) for row in rows] == [("a", ("b",)), ("c", ())]
    assert [(q.number, q.category) for q in questions_of(rows)] == [(81, "qa"), (1, "overall")]


def test_prompts_are_taken_by_the_template_of_the_target(speaker: Any, tmp_path: Path) -> None:
    path = written(tmp_path, {"messages": [HI, HO, MORE, HO]}, {"prompt": "hi"})
    prompts = load_rows(path, 9)

    def ask(messages: list[dict[str, str]]) -> list[int]:
        return speaker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    found = ready(speaker, path, prompts)
    assert found.ids == [ask([HI, HO, MORE]), ask([HI])]
    assert found.data == {"prompts": str(path), "chat_template": True} and "by the chat template" in told(found.data)
    plain = ready(speaker, path, prompts, template=False)
    assert plain.ids == [speaker.encode("hi\nho\nmore"), speaker.encode("hi")] and not plain.data["chat_template"]


def test_a_chat_model_is_asked_questions_and_another_is_given_code(speaker: Any) -> None:
    code = load_rows(None, 5)
    found = ready(speaker, None, code)
    asked = [json.loads(line)["messages"] for line in chat_prompts_file().read_text().splitlines()]
    assert [speaker.tokenizer.decode(i).count("user: ") for i in found.ids] == [
        sum(m["role"] == "user" for m in talk) for talk in asked[:5]
    ]
    assert found.data["prompts"] == "the shipped questions" and len(asked) == 64
    assert len({json.dumps(talk) for talk in asked}) == 64 and all(talk[-1]["role"] == "user" for talk in asked)
    speaker.tokenizer.chat_template = None
    assert ready(speaker, None, code).ids == [speaker.encode(row.text) for row in code]
    items, data = ready_items(speaker, None, code)
    assert [i.prompt for i in items] == [speaker.encode(row.text) for row in code] and data[
        "prompts"
    ] == "the shipped code"
    assert {i.domain for i in items} != {""}, "the shipped code is reported by folders of the standard library"


def test_a_template_that_refuses_is_named_with_its_prompt(speaker: Any, tmp_path: Path) -> None:
    speaker.tokenizer.chat_template = (
        "{{ raise_exception('no system message') if messages[0].role == 'system' else 'x' }}"
    )
    path = written(tmp_path, {"prompt": "a"}, {"messages": [{"role": "system", "content": "s"}, HI]})
    with pytest.raises(ConfigError, match=r"prompt 2: the target's chat template refuses it \(no system message"):
        ready(speaker, path, load_rows(path, 9))


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"prompt": "hi", "completion": "ho"}, "<s>user: hi</s><s>assistant: ", "ho"),
        ({"prompt": "hi", "completion": [HO]}, "<s>user: hi</s><s>assistant: ", "ho"),
        ({"messages": [HI], "completion": "ho"}, "<s>user: hi</s><s>assistant: ", "ho"),
        ({"prompt": [HI, HO, MORE], "completion": [HO]},
         "<s>user: hi</s><s>assistant: ho</s><s>user: more</s><s>assistant: ", "ho"),
    ],
)  # fmt: skip
def test_a_given_answer_is_read_behind_its_prompt(
    row: dict, asked: str, answer: str, speaker: Any, tmp_path: Path
) -> None:
    """By the template it begins where the template ends; without one, prompt and answer are one text, and the answer begins with
    the first token that the prompt alone has not."""
    rows = load_rows(written(tmp_path, row), 9)
    items, _ = ready_items(speaker, Path("x"), rows)
    text = given_text(speaker, items[0], 0, 99)
    assert (speaker.tokenizer.decode(text.prompt), speaker.tokenizer.decode(text.output)) == (asked, answer)
    for plain in (ready_items(speaker, Path("x"), rows, False)[0][0], *untemplated(speaker, rows)):
        text, whole = given_text(speaker, plain, 0, 99), rows[0].text + answer
        assert [*text.prompt, *text.output] == speaker.encode(whole), "the tokens of the one text, joined at the border"
        shared = speaker.encode(rows[0].text)
        assert text.prompt == shared[: len(text.prompt)] and len(text.prompt) >= len(shared) - 1


def untemplated(speaker: Any, rows: list[Row]) -> list[Any]:
    """The items of a model that has no template."""
    speaker.tokenizer.chat_template = None
    return ready_items(speaker, Path("x"), rows)[0]


def test_training_text_has_one_token_that_begins_it(speaker: Any) -> None:
    talk = conversation_in({"messages": [HI, HO]})
    assert talk is not None and whole_text(speaker.tokenizer, talk) == "user: hi</s><s>assistant: ho</s>"


class Written:
    """A tokenizer of one letter a token, with a chat template of a file."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, **more: Any) -> str:
        return render(self.chat_template, {"messages": messages, **more})

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, "takes more than"),
        (LOOPS + "{{ messages[0]['type'] }}", "takes more than"),
        ("{{ 'a' * 20000000 }}", "any model reads"),
    ],
)
def test_a_template_that_does_not_end_or_writes_without_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, template: str, why: str
) -> None:
    """Before its text is made tokens, which takes gigabytes; also where its trial with one message does not end."""
    monkeypatch.setattr(conversations, "TEMPLATE_SECONDS", 0.2)
    setitimer = signal.setitimer  # to a trial that catches the alarm it comes again, here sooner than in a second
    monkeypatch.setattr(signal, "setitimer", lambda which, first, again=0.0: setitimer(which, first, min(again, 0.2)))
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ConfigError, match=why):
        prompt_ids(Written(template), [{"role": "user", "content": "hi"}], "x")
    with pytest.raises(ValueError, match=why):
        whole_text(Written(template), Conversation(({"role": "user", "content": "hi"},)))
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert prompt_ids(Written("{{ messages[0].content }}"), [{"role": "user", "content": "hi"}], "x") == [104, 105]

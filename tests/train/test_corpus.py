"""Training texts: what files, rows and pipes give, and what is said of bad ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.train.corpus import read_corpus


def test_rows_of_text(tmp_path: Path) -> None:
    rows = [
        {"text": "one"},
        {"prompt": "two"},
        {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]},
        {"text": "one"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "plain.txt").write_text("five")
    found = read_corpus([path, tmp_path / "plain.txt"])
    assert [d.text for d in found] == ["one", "two", "three\nfour", "five"]
    written = read_corpus([path], render=lambda m: "|".join(x["role"] for x in m.messages))
    assert written[2].text == "user|assistant"


@pytest.mark.parametrize(
    ("written", "texts"), [('\n{"text": "one"}\n{"prompt": "two"}\n', ["one", "two"]), ("one\ntwo\n", ["one\ntwo\n"])]
)
def test_text_comes_through_a_pipe(written: str, texts: list[str]) -> None:
    """It is read once, and is rows if its first line is an object."""
    end, start = os.pipe()
    os.write(start, written.encode())
    os.close(start)
    assert [d.text for d in read_corpus([f"/dev/fd/{end}"])] == texts
    with pytest.raises(ConfigError, match="not UTF-8 text, or empty"):
        read_corpus([f"/dev/fd/{end}"])
    os.close(end)


def test_a_completion_follows_its_prompt(tmp_path: Path) -> None:
    """As the answer of a conversation that is written by the template, or as one text with it."""
    rows = [
        {"prompt": "one", "completion": " two"},
        {"prompt": [{"role": "user", "content": "three"}], "completion": [{"role": "assistant", "content": "four"}]},
        {"messages": [{"role": "user", "content": "five"}], "completion": "six"},
        {"prompt": "seven"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [d.text for d in read_corpus([path])] == ["one two", "three\nfour", "five\nsix", "seven"]
    render = lambda talk: "|".join(f"{m['role']}: {m['content']}" for m in talk.messages)  # noqa: E731
    said = [d.text for d in read_corpus([path], render=render)]
    assert said == ["user: one|assistant:  two", "user: three|assistant: four", "user: five|assistant: six", "seven"]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"text": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}'])
def test_bad_rows_are_named_and_skipped_only_if_asked(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n' + bad + '\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2"):
        read_corpus([path])
    said: list[str] = []
    assert [d.text for d in read_corpus([path], skip_bad=True, report=said.append)] == ["one", "two"]
    assert said == ["rows.jsonl: 1 bad rows skipped"]
    with pytest.raises(ConfigError, match="no such file"):
        read_corpus([tmp_path / "nowhere"])

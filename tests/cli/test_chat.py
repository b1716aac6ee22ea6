"""`outrider chat`: commands, texts of several lines, the history file, thinking; on a model that says what the test tells it to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider.cli import chat_lines
from outrider.cli.chat import Conversation
from outrider.cli.chat_lines import COMMANDS, ENDS, edited_lines, history_file, obey, read_text
from outrider.cli.closing import Closing
from outrider.dialects.detect import detect
from outrider.errors import RequestError
from outrider.params import SamplingParams
from tests.serve.chatserver import SCRIPTS, chat_engine
from tests.serve.harness import rewired

GREEDY = SamplingParams(temperature=0, max_tokens=80)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """What `read_text` makes of these lines."""
    left = list(lines)

    def give(_: str = "") -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", give)
    out = []
    while (text := read_text()) is not None:
        out.append(text)
    return out


@pytest.fixture
def talk() -> Conversation:
    SCRIPTS.update({"greet": "A guest.\n</think>\n\nHello there!", "ponder": "Hm.\n</think>\n\nSo it is."})
    closing = Closing()
    engine = rewired(chat_engine("thinker"))(sinks=(closing,))
    return Conversation(engine, None, closing, GREEDY)


def test_lines_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch, "one", "two\\", "three", '"""a', "", 'b"""', '"""', "c", '"""', '"""open', "end") == [
        "one", "two\nthree", "a\n\nb", "c", "open\nend"]  # fmt: skip


def test_ctrl_c_drops_what_was_typed_and_ends_when_nothing_was_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(chat_lines.sys.stdin, "isatty", lambda: True, raising=False)
    buffer, pressed = "", KeyboardInterrupt()
    monkeypatch.setattr(readline, "get_line_buffer", lambda: buffer)
    script: list[Any] = ['"""a', pressed, pressed, "one", pressed, pressed]

    def give(_: str = "") -> str:
        found = script.pop(0)
        if found is pressed:
            raise pressed
        return found

    monkeypatch.setattr("builtins.input", give)
    assert read_text() == "one", "a block was dropped, and the first press with nothing typed ends nothing"
    with pytest.raises(KeyboardInterrupt):
        read_text()
    buffer, script = "half a line", [pressed] * 5 + ["two"]
    assert read_text() == "two"
    monkeypatch.setattr(chat_lines.sys.stdin, "isatty", lambda: False, raising=False)
    script = [pressed]
    with pytest.raises(KeyboardInterrupt):
        read_text()


def test_commands(talk: Conversation) -> None:
    assert obey(talk, "hello") is None and obey(talk, "/usr/bin/env") is None and obey(talk, "//x") is None
    assert obey(talk, "/temprature 1") == "there is no command '/temprature', did you mean /temperature?"
    assert obey(talk, "/temperature 0.5") == "temperature 0.5" and talk.params.temperature == 0.5
    for bad in (
        "/temperature hot",
        "/temperature -1",
        "/draft many",
        "/draft -3",
        "/draft 2.5",
        "/draft inf",
        "/draft nan",
    ):
        before = talk.params
        assert obey(talk, bad) and talk.params == before
    assert obey(talk, "/draft off") == "drafts are off" and talk.params.draft_length == 0
    assert obey(talk, "/draft 2") == "drafts of at most 2 tokens" and talk.params.draft_length == 2
    assert obey(talk, "/draft on") == "drafts are on" and talk.params.draft_length is None
    assert obey(talk, "/stats") == "nothing was said yet"
    told = obey(talk, "/help")
    assert told is not None and all(name in told for name in COMMANDS)
    assert max(map(len, told.splitlines())) <= 80
    assert set(ENDS) >= {name for name, c in COMMANDS.items() if c.run is None}


def test_images_wait_for_the_next_message_of_a_target_with_a_template(talk: Conversation) -> None:
    assert obey(talk, "/image a.png") and obey(talk, "/image b.png") == "the next message shows a.png, b.png"
    assert obey(talk, "/clear") and talk.images == []
    talk.template = False
    assert obey(talk, "/image a.png") == "images need a target with a chat template" and talk.images == []


def test_a_conversation_with_thinking(talk: Conversation, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    styled = list[str]()
    monkeypatch.setattr(typer, "style", lambda text, **_: styled.append(text) or f"~{text}~")
    assert obey(talk, "/system Be brief.") == "system message: Be brief."
    talk.turn("greet")
    talk.turn("ponder")
    out = capsys.readouterr().out
    assert "Hello there!" in out and "So it is." in out and "think>" not in out
    assert "".join(styled).strip().endswith("Hm.") and "So it is." not in "".join(styled)
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (
        talk.messages[-1]["content"].strip() == "So it is." and talk.messages[-1]["reasoning_content"].strip() == "Hm."
    )
    told = obey(talk, "/stats")
    assert (
        told is not None
        and told.startswith("2 turns; ")
        and f"has {talk.context} of {talk.engine.max_length} tokens" in told
    )
    with pytest.raises(RequestError, match="the context holds"):
        talk.turn("x" * (talk.engine.max_length + 1))
    assert obey(talk, "/stats") == told, "what was refused is no part of the conversation"
    assert obey(talk, "/system -") == "system message: none" and talk.messages[0]["role"] == "user"
    assert obey(talk, "/clear") and talk.messages == []


def test_the_channels_of_gpt_oss_are_read(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    SCRIPTS["greet"] = (
        "<|channel|>analysis<|message|>A guest.<|end|><|start|>assistant<|channel|>final<|message|>Hello there!"
    )
    styled = list[str]()
    monkeypatch.setattr(typer, "style", lambda text, **_: styled.append(text) or text)
    closing = Closing()
    talk = Conversation(rewired(chat_engine("plain"))(sinks=(closing,)), None, closing, replace(GREEDY, max_tokens=200))
    talk.dialect = detect(lambda *_, **__: "", "{{ '<|channel|>analysis<|message|>' }}")
    assert talk.read_marks() == (
        "<|channel|>",
        "<|start|>",
        "<|message|>",
        "<|constrain|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
    )
    talk.turn("greet")
    assert "<|" not in capsys.readouterr().out and "".join(styled) == "A guest."
    assert talk.messages[-1] == {"role": "assistant", "content": "Hello there!", "reasoning_content": "A guest."}


def test_a_system_message_that_the_template_refuses_changes_nothing(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(messages: list[dict[str, str]]) -> list[int]:
        raise RequestError("no system role")

    monkeypatch.setattr(talk, "_prompt", refuse)
    assert obey(talk, "/system x") == "no system role" and talk.system is None and talk.messages == []


def test_the_history_is_kept_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(chat_lines.sys.stdin, "isatty", lambda: True, raising=False)
    readline.clear_history()
    with edited_lines(history_file()):
        readline.add_history("typed before")
    assert "typed before" in history_file().read_text() and history_file().stat().st_mode & 0o077 == 0
    readline.clear_history()
    with edited_lines(history_file()):
        assert readline.get_history_item(1) == "typed before"
    (tmp_path / "file").write_text("")
    with edited_lines(tmp_path / "file" / "history"):  # it cannot be kept there, which is no reason to end
        pass

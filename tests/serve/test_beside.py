"""Work beside the loop: what fails for the machine's sake is not held against a request, and nobody takes all the threads."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from outrider.assets import shipped
from outrider.errors import RequestError
from outrider.models.tokenizer import load_tokenizer
from outrider.serve import prep as prep_module
from outrider.serve.expressions import wild
from outrider.serve.prep import Ended, Prep, Process, Unfit
from outrider.serve.tickets import Unavailable
from tests.serve.harness import Running, serving, until


class Told:
    """A pool whose jobs end as they are told to, one after another."""

    def __init__(self, *ends: Any) -> None:
        self.ends = list(ends)

    async def do(self, *_: object) -> dict[str, Any]:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def outcomes(prep: Prep, tries: int) -> list[str]:
    """How so many tries of one grammar end."""

    async def run() -> list[str]:
        out = []
        for _ in range(tries):
            try:
                await prep.try_grammar("json:{}")
                out.append("made")
            except (RequestError, Unavailable) as error:
                out.append(type(error).__name__)
        return out

    return asyncio.run(run())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(shipped("target"))


def prepared(tokenizer: Any, *ends: Any) -> tuple[Prep, Told]:
    """A Prep whose grammars end as told."""
    prep, told = Prep(tokenizer, (0,), 100), Told(*ends)
    prep.compiles, prep.grammars = True, told  # type: ignore[assignment]
    return prep, told


def test_a_busy_machine_condemns_no_grammar(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process could start: that says nothing of the grammar. Too slow: it may try again after a while. Bad: it stays bad."""
    prep, told = prepared(tokenizer, Unavailable("busy"), {})
    assert outcomes(prep, 3) == ["Unavailable", "made", "made"] and not told.ends
    prep, told = prepared(tokenizer, Ended(True), {})
    assert outcomes(prep, 2) == ["RequestError"] * 2 and told.ends
    monkeypatch.setattr(prep_module, "AGAIN_SECONDS", -1.0)
    prep, told = prepared(tokenizer, Ended(True), {})
    assert outcomes(prep, 3) == ["RequestError", "made", "made"] and not told.ends
    for end in ({"bad": "it cannot be read"}, Unfit()):
        prep, told = prepared(tokenizer, end, {})
        assert outcomes(prep, 2) == ["RequestError"] * 2 and told.ends


def test_a_process_that_cannot_start_is_no_fault_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", none)
    with pytest.raises(Unavailable, match="try again later"):
        asyncio.run(Process({}).do({"do": "grammar", "text": "json:{}"}, 1.0))


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_replacements_that_multiply_are_wild(part: str) -> None:
    """One after another, each by ten characters: six make a million of one. Those of common tokenizers make few."""
    replace = lambda text: {"type": "Replace", "pattern": {"String": "a"}, "content": text}  # noqa: E731
    held = lambda *texts: json.dumps({part: {"type": "Sequence", "of": [replace(t) for t in texts]}})  # noqa: E731
    writes = part == "decoder"
    assert wild(held(*["a" * 10] * 6)) == (not writes, writes)
    assert wild(held("\N{LOWER ONE EIGHTH BLOCK}", " ", "", '"')) == (False, False)


@pytest.fixture
def reading() -> Iterator[tuple[Running, threading.Event, list[int]]]:
    """A server whose store takes until the event, and a mark for every time that it is read."""
    go, marks = threading.Event(), list[int]()

    def past() -> dict[str, Any]:
        marks.append(1)
        go.wait(20)
        return {"runs": [], "experiments": []}

    with serving(past=past) as running:
        try:
            yield running, go, marks
        finally:
            go.set()


def test_a_store_is_read_once_at_a_time(reading: tuple[Running, threading.Event, list[int]]) -> None:
    """However many ask for it: a prompt that is read meanwhile finds a thread, and all of them get the answer."""
    running, go, marks = reading
    found: list[int] = []
    asking = [
        threading.Thread(target=lambda: found.append(running.call("GET", "/outrider/runs")[0])) for _ in range(40)
    ]
    for thread in asking:
        thread.start()
    until(lambda: marks)
    assert running.call("POST", "/v1/completions", {"model": "pycode", "prompt": "x", "max_tokens": 1})[0] == 200
    assert len(marks) == 1
    go.set()
    for thread in asking:
        thread.join()
    assert found == [200] * 40


@pytest.mark.parametrize("path", ["/v1/completions", "/outrider/play"])
def test_who_leaves_while_its_prompt_is_read_gives_its_place_back(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Prep, "encode", never)
    monkeypatch.setattr(Prep, "in_thread", lambda *_: True)
    data = json.dumps({"model": "pycode", "prompt": "x", "max_tokens": 1}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(head.encode() + data)
        until(lambda: server.bridge.held == 1)
    until(lambda: server.bridge.held == 0)

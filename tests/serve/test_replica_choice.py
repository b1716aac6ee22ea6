"""Which replica has which conversation, and which options are the front's."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from typer.testing import CliRunner

from outrider.cli.main import app as command
from outrider.cli.serve_replicas import FRONTS, without
from outrider.errors import ConfigError
from outrider.serve.app import create_app
from outrider.serve.replicas.calls import Call, Part, conversation_key, ranked
from outrider.serve.replicas.front import create_front
from outrider.serve.replicas.inside import answer
from outrider.serve.settings import Settings
from tests.serve.test_replicas import InProcess, maker


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=8, unique=True), st.text(max_size=8))
def test_a_replica_that_goes_moves_only_its_own_conversations(names: list[str], key: str) -> None:
    first, *rest = ranked(key, names)
    for gone in names:
        assert ranked(key, [n for n in names if n != gone])[0] == (rest[0] if gone == first else first)


def test_conversations_spread_evenly() -> None:
    """3,000 keys over 3 replicas: 1,000 each, +- 6.1 standard deviations of 25.8 (one in a billion)."""
    first = [ranked(str(i), ["a", "b", "c"])[0] for i in range(3000)]
    assert all(abs(first.count(n) - 1000) < 158 for n in "abc")


def test_later_turns_of_a_conversation_are_the_same_conversation() -> None:
    opening = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    later = [*opening, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]
    key = conversation_key({"messages": opening, "max_tokens": 3})
    assert key == conversation_key({"messages": later, "temperature": 0.5})
    assert key != conversation_key({"messages": [opening[0], {"role": "user", "content": "bye"}]})
    assert conversation_key({"prompt": "a" * 5000}) == conversation_key({"prompt": "a" * 5000 + "b"})
    assert conversation_key([1]) == ""
    said = {"input": opening, "instructions": "be brief"}
    assert conversation_key(said) == conversation_key({**said, "input": later})
    assert conversation_key(said) != conversation_key({**said, "instructions": "be long"})
    assert conversation_key({"input": "hello"}) != conversation_key({"input": "bye"})
    mine = {"system": "be brief", "messages": opening[1:]}
    assert conversation_key(mine) == conversation_key({**mine, "messages": later[1:]}) != key


def test_the_front_has_every_address_of_one_server() -> None:
    """And what its options promise to browsers."""
    one = create_app(maker(), Settings("toy"))
    all_of_them = create_front(InProcess(2), Settings("toy", cors=("https://page.example",)))
    routes = [
        {(r.path, tuple(sorted(r.methods or ()))) for r in app.routes if isinstance(r, Route)}
        for app in (one, all_of_them)
    ]
    assert routes[0] == routes[1]
    from_a_page = (b"origin", b"https://page.example"), (b"access-control-request-method", b"POST")
    asked = Call("OPTIONS", "/v1/messages", b"", from_a_page)

    async def run() -> list[Part]:
        return [part async for part in answer(all_of_them, asked)]

    head = asyncio.run(run())[0]
    assert head.status == 200 and dict(head.headers)[b"access-control-allow-origin"] == b"https://page.example"


def test_options_of_the_front_are_not_passed_on() -> None:
    words = [
        "serve",
        "--replicas",
        "2",
        "--port=80",
        "--slots",
        "4",
        "--allow-open",
        "--api-key",
        "secret",
        "--draft=none",
    ]
    assert without(words, FRONTS) == ["serve", "--slots", "4", "--draft=none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--replica-threads 2", "add --replicas"),
        ("--max-replicas 2", "add --replicas"),
        ("--replicas 2 --restarts 1", "leave --restarts out"),
        ("--replicas 2 --log-level loud", "no log level 'loud'"),
        ("--replicas 2 --on ray --max-replicas 1", "below --replicas 2"),
        ("--replicas 2 --on ray --store runs.db", "leave --store out"),
        ("--replicas 2 --on ray --port 0", "name the --port"),
        ("--replicas 2 --on moon", "local or ray"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    found = CliRunner().invoke(command, ["serve", *words.split()])
    assert isinstance(found.exception, ConfigError) and said in str(found.exception)

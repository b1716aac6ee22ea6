"""What `serve` does beside its first requests: the first reply with a form waits for no process and for no tokenizer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from outrider.build import build_engine
from outrider.cli import serve
from outrider.cli.live_experiment import post
from outrider.cli.main import app as cli
from outrider.serve.app import create_app
from outrider.serve.bridge import OBJECT
from outrider.serve.server import server_for
from outrider.serve.settings import Settings
from tests.serve.harness import a_port

FORMS = ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["a", "b"]}}})


def test_the_first_json_does_not_wait_for_a_process_nor_for_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` warms up beside its first requests: one process starts and JSON mode is compiled before anybody asks; a request for
    it and one for a schema start no other."""
    starts, start = list[int](), asyncio.create_subprocess_exec
    monkeypatch.setattr(asyncio, "create_subprocess_exec", lambda *a, **o: (starts.append(1), start(*a, **o))[1])
    engine, compiled = build_engine(slots=1), list[str]()
    compile_ = engine.compile_grammar
    monkeypatch.setattr(engine, "compile_grammar", lambda text: (compiled.append(text), compile_(text))[1])

    async def run() -> list[str]:
        app = create_app(lambda **wiring: engine, Settings("m"), adaptive=False)
        server = server_for(app, Settings("m"), "127.0.0.1", 0, beside=app.state.bridge.warm)
        served = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        assert server.aside is not None
        await server.aside
        warmed = list(compiled)
        for form in FORMS:
            body = {"model": "m", "prompt": "x", "max_tokens": 4, "response_format": form}
            assert (await post(app, "/v1/completions", body))[0] == 200
        server.should_exit = True
        await served
        return warmed

    assert asyncio.run(run()) == [OBJECT] and len(starts) == 1
    assert compiled[:2] == [OBJECT, OBJECT] and len(compiled) == 3, "what `serve` compiles is what JSON mode asks for"


def test_a_server_that_ends_while_it_warms_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")

    async def run() -> None:
        app = create_app(lambda **wiring: build_engine(slots=1), Settings("m"), adaptive=False)
        server = server_for(app, Settings("m"), "127.0.0.1", 0, beside=endless)
        served = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        server.should_exit = True
        await asyncio.wait_for(served, 30)

    asyncio.run(run())
    assert ended == ["cancelled"]


def test_serve_is_what_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hands the bridge's own warming to its server."""
    seen: list[Any] = []
    ready = SimpleNamespace(run=lambda _: None)
    monkeypatch.setattr("outrider.serve.server.server_for", lambda *given: (seen.append(given), ready)[1])
    app = create_app(lambda **wiring: build_engine(slots=1), Settings("m"), adaptive=False)
    monkeypatch.setattr(serve, "application", lambda *_: app)
    found = CliRunner().invoke(cli, ["serve", "--port", str(a_port())])
    assert found.exit_code == 0, found.output
    assert seen[0][-1] == app.state.bridge.warm

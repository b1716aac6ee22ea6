"""`outrider doctor --vllm` against servers that answer as vLLM does, with our routes and without."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from outrider.cli.main import main
from outrider.integrations.vllm.status import part


@contextmanager
def answering(pages: dict[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", "doctor", *words])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_live_and_dead_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [part("ledger", True, "fine"), part("lengths", False, "fixed \x1b[31m", "add --scheduler-cls [x]")]
    with answering({"/outrider/parts": json.dumps({"parts": rows})}) as url:
        assert run(monkeypatch, "--vllm", url + "/v1/") == 1
        text = capsys.readouterr().out
        assert (
            "live ledger" in text
            and "off  lengths" in text
            and "--scheduler-cls [x]" in text
            and "\x1b[31m" not in text
        )
        assert run(monkeypatch, "--vllm", url, "--json") == 1
        assert json.loads(capsys.readouterr().out)["parts"][1]["part"] == "lengths"
    with answering({"/outrider/parts": json.dumps({"parts": rows[:1]})}) as url:
        assert run(monkeypatch, "--vllm", url) == 0


@pytest.mark.parametrize(
    ("pages", "code", "said"),
    [
        (
            {"/metrics": "vllm:spec_decode_num_drafts_total 3\n"},
            1,
            "VLLM_PLUGINS=outrider,outrider_ledger,outrider_http",
        ),
        ({"/metrics": "other 1\n"}, 2, "no vLLM server"),
        ({"/metrics": "vllm:x 1\noutrider_steps_total 3\noutrider_config_info 1\n"}, 2, "Outrider's own server"),
        ({"/outrider/parts": "[]"}, 2, "does not answer"),
        ({}, 2, "no vLLM server"),
    ],
)
def test_servers_without_our_endpoint(
    pages: dict[str, str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(pages) as url:
        assert run(monkeypatch, "--vllm", url) == code
    found = capsys.readouterr()
    assert said in " ".join((found.out + found.err).split())


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with answering({}) as url:
        pass
    assert run(monkeypatch, "--vllm", url) == 2 and "no server answers" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "--vllm", "ftp://x") == 2 and "http or https address" in capsys.readouterr().err
    assert run(monkeypatch, "folder", "--vllm", "http://x") == 2

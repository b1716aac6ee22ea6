"""A server that is audited is not trusted: no answer of it is a verdict unless it is an answer, and no key leaves for elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.evaluate.audit import sources as src
from outrider.params import SamplingParams

PARAMS = SamplingParams(max_tokens=4)


class Hostile(BaseHTTPRequestHandler):
    """Answers `body` with `status`; a redirect goes to /stolen of the same port under another name."""

    status, body, seen = 200, b"{}", list[tuple[str, str | None]]()

    def do_POST(self) -> None:
        type(self).seen.append((self.path, self.headers.get("Authorization")))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        if 300 <= self.status < 400:
            self.send_header("Location", f"http://localhost:{self.headers['Host'].rpartition(':')[2]}/stolen\x1b[2J")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address: str, vocab: int | None = 50) -> list[src.Emission]:
    return src.of_endpoint(src.Endpoint(address, "m", "SECRET-KEY"), PARAMS, vocab)([[1]], [1])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_said_and_not_followed(address: str, status: int) -> None:
    Hostile.status, Hostile.body, Hostile.seen = status, b"", []
    with pytest.raises(ConfigError, match="sends elsewhere") as caught:
        ask(address)
    assert Hostile.seen == [("/v1/completions", "Bearer SECRET-KEY")]
    assert "\x1b" not in str(caught.value) and "SECRET" not in str(caught.value)


CHOICES = [
    b"1", b"true", b"null", b'"x"', b"{}", b'{"token_ids": null, "logprobs": "x"}', b'{"token_ids": [5], "logprobs": "x"}',
    b'{"token_ids": ["5"]}', b'{"token_ids": [[5]]}', b'{"token_ids": [-1]}', b'{"token_ids": [1e30]}', b'{"token_ids": [5.0]}',
    b'{"token_ids": [true]}', b'{"token_ids": {"a": 1}}', b'{"token_ids": "5"}', b'{"token_ids": [50]}',
    b'{"token_ids": [1, 2, 3, 4, 5]}', b'{"logprobs": {"tokens": ["token_id:99999999999999999999"]}}',
    '{"logprobs": {"tokens": ["token_id:\u00b2"]}}'.encode(), b'{"logprobs": {"tokens": "token_id:5"}}',
    b'{"logprobs": {"tokens": ["token_id:-5"]}}', b'{"logprobs": {"tokens": [7]}}',
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_an_answer_of_the_wrong_shape_is_no_verdict(address: str, choice: bytes) -> None:
    Hostile.status, Hostile.body = 200, b'{"choices": [' + choice + b"]}"
    with pytest.raises(ConfigError):
        ask(address)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"choices": {"0": {}}}', b"[]", b'{"choices": []}', b"\xff", b"NaN"]
)
def test_an_answer_that_is_none_is_no_verdict(address: str, body: bytes) -> None:
    Hostile.status, Hostile.body = 200, body
    with pytest.raises(ConfigError):
        ask(address)


def test_the_servers_words_do_not_command_the_terminal(address: str) -> None:
    Hostile.status, Hostile.body = 400, b'{"error": "\x1b[2J\x1b]0;mine\x07\n\n\xe2\x80\xae"}'
    with pytest.raises(ConfigError, match="refused the request") as caught:
        ask(address)
    assert not any(ord(c) < 32 or c == "\u202e" for c in str(caught.value))


def test_an_answer_that_is_one_is_read(address: str) -> None:
    Hostile.status = 200
    Hostile.body = b'{"choices": [{"token_ids": [5, 49], "logprobs": {"token_logprobs": [-1, -0.5]}}]}'
    assert ask(address) == [src.Emission((5, 49), (-1.0, -0.5))]
    Hostile.body = b'{"choices": [{"logprobs": {"tokens": ["token_id:7"], "token_logprobs": [null]}}]}'
    assert ask(address) == [src.Emission((7,))]


@pytest.mark.parametrize(
    "value", [b"1" + b"0" * 400, b"NaN", b"Infinity", b"-Infinity", b"-1e300", b"5", b"true", b'"x"']
)
def test_what_is_no_logarithm_of_a_probability_is_not_compared(address: str, value: bytes) -> None:
    Hostile.status = 200
    Hostile.body = b'{"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [' + value + b"]}}]}"
    assert ask(address) == [src.Emission((5,))]


@pytest.mark.parametrize("url", ["http://u:hidden@127.0.0.1:1", "https://hidden@h/v1", "ftp://u:hidden@h"])
def test_a_password_in_the_address_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="--url") as caught:
        ask(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe", b"[" * 100_000, b"1", b"[]", b'{"prompt_token_ids": [1e999], "token_ids": [1]}', b"{}",
     b'{"prompt_token_ids": [1], "token_ids": [1], "logprobs": [1' + b"0" * 400 + b"]}"],
)  # fmt: skip
def test_recorded_texts_that_are_none_are_no_verdict(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_bytes(data)
    with pytest.raises(ConfigError):
        src.read_texts(tmp_path / "texts.jsonl")

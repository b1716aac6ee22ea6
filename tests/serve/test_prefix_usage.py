"""What replies and metrics say of prompts that the server had computed before, and whose they may have been."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.compilers import needs_compiler
from tests.serve.harness import Running, serving

KEYS = ("first-key-1234", "second-key-1234")
PROMPT = [(7 * i) % 300 + 40 for i in range(150)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(keys=KEYS, draft="none", slots=2) as running:
        yield running


def ask(server: Running, key: str, prompt: list[int], path: str = "/v1/completions", **more: object) -> dict:
    body = {"model": "pycode", "max_tokens": 2, "temperature": 0, "ignore_eos": True, **more}
    body |= {"prompt": prompt} if path == "/v1/completions" else {}
    status, _, reply = server.call("POST", path, body, {"Authorization": f"Bearer {key}"})
    assert status == 200, reply
    return json.loads(reply)


def cached(reply: dict) -> int:
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@needs_compiler  # elsewhere whole prompt chunks alone are shared, which these prompts do not fill
def test_replies_say_what_was_kept_and_keys_share_nothing(server: Running) -> None:
    first = ask(server, KEYS[0], PROMPT)
    again = ask(server, KEYS[0], [*PROMPT, 50, 51])
    assert cached(first) == 0 and cached(again) == 128 and again["usage"]["prompt_tokens"] == 152
    assert cached(ask(server, KEYS[1], PROMPT)) == 0, "how soon a reply comes must not tell what another key has asked"
    samples = ask(server, KEYS[1], PROMPT, n=2)
    assert cached(samples) == 128  # of one prompt, however many samples
    assert {c["text"] for c in samples["choices"]} == {c["text"] for c in first["choices"]}
    assert cached(ask(server, KEYS[1], PROMPT, cache_salt="mine")) == 0
    text = server.call("GET", "/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"})[2].decode()
    value = lambda name: float(re.search(rf"^outrider_{name}(?:_total)?(?:{{.*}})? (\S+)$", text, re.M)[1])  # type: ignore[index]  # noqa: E731
    assert value("prefix_cache_queries") == 150 * 3 + 152 + 150 * 2
    assert value("prefix_cache_hits") == 128 * 3
    assert value("preemptions") == 0
    assert 0 <= value("kv_cache_usage_ratio") < 0.1


@needs_compiler
def test_a_chat_s_second_turn_says_it_in_every_dialect(server: Running) -> None:
    turns = [{"role": "user", "content": "def add(a, b):\n    return a + b\n" * 12}]
    key = KEYS[0]
    for path, more, where in (
        ("/v1/chat/completions", {"messages": turns}, ("prompt_tokens_details", "cached_tokens")),
        ("/v1/messages", {"messages": turns}, ("cache_read_input_tokens",)),
        (
            "/v1/responses",
            {"input": turns, "max_tokens": None, "max_output_tokens": 16},
            ("input_tokens_details", "cached_tokens"),
        ),
    ):
        drop = {"ignore_eos": None} if path != "/v1/chat/completions" else {}
        body = {
            k: v
            for k, v in {"model": "pycode", "max_tokens": 2, "temperature": 0, **more, **drop}.items()
            if v is not None
        }
        found = []
        for _ in range(2):
            status, _, reply = server.call("POST", path, body, {"Authorization": f"Bearer {key}"})
            assert status == 200, reply
            usage = json.loads(reply)["usage"]
            for name in where:
                usage = usage[name]
            found.append(usage)
        assert found[1] >= 128, path

"""What the OpenAPI document says and what the server does agree: bodies made from the document, right and wrong ones.

Schemathesis makes the bodies; the server runs on the shipped pair. Whatever is sent, the reply has a status that the document
names and, unless it is 200, OpenAI's error shape; and afterwards the server still answers.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from tests.serve.harness import Running, serving, until

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
from schemathesis import GenerationMode  # noqa: E402

from outrider.serve.app import document  # noqa: E402

PATHS = ("/v1/completions", "/v1/chat/completions", "/outrider/play")
ALL = tuple(path for path, methods in document()["paths"].items() if "post" in methods)
KINDS = ("text_completion", "chat.completion", "response")
QUICK: dict[str, Any] = {"phases": (Phase.explicit, Phase.generate), "deadline": None, "database": None}
QUICK |= {"suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(scope="module")
def limited():
    """Its context holds 48 tokens, so that no reply is long."""
    with serving(slots=4, max_length=48) as running:
        yield running


def strategy(path: str, mode: Any) -> st.SearchStrategy[Any]:
    """Bodies of a route: as the document allows them, or broken in some place."""
    schema = schemathesis.openapi.from_dict(document())
    return schema[path]["POST"].as_strategy(generation_mode=mode).map(lambda case: case.body)


def judge(server: Running, path: str, body: Any) -> int:
    """Send a body; the reply must be one that the document names."""
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
    except (TypeError, ValueError):
        data = repr(body).encode("utf-8", "surrogatepass")
    status, headers, reply = server.call("POST", path, data)
    assert str(status) in document()["paths"][path]["post"]["responses"], (status, body)
    assert status < 500, (status, reply[:300])
    if status != 200:
        error = json.loads(reply)["error"]
        assert {"message", "type"} <= set(error) <= {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and error["message"]
        assert all(error.get(k) is None or isinstance(error[k], str) for k in ("param", "code"))
        assert path.startswith("/v1/messages") or len(error) == 4
    elif headers["content-type"].startswith("text/event-stream"):
        assert reply.endswith(
            (b"data: [DONE]\n\n", b"}\n\n") if path in ("/v1/responses", "/v1/messages") else b"data: [DONE]\n\n"
        )
    elif path in (*PATHS, "/v1/responses"):
        assert json.loads(reply)["object"] in KINDS
    else:
        assert isinstance(json.loads(reply), dict)
    return status


def named(body: Any) -> Any:
    """The same body for the model that is served: otherwise nearly every right one would be a 404."""
    return {**body, "model": "pycode"} if isinstance(body, dict) and isinstance(body.get("model"), str) else body


def run(server: Running, path: str, mode: Any, examples: int) -> Counter[int]:
    seen = Counter[int]()

    @bounded(max_examples=examples, **QUICK)
    @given(strategy(path, mode))
    def play(body: Any) -> None:
        seen[judge(server, path, named(body))] += 1

    play()
    until(lambda: not server.bridge.tickets and server.bridge.engine.scheduler.free == 4, 30)
    assert server.call("POST", "/v1/completions", {"model": "pycode", "prompt": "x", "max_tokens": 2})[0] == 200
    return seen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_bodies_made_from_the_document(limited: Running, path: str, mode: str) -> None:
    seen = run(limited, path, GenerationMode[mode], 6)
    assert set(seen) & ({200, 400} if mode == "POSITIVE" else {400})


@pytest.mark.parametrize("path", [path for path in ALL if path not in PATHS])
def test_bodies_of_the_newer_routes(limited: Running, path: str) -> None:
    assert 400 in run(limited, path, GenerationMode.NEGATIVE, 5)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in ALL if path not in PATHS])
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_two_hundred_bodies_of_the_newer_routes(limited: Running, path: str, mode: str) -> None:
    seen = run(limited, path, GenerationMode[mode], 200)
    print(f"\nT16: 200 {mode.lower()} bodies for {path} from the document, replies {dict(seen)}")
    assert seen[400] > 100 if mode == "NEGATIVE" else seen[200] + seen[400] > 100


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_many_bodies_made_from_the_document(limited: Running, path: str, mode: str) -> None:
    seen = run(limited, path, GenerationMode[mode], 2000)
    print(f"\nT16: 2000 {mode.lower()} bodies for {path} from the document, replies {dict(seen)}")


BYTES = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [
            b"\x00" * 64,
            b'{"model":"pycode","prompt":"\\ud800"}',
            b'{"model":"pycode","prompt":"\\u0000"}',
            b'\xef\xbb\xbf{"model":"pycode","prompt":"x"}',
            b'{"model":"pycode","prompt":"x","seed":-0}',
            b'{"model":"pycode","prompt":"x","seed":1e400}',
            b'{"model":"pycode","prompt":"x","seed":9223372036854775808}',
            b'{"model":"pycode","prompt":"x","n":1.0}',
            b'{"model":"pycode","prompt":"x","max_tokens":true}',
        ]
    ),
)


@bounded(max_examples=60, **QUICK)
@given(path=st.sampled_from(PATHS), data=BYTES, cut=st.integers(0, 60))
def test_bytes_that_are_no_body(limited: Running, path: str, data: bytes, cut: int) -> None:
    whole = b'{"model":"pycode","prompt":"x","max_tokens":1,"stop":["a"],"temperature":0.5}'
    for sent in (data, whole[:cut]):
        status, _, reply = limited.call("POST", path, sent)
        assert status < 500
        assert status == 200 or set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


BODIES: tuple[bytes, ...] = tuple(
    json.dumps(body).encode()
    for body in (
        {"model": "pycode", "prompt": "x", "max_tokens": 2, "stop": ["a"], "temperature": 0.5, "logit_bias": {"5": 1}},
        {"model": "pycode", "prompt": [[5, 6], [7]], "n": 2, "max_tokens": 1, "logprobs": 2, "seed": 3, "stream": True},
        {
            "model": "pycode",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 2,
            "top_p": 0.9,
            "min_p": 0.1,
        },
        {
            "model": "pycode",
            "prompt": "x",
            "max_tokens": 1,
            "response_format": {"type": "json_object"},
            "speculation": {"length": 1},
        },
    )
)
PIECES = (b"1e400", b"-0", b"9223372036854775808", b"NaN", b"null", b"true", b"1.5", b'""', b"[]", b"{}", b"0" * 400)
PIECES += (
    b'"\\ud800"',
    b'"\\u0000"',
    b"\xff\xfe",
    b"\x00",
    b"[" * 40,
    b'{"a":' * 40,
    b'"model":"pycode",',
    b"\r\n\r\n",
)


def mutated(body: bytes, draw: random.Random) -> bytes:
    """A body with one or two wounds: cut, flipped, doubled, swapped or with something else in it."""
    for _ in range(draw.randint(1, 2)):
        i, j = sorted((draw.randrange(len(body) + 1), draw.randrange(len(body) + 1)))
        values = [m.span() for m in re.finditer(rb'(?<=[:,\[ ])("[^"]*"|[-0-9.]+|true|false)', body)] or [(i, j)]
        low, high = draw.choice(values)
        body = draw.choice(
            (
                body[:i],
                body[:i] + body[j:],
                body[:j] + body[i:],
                body[:i] + bytes([draw.randrange(256)]) + body[i + 1 :],
                body[:i] + draw.choice(PIECES) + body[i:],
                body[:low] + draw.choice(PIECES) + body[high:],
                body[:low] + draw.choice(PIECES) + body[high:],
            )
        )
    return body


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_wounded_bodies(limited: Running, count: int) -> None:
    """Every reply is right or an error in OpenAI's shape, none is 5xx, and after every thousand the server still answers."""
    draw, seen = random.Random(count), Counter[int]()
    for i in range(count):
        body = draw.choice(BODIES)
        path = PATHS[1] if b"messages" in body else draw.choice((PATHS[0], PATHS[2]))
        seen[judge(limited, path if draw.random() < 0.8 else draw.choice(PATHS), mutated(body, draw))] += 1
        if i % 1000 == 999:
            assert limited.call("POST", PATHS[0], {"model": "pycode", "prompt": "x", "max_tokens": 2})[0] == 200
    until(lambda: not limited.bridge.tickets and limited.bridge.engine.scheduler.free == 4, 30)
    print(f"\nT16: {count} wounded bodies, replies {dict(seen)}; every probe answered")
    assert seen[400] > count / 2 and seen[200] > 0


@bounded(max_examples=40, **QUICK)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_any_path_is_answered(limited: Running, text: str) -> None:
    assert limited.call("GET", "/" + quote(text, safe=""))[0] in (200, 400, 404, 405)
    assert limited.call("GET", "/v1/models/" + quote(text, safe=""))[0] in (200, 404)


def test_an_address_or_method_that_is_not_there_is_explained(limited: Running) -> None:
    status, headers, reply = limited.call("POST", "/v1/embeddings", {"model": "pycode", "input": "x"})
    said = json.loads(reply)["error"]["message"]
    assert status == 404 and "/v1/embeddings" in said and "/openapi.json" in said
    status, headers, reply = limited.call("GET", "/v1/chat/completions")
    assert status == 405 and headers["allow"] == "POST" and "use POST" in json.loads(reply)["error"]["message"]

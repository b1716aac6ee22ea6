"""What a server must survive: clients that leave, too many, strangers, nonsense, failing and hanging engines, its end."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from outrider.serve.tickets import Limits
from tests.serve.harness import KEY, Running, serving, until

LONG = {"model": "pycode", "prompt": "def f(", "max_tokens": 900, "ignore_eos": True}
SHORT = {"model": "pycode", "prompt": "def f(", "max_tokens": 4}


def free(server: Running) -> int:
    return server.bridge.engine.scheduler.free


@pytest.mark.parametrize("manner", ["reset", "close"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots(server: Running, manner: str, n: int) -> None:
    sock = server.stream({**LONG, "n": n})
    assert free(server) <= 8 - 1
    if manner == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    steps = server.bridge.engine.steps
    sock.close()
    until(lambda: free(server) == 8 and not server.bridge.tickets)
    assert server.bridge.engine.steps - steps < 400  # and not because it had run to its end
    assert server.bridge.held == 0 and not server.bridge.worker.routes and not server.bridge.worker.queued


def test_a_client_that_leaves_before_a_whole_reply_frees_its_slot(server: Running) -> None:
    data = json.dumps(LONG).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
    sock.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
    until(lambda: free(server) == 7)
    sock.close()
    until(lambda: free(server) == 8 and not server.bridge.tickets)


@pytest.fixture(scope="module")
def small():
    """One slot, one place in the queue, a key, padded streams."""
    limits = Limits(queue=1, queue_seconds=0.8, request_seconds=60)
    with serving(keys=(KEY, "another-key-1"), limits=limits, slots=1, pad=True) as running:
        yield running


AUTH = {"Authorization": f"Bearer {KEY}"}


def test_a_full_queue_says_429_at_once_and_a_waiting_request_expires(small: Running) -> None:
    with small.stream(LONG, key=KEY):
        waiting: list[tuple[int, dict, bytes]] = []
        thread = threading.Thread(target=lambda: waiting.append(small.call("POST", "/v1/completions", SHORT, AUTH)))
        thread.start()
        until(lambda: small.bridge.held == 2)
        status, headers, body = small.call("POST", "/v1/completions", SHORT, AUTH)
        assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_error"), "who has waited is told 503"
        assert 1 <= int(headers["retry-after"]) <= 60
        thread.join(20)
    status, headers, body = waiting[0]
    assert status == 503
    assert "retry-after" in headers
    assert "too long" in json.loads(body)["error"]["message"]
    until(lambda: free(small) == 1 and small.bridge.held == 0)
    assert small.call("POST", "/v1/completions", SHORT, AUTH)[0] == 200
    assert small.call("POST", "/v1/completions", {**SHORT, "n": 3}, AUTH)[0] == 400  # could never be held


def test_every_route_but_health_asks_for_the_key(small: Running) -> None:
    from outrider.serve.app import create_app
    from outrider.serve.settings import Settings

    paths = [r.path for r in create_app(lambda: None, Settings("x")).routes]  # type: ignore[attr-defined, return-value, arg-type]
    assert len(paths) >= 12
    tricks = [
        "//health",
        "/health/",
        "/HEALTH",
        "/health/../metrics",
        "/%68ealth/x",
        "/v1//models",
        "/health;/metrics",
        "/nope",
    ]
    for path in [p.replace("{id:path}", "pycode") for p in paths] + tricks:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}x"}, {"Host": "health"}):
            status, _, body = small.call("GET", path, headers=headers)
            assert status == (200 if path == "/health" else 401), path
            assert path == "/health" or json.loads(body)["error"]["code"] == "invalid_api_key"
    basic = {"Authorization": "Basic OmFub3RoZXIta2V5LTE="}  # ":another-key-1"
    assert small.call("GET", "/", headers=basic)[0] == 200
    assert small.call("GET", "/metrics", headers=AUTH)[0] == 200
    assert "Basic" in small.call("GET", "/")[1]["www-authenticate"]


def test_padded_streams_have_even_frames(small: Running) -> None:
    _, _, body = small.call(
        "POST", "/v1/completions", {**SHORT, "max_tokens": 40, "stream": True, "ignore_eos": True}, AUTH
    )
    frames = body.removesuffix(b"data: [DONE]\n\n").split(b"}\n\n")[:-1]
    assert len(frames) >= 2
    assert all((len(f) + 3) % 256 == 0 for f in frames)


def test_a_foreign_host_name_is_refused_without_a_key(server: Running) -> None:
    assert server.call("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert server.call("GET", "/v1/models", headers={"Host": "localhost:1"})[0] == 200


BAD = [
    ({"prompt": "x"}, "model"),
    ({"model": "pycode"}, "prompt"),
    ({**SHORT, "temprature": 1}, "temprature"),
    ({**SHORT, "temperature": "1"}, "temperature"),
    ({**SHORT, "temperature": 1e6}, "temperature"),
    ({**SHORT, "n": 65}, "n"),
    ({**SHORT, "max_tokens": 0}, "max_tokens"),
    ({**SHORT, "prompt": []}, "prompt"),
    ({**SHORT, "prompt": [1, -2]}, "prompt"),
    ({**SHORT, "prompt": "\ud800"}, "prompt"),
    ({**SHORT, "stop": [""]}, "stop"),
    ({**SHORT, "stop": ["a"] * 17}, "stop"),
    ({**SHORT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**SHORT, "echo": "yes"}, "echo"),
    ({**SHORT, "best_of": 4}, "best_of"),
    ({**SHORT, "speculation": {"lenght": 2}}, "speculation.lenght"),
    ({**SHORT, "speculation": {"length": 9}}, "speculation.length"),
    ({**SHORT, "speculation": {"rule": "typical"}}, "speculation.rule"),
    ({**SHORT, "speculation": {"tv_budget": 0.5}}, "speculation.tv_budget"),
    ({**SHORT, "prediction": {"type": "content", "content": 3}}, "prediction.content"),
    ([], None),
    ("text", None),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_a_bad_field_is_named(server: Running, body: object, param: str | None) -> None:
    status, _, reply = server.call("POST", "/v1/completions", body)
    error = json.loads(reply)["error"]
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", None)
    assert (error["param"] or "").split(".")[: len((param or "").split("."))] == (param or "").split(".")
    assert set(error) == {"message", "type", "param", "code"}


HALF = "\ud800"
SAID = {"model": "pycode", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def with_tool(**function: object) -> dict[str, object]:
    return {**SAID, "tools": [{"type": "function", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", with_tool(parameters={HALF: {}}), "tools"),
        ("/v1/chat/completions", with_tool(description=HALF), "tools"),
        ("/v1/chat/completions", {**SAID, "chat_template_kwargs": {"a": [{"b": HALF}]}}, "chat_template_kwargs"),
        ("/v1/responses", {"model": "pycode", "input": "x", "tools": [{"type": "function", "name": HALF}]}, "tools"),
        ("/v1/messages", {**SAID, "tools": [{"name": "f", "input_schema": {"enum": [HALF]}}]}, "tools"),
        ("/tokenize", {"model": "pycode", "messages": SAID["messages"], "tools": [{"x": HALF}]}, "tools"),
        ("/v1/completions", {**SHORT, HALF: 1}, "?"),
        ("/v1/completions", [HALF], None),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(
    server: Running, path: str, body: object, param: str | None
) -> None:
    """Also in what is free of form: a name or a text of a tool's schema, which a template would be given."""
    status, _, reply = server.call("POST", path, body)
    error = json.loads(reply)["error"]
    assert status == 400 and error["param"] == param and "half a surrogate pair" in error["message"]
    whole = json.loads(json.dumps(body).replace("\\ud800", "\\ud83d\\ude00"))
    again = server.call("POST", path, whole)
    assert again[0] in (200, 400) and b"surrogate" not in again[2], "two halves are a character"


def test_the_nearest_field_is_named(server: Running) -> None:
    for body, near in (
        ({**SHORT, "temprature": 1}, "temperature"),
        ({**SHORT, "speculation": {"lenght": 1}}, "length"),
    ):
        assert (
            f"did you mean {near!r}" in json.loads(server.call("POST", "/v1/completions", body)[2])["error"]["message"]
        )
    chat = {"model": "pycode", "messages": [{"role": "user", "content": "x", "nmae": "y"}]}
    assert "'name'" in json.loads(server.call("POST", "/v1/chat/completions", chat)[2])["error"]["message"]
    for field, value in (("tools", [{}]), ("response_format", {"type": "xml"}), ("store", 1)):
        chat = {"model": "pycode", "messages": [{"role": "user", "content": "x"}], field: value}
        assert server.call("POST", "/v1/chat/completions", chat)[0] == 400


def test_response_formats(server: Running) -> None:
    """A JSON schema holds under speculation; a type without its schema is refused."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**SHORT, "prompt": "x = ", "max_tokens": 60, "seed": 3, "response_format": wanted}
    status, _, answer = server.call("POST", "/v1/completions", body)
    assert status == 200, answer
    choice = json.loads(answer)["choices"][0]
    assert status == 200
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"])["a"], int)
    for bad in ({"type": "json_schema"}, {"type": "text", "json_schema": {"schema": schema}}):
        assert server.call("POST", "/v1/completions", {**SHORT, "response_format": bad})[0] == 400


def test_requests_the_engine_refuses(server: Running) -> None:
    too_long = server.call("POST", "/v1/completions", {**SHORT, "prompt": [5] * 2000})
    assert too_long[0] == 400
    assert json.loads(too_long[2])["error"]["code"] == "context_length_exceeded"
    for body in ({**SHORT, "prompt": ""}, {**SHORT, "prompt": [999_999]}, {**SHORT, "logit_bias": {"999999": 1}}):
        assert server.call("POST", "/v1/completions", body)[0] == 400
    assert server.call("POST", "/v1/completions", {**SHORT, "prompt": ["x", ""]})[0] == 400  # all or nothing
    until(lambda: server.bridge.held == 0 and free(server) == 8 and not server.bridge.worker.routes)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"\xff", {}, 400),
        (b'{"model":', {}, 400),
        (b'{"model":"pycode","model":"pycode","prompt":"x"}', {}, 400),
        (b'{"model":"pycode","prompt":"x","temperature":NaN}', {}, 400),
        (b'{"model":"pycode","prompt":"x","temperature":1e999}', {}, 400),
        (b'{"model":"pycode","prompt":"x","moderation":[{"a":-1e999}]}', {}, 400),
        (b'{"model":"pycode","prompt":"x","seed":' + b"9" * 5000 + b"}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b" " * 2_000_001, {}, 413),
        (b"{}", {"Content-Encoding": "gzip"}, 415),
    ],
)
def test_hostile_bodies(server: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/outrider/play"):
        got, _, reply = server.call("POST", path, body, headers)
        assert got == status
        assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "n", "stop", "seed", "logit_bias", "temperature", "stream_options", "logprobs", "prediction"]
)


@bounded(max_examples=40)
@given(st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=4))
def test_no_body_makes_the_server_fail(server: Running, fields: dict) -> None:
    status, _, reply = server.call(
        "POST", "/v1/completions", {"model": "pycode", "prompt": "x", "max_tokens": 1, **fields}
    )
    assert status in (200, 400, 404)
    assert status == 200 or set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


def test_every_field_of_every_body_is_bounded(server: Running) -> None:
    """Walks the OpenAPI document, which is made from the models that check the bodies."""
    document = json.loads(server.call("GET", "/openapi.json")[2])

    def walk(node: dict, where: str) -> None:
        if "enum" in node or "const" in node or "$ref" in node:
            return
        for branch in node.get("anyOf", []):
            walk(branch, where)
        kind = node.get("type")
        if kind == "string":
            assert "maxLength" in node, where
        elif kind in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(node) and "maximum" in node, where
        elif kind == "array":
            assert "maxItems" in node, where
            walk(node.get("items", {}), where + "[]")
        elif kind == "object":
            assert node.get("additionalProperties") is False or "maxProperties" in node, where
            for name, inner in node.get("properties", {}).items():
                walk(inner, f"{where}.{name}")
            if isinstance(node.get("additionalProperties"), dict):
                walk(node["additionalProperties"], where + "{}")

    schemas = document["components"]["schemas"]
    assert {"CompletionRequest", "ChatRequest", "Speculation", "Message"} <= set(schemas)
    for name, schema in schemas.items():
        walk(schema, name)


def test_no_text_of_requests_in_logs(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.call("POST", "/v1/completions", {**SHORT, "prompt": "canary-7731"})
        server.call("POST", "/v1/completions", {**SHORT, "prompt": "canary-7731", "canary-7731": 1})
    assert "canary-7731" not in caplog.text

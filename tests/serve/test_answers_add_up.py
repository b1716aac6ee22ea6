"""What a reply says of its tokens is true: accepted drafts, bytes and offsets of log-probabilities, and a drafter that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from outrider.build import build_engine
from tests.serve.harness import Running, serving

TEXT = "for i in range(10):\n    print(i)\nfor i in range(10):\n    print(i)\nfor i in range(10):\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """With drafts in every step, whatever the load of the machine."""
    with serving(slots=4, length=8, fixed=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as one:
        yield one


def ask(server: Running, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    prompt = {} if "messages" in body else {"prompt": TEXT}
    status, _, reply = server.call("POST", path, {"model": "pycode", **prompt, **body})
    assert status == 200, reply
    return json.loads(reply)


def counters(server: Running) -> dict[str, float]:
    lines = server.call("GET", "/metrics")[2].decode().splitlines()
    return {x.split("{")[0].split()[0]: float(x.split()[-1]) for x in lines if x and not x.startswith("#")}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", ["\n", "(", "print"])
def test_no_more_drafts_are_accepted_than_tokens_written(server: Running, temperature: float, stop: str) -> None:
    for seed in range(4):
        reply = ask(server, max_tokens=50, temperature=temperature, seed=seed, stop=stop)
        said, written = reply["metrics"]["speculative_decoding"], reply["usage"]["completion_tokens"]
        assert said["num_accepted_draft_tokens"] <= written
        assert said["mean_acceptance_length"] * said["num_spec_steps"] <= written + 1e-9
        assert sum(said["acceptance_histogram"]) == said["num_spec_steps"]


def test_acceptance_of_a_request_adds_up(client: openai.OpenAI) -> None:
    """The identities that vLLM's readers of these metrics check."""
    reply = client.completions.create(model="pycode", prompt=TEXT, max_tokens=60, extra_body={"ignore_eos": True})
    m = reply.model_dump()["metrics"]["speculative_decoding"]
    h = m["acceptance_histogram"]
    assert sum(h) == m["num_spec_steps"] > 0
    assert sum(j * x for j, x in enumerate(h)) == m["num_accepted_draft_tokens"] <= m["num_draft_tokens"]
    assert len(h) == m["num_spec_tokens"] + 1
    assert m["mean_acceptance_length"] == pytest.approx(1 + m["num_accepted_draft_tokens"] / m["num_spec_steps"])


def test_a_prediction_is_used_and_accounted_for(client: openai.OpenAI) -> None:
    body = {"model": "pycode", "prompt": "def read(path):\n    ", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    text = client.completions.create(**body).choices[0].text
    again = client.completions.create(**body, extra_body={"prediction": {"type": "content", "content": text}})
    assert again.choices[0].text == text
    details = again.usage.completion_tokens_details
    assert details.accepted_prediction_tokens >= 20
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens >= 38
    assert client.completions.create(**body).usage.completion_tokens_details is None


def test_logprobs_of_parts_of_characters(server: Running) -> None:
    """Every alternative has a key of its own, bytes are the token's, and offsets point into the text."""
    const = "日本 a 😀\u00e9z"
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": const}}}
    choice = ask(server, max_tokens=60, temperature=0, logprobs=6, response_format=shape)["choices"][0]
    text, told = choice["text"], choice["logprobs"]
    assert json.loads(text) == const
    assert {len(x) for x in told["top_logprobs"]} == {6}
    size = [len(text[:at].encode()) for at in told["text_offset"]]
    assert told["text_offset"] == sorted(told["text_offset"]) and max(told["text_offset"]) <= len(text)
    for token, at, value, top in zip(
        told["tokens"], told["text_offset"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        if "\ufffd" not in token:
            assert text[at : at + len(token)] == token
        assert top.get(token, value) == value
    messages = [{"role": "user", "content": "x"}]
    content = ask(
        server, "/v1/chat/completions", messages=messages, max_tokens=60, temperature=0, logprobs=True,
        top_logprobs=3, response_format=shape,
    )["choices"][0]["logprobs"]["content"]  # fmt: skip
    spelled = b"".join(bytes(entry["bytes"]) for entry in content)
    assert json.loads(spelled) == const and size
    assert all(len({tuple(t["bytes"]) for t in entry["top_logprobs"]}) == 3 for entry in content)


def test_a_drafter_that_fails_ends_nobodys_request() -> None:
    """The text of a server without drafts, a counter in the metrics, and a server that is well."""
    engine, plain = build_engine(slots=2, length=4, rule="match"), build_engine(slots=2, draft="none", rule="match")
    calls = iter(range(10**9))
    parts = getattr(engine.parts.drafter, "parts", (engine.parts.drafter,))
    for part in parts:
        inner = part.draft

        def draft(evidence: Any, budget: Any, inner: Any = inner) -> Any:
            if next(calls) % 3 == 1:
                raise RuntimeError("no memory for drafts")
            return inner(evidence, budget)

        part.draft = draft
    body = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    with serving(engine=plain, fixed=True) as other:
        wanted = ask(other, **body)["choices"][0]["text"]
    with serving(engine=engine, fixed=True) as running:
        for _ in range(4):
            assert ask(running, **body)["choices"][0]["text"] == wanted
        found = counters(running)
        assert found["outrider_drafter_faults_total"] >= 3
        assert found["outrider_incidents_total"] >= found["outrider_drafter_faults_total"]
        assert running.call("GET", "/ready")[0] == 200

"""Echo, log-probabilities of prompts, bans, structured outputs, and the tokenizer's routes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from outrider.build import build_engine
from outrider.errors import RequestError
from outrider.serve.echo import check_scores
from outrider.types import Draft, Rows
from tests.compilers import COMPILER
from tests.serve.harness import Running, serving

PROMPT = "def read(path):\n    return open(path).read()\n"
NEAR = 2e-4 if COMPILER else 5e-3
"""Log-probabilities in bfloat16; without the native decoder they depend on how many rows are computed together."""


def post(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    status, _, data = server.call("POST", path, {"model": "pycode", **body})
    found = json.loads(data)
    assert status == 200, found
    return found


def refused(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> str:
    status, _, data = server.call("POST", path, {"model": "pycode", **body})
    assert status == 400, data
    return json.loads(data)["error"]["param"]


@pytest.fixture(scope="module")
def scores() -> tuple[list[int], torch.Tensor]:
    """The prompt's ids and the target's log-probabilities behind each, row by row."""
    engine = build_engine(draft="none", slots=1)
    ids, target = engine.encode(PROMPT), engine.parts.target
    kv, rows = target.new_kv(1, len(ids) + 1), []
    with torch.inference_mode():
        for at, token in enumerate(ids):
            one = Rows.assemble([0], [[token]], [at], Draft.empty(1))
            kv.reserve(one)
            rows.append(target.forward(one, kv).logits[0].float().log_softmax(-1))
            kv.commit(one, [[]])
    return ids, torch.stack(rows)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_echo_has_the_log_probabilities_of_the_prompt(server: Running, scores: Any, most: int) -> None:
    ids, rows = scores
    body = {"prompt": [ids, ids[:3]], "max_tokens": most, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    reply = post(server, body)
    for choice, prompt in zip(reply["choices"], (ids, ids[:3]), strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert len(found["tokens"]) == len(found["text_offset"]) <= len(prompt) + most
        for i, token in enumerate(prompt[1:], 1):
            assert found["token_logprobs"][i] == pytest.approx(float(rows[i - 1, token]), abs=NEAR)
            greedy = found["token_logprobs"][i] == max(found["top_logprobs"][i].values())
            assert greedy == (int(rows[i - 1].argmax()) == token)
        assert "".join(found["tokens"]) == choice["text"]
    assert reply["choices"][0]["text"].startswith(PROMPT)
    plain = {**body, "prompt": [ids], "echo": False, "max_tokens": max(most, 1)}
    if most:
        said = post(server, plain)["choices"][0]
        assert reply["choices"][0]["text"] == PROMPT + said["text"]
        assert reply["choices"][0]["finish_reason"] == said["finish_reason"]
        ours = reply["choices"][0]["logprobs"]["token_logprobs"][len(ids) :]
        assert ours == pytest.approx(said["logprobs"]["token_logprobs"], abs=NEAR)


def test_prompt_logprobs(server: Running, scores: Any) -> None:
    ids, rows = scores
    found = post(server, {"prompt": ids, "max_tokens": 2, "prompt_logprobs": 2})["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for i, token in enumerate(ids[1:], 1):
        own = found[i][str(token)]
        assert own["logprob"] == pytest.approx(float(rows[i - 1, token]), abs=NEAR)
        assert own["rank"] == int((rows[i - 1] > rows[i - 1, token]).sum()) + 1
        assert str(int(rows[i - 1].argmax())) in found[i]
    chat = {"messages": [{"role": "user", "content": "x = 1"}], "max_tokens": 1, "prompt_logprobs": 0}
    assert post(server, chat, "/v1/chat/completions")["prompt_logprobs"][0] is None


def test_each_list_of_likely_tokens_has_the_length_that_was_asked_for(server: Running, scores: Any) -> None:
    ids, _ = scores
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "prompt_logprobs": 4, "echo": True}
    alone = post(server, body)["choices"][0]
    assert len(alone["logprobs"]["top_logprobs"][-1]) == 1
    assert max(len(entry) for entry in alone["prompt_logprobs"][1:]) in (4, 5)
    stepped = post(server, {**body, "logit_bias": {"1": 0.0}})["choices"][0]  # decoded by a step of the engine
    assert alone["logprobs"]["tokens"] == stepped["logprobs"]["tokens"] and alone["text"] == stepped["text"]
    assert alone["logprobs"]["text_offset"] == stepped["logprobs"]["text_offset"]


def test_the_scores_of_one_reply_are_bounded() -> None:
    check_scores([[0] * 1024] * 64, 1, 1)  # a batch of an evaluation
    for prompts, samples, top in (([[0] * 1024] * 64, 1, 20), ([[0] * 1024], 64, 20)):
        with pytest.raises(RequestError, match="fewer"):
            check_scores(prompts, samples, top)


def test_allowed_tokens_and_banned_words(server: Running) -> None:
    engine = build_engine(draft="none", slots=1)
    allowed = engine.encode("return path")[:2]
    body = {"prompt": PROMPT, "max_tokens": 24, "seed": 3, "return_token_ids": True, "ignore_eos": True}
    for mode in ("auto", "off"):
        given = {**body, "speculation": {"mode": mode}}
        only = post(server, {**given, "allowed_token_ids": allowed})["choices"][0]["token_ids"]
        assert set(only) <= set(allowed)
        plain = post(server, {**given, "temperature": 0})["choices"][0]["text"]
        word = plain.split()[0]
        assert word not in post(server, {**given, "temperature": 0, "bad_words": [word]})["choices"][0]["text"].split()


def test_structured_outputs(server: Running) -> None:
    def ask(**more: Any) -> str:
        return post(server, {"prompt": "x", "max_tokens": 60, "structured_outputs": more})["choices"][0]["text"]

    assert ask(choice=["alpha", "beta"]) in ("alpha", "beta")
    assert ask(regex="[ab]{3}c").endswith("c")
    assert ask(grammar='start: "yes" | "no"') in ("yes", "no")
    assert json.loads(ask(json={"const": "<pad>"})) == "<pad>"
    assert json.loads(ask(json='{"enum": [1, null]}')) in (1, None)
    assert refused(server, {"prompt": "x", "structured_outputs": {}}) == "structured_outputs"
    assert (
        refused(server, {"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}) == "structured_outputs"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "stream": True}, "echo"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"suffix": "return x"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
    ],
)
def test_refusals(server: Running, body: dict[str, Any], param: str) -> None:
    assert refused(server, {"prompt": "x", **body}) == param


def test_the_tokenizers_routes(server: Running) -> None:
    found = post(server, {"prompt": PROMPT, "return_token_strs": True}, "/tokenize")
    assert found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == PROMPT
    assert post(server, {"tokens": found["tokens"]}, "/detokenize") == {"prompt": PROMPT}
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    assert post(server, chat, "/tokenize")["count"] >= found["count"]
    info = json.loads(server.call("GET", "/tokenizer_info")[2])
    assert info["eos_token"]
    assert refused(server, {"tokens": [1 << 20]}, "/detokenize") == "tokens"
    assert refused(server, {}, "/tokenize") is None


def test_pages_of_named_origins_may_call() -> None:
    origin = {"Origin": "http://localhost:3000"}
    asks = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serving(keys=("a-key-12345",), draft="none", slots=1, cors=("http://localhost:3000",)) as running:
        status, headers, _ = running.call("OPTIONS", "/v1/completions", None, asks)
        assert status == 200 and headers["access-control-allow-origin"] == "http://localhost:3000"
        other = running.call("OPTIONS", "/v1/completions", None, {**asks, "Origin": "http://elsewhere"})
        assert "access-control-allow-origin" not in other[1]
        assert running.call("GET", "/v1/models", None, origin)[0] == 401

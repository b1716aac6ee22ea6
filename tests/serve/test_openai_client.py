"""The official client against a real server: what it understands, and that streaming changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from outrider.assets import shipped_prompts
from outrider.build import build_engine
from outrider.params import SamplingParams
from tests.serve.harness import Running

PROMPT = "def read(path):\n    "


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as one:
        yield one


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["pycode"]
    assert client.models.retrieve("pycode").id == "pycode"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_completion_is_the_engines_own(client: openai.OpenAI) -> None:
    """Greedy text over HTTP is what the engine says in process without any draft."""
    reply = client.completions.create(model="pycode", prompt=PROMPT, max_tokens=40, temperature=0)
    plain = build_engine(draft="none", slots=1).generate([PROMPT], SamplingParams(temperature=0, max_tokens=40))[0]
    assert reply.choices[0].text == plain.text
    assert reply.choices[0].finish_reason == plain.outputs[0].finish_reason
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(plain.outputs[0].token_ids)
    assert reply.usage.prompt_tokens == len(plain.prompt)


@pytest.mark.parametrize("prompt", ["def f(", [5, 6, 7], ["def f(", "class A"], [[5, 6], [7, 8, 9]]])
def test_the_four_kinds_of_prompt(client: openai.OpenAI, prompt) -> None:
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    reply = client.completions.create(model="pycode", prompt=prompt, max_tokens=3, n=2, extra_body={"ignore_eos": True})
    assert [c.index for c in reply.choices] == list(range(2 * count))
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6 * count


def test_a_seed_is_reproducible_whatever_runs_beside_it(client: openai.OpenAI) -> None:
    ask = {"model": "pycode", "prompt": PROMPT, "max_tokens": 32, "seed": 11, "n": 3}
    alone = [c.text for c in client.completions.create(**ask).choices]
    with client.completions.create(model="pycode", prompt="import", max_tokens=200, stream=True) as other:
        next(iter(other))
        beside = [c.text for c in client.completions.create(**ask).choices]
    assert alone == beside
    assert len(set(alone)) == 3


def streamed(client: openai.OpenAI, **ask) -> tuple[dict[int, str], dict[int, str | None], int]:
    texts: dict[int, str] = {}
    ends: dict[int, str | None] = {}
    usage = -1
    with client.completions.create(stream=True, stream_options={"include_usage": True}, **ask) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                assert choice.index not in ends
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.finish_reason:
                    ends[choice.index] = choice.finish_reason
            if chunk.usage is not None:
                assert chunk.choices == []
                usage = chunk.usage.completion_tokens
    return texts, ends, usage


@bounded(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    prompt=st.sampled_from([*shipped_prompts()[:3], "# naïve café ☃ ", "x = '\U0001f40d日本"]),
    stop=st.lists(st.sampled_from([":\n", "self", "e", " = ", "é", "\n\n"]), max_size=3, unique=True),
    temperature=st.sampled_from([0.0, 0.8, 1.6]),
    bias=st.sampled_from([{}, {str(t): 8.0 for t in range(130, 230)}]),  # bytes of multi-byte characters become likely
)
def test_streaming_changes_nothing(client, seed, prompt, stop, temperature, bias) -> None:
    ask = {
        "model": "pycode",
        "prompt": prompt[-400:],
        "max_tokens": 24,
        "seed": seed,
        "n": 2,
        "temperature": temperature,
    }
    ask |= {"stop": stop} if stop else {}
    ask |= {"logit_bias": bias} if bias else {}
    whole = client.completions.create(**ask)
    texts, ends, usage = streamed(client, **ask)
    assert [texts.get(c.index, "") for c in whole.choices] == [c.text for c in whole.choices]
    assert [ends[c.index] for c in whole.choices] == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage.completion_tokens
    assert not any(s in c.text for c in whole.choices for s in stop)


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    """The shipped pair has no template: it continues the messages' texts, a line each."""
    messages = [
        {"role": "system", "content": "# a module"},
        {"role": "user", "content": [{"type": "text", "text": "def f("}]},
    ]
    ask = {"model": "pycode", "messages": messages, "max_completion_tokens": 20, "seed": 4}
    whole = client.chat.completions.create(**ask)
    with client.chat.completions.create(stream=True, **ask) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    text = client.completions.create(model="pycode", prompt="# a module\ndef f(", max_tokens=20, seed=4)
    assert whole.choices[0].message.content == text.choices[0].text


def test_logprobs_in_both_shapes(client: openai.OpenAI) -> None:
    legacy = client.completions.create(model="pycode", prompt=PROMPT, max_tokens=8, seed=2, logprobs=2, stop=["zzz"])
    chat = client.chat.completions.create(
        model="pycode",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        seed=2,
        logprobs=True,
        top_logprobs=2,
    )
    old, new = legacy.choices[0].logprobs, chat.choices[0].logprobs
    assert old is not None and old.tokens is not None and new is not None and new.content is not None
    assert old.tokens == [e.token for e in new.content]
    assert old.token_logprobs == pytest.approx([e.logprob for e in new.content], abs=1e-5)
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].logprob >= e.top_logprobs[1].logprob for e in new.content)
    assert "".join(old.tokens) == legacy.choices[0].text
    assert all(bytes(e.bytes).decode() == e.token for e in new.content if e.bytes is not None)


def test_bias_and_stop_tokens(client: openai.OpenAI) -> None:
    only = client.completions.create(
        model="pycode",
        prompt=PROMPT,
        max_tokens=5,
        logit_bias={"300": 100},
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    assert only.choices[0].model_dump()["token_ids"] == [300] * 5
    stopped = client.completions.create(
        model="pycode", prompt=PROMPT, max_tokens=5, logit_bias={"300": 100}, extra_body={"stop_token_ids": [300]}
    )
    assert stopped.choices[0].finish_reason == "stop"


def test_speculation_off_is_plain(client: openai.OpenAI) -> None:
    ask = {"model": "pycode", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    off = client.completions.create(**ask, extra_body={"speculation": {"mode": "off"}})
    on = client.completions.create(**ask, extra_body={"speculation": {"length": 2}})
    assert off.model_dump()["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    assert off.choices[0].text == on.choices[0].text


def test_metrics_count_what_was_served(server: Running, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = server.call("GET", "/metrics")[2].decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    before = read()
    reply = client.completions.create(model="pycode", prompt=PROMPT, max_tokens=50, extra_body={"ignore_eos": True})
    after = read()
    assert reply.usage is not None
    label = '{engine="0",model_name="pycode"}'
    for name, count in (("generation_tokens_total", 50), ("prompt_tokens_total", reply.usage.prompt_tokens)):
        assert after[f"vllm:{name}{label}"] - before[f"vllm:{name}{label}"] == count
    ours = '{model_name="pycode"}'
    drafted = "outrider_spec_decode_num_draft_tokens_total" + ours
    assert after[drafted] == after["vllm:spec_decode_num_draft_tokens_total" + label]
    judged = sum(v for k, v in after.items() if k.startswith("outrider_spec_decode_judged_tokens_total"))
    assert (
        judged
        == after["outrider_spec_decode_num_accepted_tokens_total" + ours]
        + after["outrider_spec_decode_rejections_total" + ours]
    )
    assert not any(PROMPT[:8] in k for k in after)


def test_the_page_and_its_data(server: Running) -> None:
    status, headers, page = server.call("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in page
    state = json.loads(server.call("GET", "/outrider/state")[2])
    assert state["ledger"]["agrees"]
    body = {"model": "pycode", "prompt": PROMPT, "max_tokens": 30, "seed": 5, "ignore_eos": True}
    stream = server.call("POST", "/outrider/play", body)[2].decode()
    parts = [json.loads(x[6:]) for x in stream.split("\n\n") if x.startswith("data: {")]
    text = "".join(piece for part in parts for piece, _ in part["pieces"])
    origins = {origin for part in parts for _, origin in part["pieces"]}
    assert text == json.loads(server.call("POST", "/v1/completions", body)[2])["choices"][0]["text"]
    assert origins <= {"accepted", "corrected", "bonus", "sampled"}
    assert "accepted" in origins
    assert parts[-1]["tokens"] == 30
    for more in ({"echo": True, "max_tokens": 0}, {"prompt_logprobs": 0}):
        status, _, data = server.call("POST", "/outrider/play", {**body, **more})
        assert status == 400 and json.loads(data)["error"]["param"] == next(iter(more))

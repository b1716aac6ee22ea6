"""A coding agent's session recorded as ten streamed requests, sampled with seeds by a noisy model behind a server: every call is
valid, and drafts change nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.serve.chatserver import SCRIPTS, chat_engine
from tests.serve.harness import serving

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(properties)[:1], "additionalProperties": False}}}
    for name, properties in (
        ("read_file", {"path": {"type": "string", "maxLength": 24}, "line": {"type": "integer", "minimum": 1, "maximum": 999}}),
        ("edit", {"path": {"type": "string", "maxLength": 24}, "how": {"type": "string", "enum": ["insert", "replace"]}}),
        ("run", {"command": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3}}),
    )
]  # fmt: skip
ANSWERS = [
    '{"name": "read_file", "arguments": {"path": "src/a.py", "line": 3}}', '{"name": "edit", "arguments": {"path": "src/a.py"}}',
    '{"name": "run", "arguments": {"command": ["make", "test"]}}',
]  # fmt: skip


TURNS = 10
SLOTS = 16
SCHEMAS = {t["function"]["name"]: jsonschema_rs.validator_for(t["function"]["parameters"]) for t in TOOLS}  # type: ignore[index]


def recorded() -> list[dict[str, Any]]:
    """The requests of a session, each with the turns before it; the choices alternate."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You edit code."},
        {"role": "user", "content": "fix it"},
    ]
    out = []
    for i in range(TURNS):
        out.append(
            {"model": "scripted", "messages": messages, "tools": TOOLS, "tool_choice": ("required", "auto")[i % 2]}
        )
        call = json.loads(ANSWERS[i % 3])
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        said = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"c{i}", "type": "function", "function": function}],
        }
        messages = [*messages, said, {"role": "tool", "tool_call_id": f"c{i}", "content": f"result {i}"}]
    return out


def follow_the_session() -> None:
    """Teach the model what the agent of the record did next."""
    for i in range(TURNS):
        SCRIPTS[f"result {i}"] = f"<tool_call>\n{ANSWERS[(i + 1) % 3]}\n</tool_call>"
    SCRIPTS["fix it"] = f"<tool_call>\n{ANSWERS[0]}\n</tool_call>"


@dataclass
class Reply:
    """What a client joins from a stream. calls: name and arguments by index."""

    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    finish: str | None = None
    tokens: int = 0

    def add(self, chunk: Any) -> None:
        """Join a chunk; an id and a name come once for each call."""
        if chunk.usage is not None:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.text += choice.delta.content or ""
            self.finish = choice.finish_reason or self.finish
            for piece in choice.delta.tool_calls or []:
                if piece.id is not None:
                    assert piece.index not in self.calls
                    self.calls[piece.index] = [piece.function.name, ""]
                else:
                    assert piece.function.name is None
                self.calls[piece.index][1] += piece.function.arguments or ""

    def check(self, choice: str) -> None:
        """Every finished call is of a tool that was given, and its arguments follow the tool's schema."""
        if self.finish == "length":
            return
        assert self.calls or choice == "auto", self
        assert self.finish == ("tool_calls" if self.calls else "stop")
        for name, arguments in self.calls.values():
            SCHEMAS[name].validate(json.loads(arguments))


async def asked(client: openai.AsyncOpenAI, request: dict[str, Any], seed: int, drafts: bool) -> Reply:
    body = {} if drafts else {"speculation": {"mode": "off"}}
    reply = Reply()
    async for chunk in await client.chat.completions.create(
        **request, seed=seed, max_tokens=220, stream=True, stream_options={"include_usage": True}, extra_body=body
    ):
        reply.add(chunk)
    return reply


async def sessions(url: str, seeds: Sequence[int]) -> list[Reply]:
    """The replies to sessions of these seeds, as many requests at once as the engine has slots; drafts must change none of them."""
    record, places = recorded(), asyncio.Semaphore(SLOTS // 2)

    async def turn(client: openai.AsyncOpenAI, seed: int, number: int) -> Reply:
        async with places:
            request, own = record[number], TURNS * seed + number
            fast, slow = await asyncio.gather(*(asked(client, request, own, drafts) for drafts in (True, False)))
        assert fast == slow
        fast.check(request["tool_choice"])
        return fast

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600) as client:
        return await asyncio.gather(*(turn(client, seed, number) for seed in seeds for number in range(TURNS)))


def replies(seeds: Sequence[int]) -> list[Reply]:
    """The same, of a server of its own; it must have drafted and been rejected, or nothing was compared."""
    follow_the_session()
    engine = chat_engine("hermes", SLOTS, noise=1.0, sure=4.0, rule="match")
    with serving(engine=engine, model="scripted", fixed=True) as running:
        found = asyncio.run(sessions(running.url, seeds))
        counts = running.bridge.metrics.counts
        assert counts.accepted > 5 * len(found) and counts.rejected > len(found)
    return found


def test_a_seeded_session_makes_valid_calls_that_drafts_do_not_change() -> None:
    found = replies(range(1))
    assert sum(len(r.calls) for r in found) >= TURNS // 2 and len({r.tokens for r in found}) > 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_seeded_sessions() -> None:
    found = replies(range(200))
    calls = [tuple(map(tuple, r.calls.values())) for r in found]
    assert len(found) == 200 * TURNS and len(set(calls)) > 400 and sum(map(len, calls)) > 1000
    cut = sum(r.finish == "length" for r in found)
    print(f"{len(found)} replies, {sum(map(len, calls))} calls, {cut} cut, {len(set(calls))} different")

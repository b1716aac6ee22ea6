"""Streamed text equals whole text byte for byte: 10,000 replies with multi-byte characters and stop strings across all borders.

The target plays a written text, token by token, and the drafter proposes it in runs of random length with random mistakes, so a
stop string or a character ends at any place of any accepted run. Everything between the request's body and the bytes of the reply
is the server's own: bridge, engine, text layer, replies. An oracle that knows nothing of streams says what the text should be.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from outrider.build import Engine
from outrider.nn.kv import PagedKV
from outrider.serve.bridge import Bridge
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.parsing import parse
from outrider.serve.requests import CompletionRequest
from outrider.serve.routes import OpenAI
from outrider.serve.settings import Settings
from outrider.serve.tickets import Limits
from outrider.telemetry.prometheus import Metrics
from outrider.types import Rows, Scores
from outrider.verify import load_rule
from tests.contract.scripted import Budgets, Scripted
from tests.engine.test_text import KINDS, cut

SLOTS, DEPTH = 96, 5
"""Cases of each of the two tokenizers (10,000 in all), each asked once whole and once as a stream."""
PIECES = ["the cat ", "é", "漢字", "😀", "👩‍👩‍👧", "abab", "\n\n", "naïve", "€", "𝄞", "  ", "a", "ab", "字😀"]
STOPS = [
    "abab",
    "ba",
    "é",
    "漢",
    "字",
    "😀",
    "a\n",
    "\n\n",
    "cat 漢",
    "ï",
    "👩‍👧",
    "字😀a",
    " €",
    "aba",
    "t é",
    "\u200d",
]


@dataclass(frozen=True, slots=True)
class Case:
    """prompt: its text, which names it. script: the tokens the target plays. text: what a reader must see."""

    prompt: str
    script: list[int]
    stop: list[str]
    text: str
    finish: str


class Play:
    """A target whose next token after `prompt + script[:n]` is script[n]; the prompt's first rows say which script it is."""

    layers, hidden_size, trees, rewinds, notices = 1, 1, True, True, ()
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, vocab_size: int, scripts: dict[tuple[int, ...], list[int]]) -> None:
        self.vocab_size, self.max_length, self.scripts = vocab_size, 256, scripts
        self.playing: dict[int, tuple[int, list[int]]] = {}

    def new_kv(self, slots: int, length: int) -> PagedKV:
        return PagedKV(1, slots, 1, length, 1, self.dtype, self.device)

    def forward(self, rows: Rows, kv: Any, *, layers: tuple[int, ...] = ()) -> Scores:
        logits = torch.zeros(len(rows.scored), self.vocab_size)
        token, position = rows.token.tolist(), rows.position.tolist()
        slot = [s.slot for s in rows.segments for _ in range(s.count)]
        for s in rows.segments:
            if s.cached == 0:
                prompt = tuple(token[s.first : s.first + s.fed])
                self.playing[s.slot] = (len(prompt), self.scripts[prompt])
        for m, row in enumerate(rows.scored.tolist()):
            start, script = self.playing[slot[row]]
            n = position[row] - start + 1
            logits[m, script[n] if n < len(script) else 0] = 1.0
        return Scores(logits, ())


def cases(kind: str, count: int, seed: int) -> list[Case]:
    """Texts of a few pieces, cut anywhere (also inside a character), with up to three stop strings."""
    tokenizer, draw, out = KINDS[kind], random.Random(f"{kind} {seed}"), list[Case]()
    for i in range(count):
        prompt = f"x{i} the"
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 7)))
        ids = tokenizer.encode(prompt).ids
        script = tokenizer.encode(prompt + text).ids[len(ids) :]
        if not script or tokenizer.encode(prompt + text).ids[: len(ids)] != ids:
            continue
        script = script[: draw.randrange(1, len(script) + 1)]
        whole = tokenizer.decode(ids + script)[len(tokenizer.decode(ids)) :]
        stop = draw.sample(STOPS, draw.choice((0, 1, 1, 2)))
        if whole and draw.random() < 0.5:  # one that is there, and may begin and end anywhere
            first = draw.randrange(len(whole))
            part = whole[first : first + draw.randrange(1, 7)]
            stop += (
                [part] if "\ufffd" not in part else []
            )  # what a broken end looks like while it may still become whole
        want, _, found = cut(whole, stop)
        out.append(Case(prompt, script, stop, want, "length" if found is None else "stop"))
    return out


def engine_for(kind: str, played: list[Case], seed: int) -> Engine:
    """An engine that decodes the cases' scripts in drafts of 0 to DEPTH tokens, a fifth of them wrong."""
    tokenizer, draw = KINDS[kind], random.Random(seed)
    size = tokenizer.get_vocab_size()
    scripts = {tuple(tokenizer.encode(c.prompt).ids): c.script for c in played}

    def script(view: Any, k: int) -> list[int]:
        done = len(view.tokens) - view.prompt
        right = scripts[tuple(view.tokens[: view.prompt])][done : done + k]
        return [t if draw.random() < 0.8 else draw.randrange(size) for t in right]

    control = Budgets(lambda s: draw.randrange(DEPTH + 1))
    target: Any = Play(size, scripts)
    tool: Any = _Ids(tokenizer)
    return Engine(target, Scripted(script), load_rule("block"), control, tokenizer=tool, slots=SLOTS, max_length=200)


class _Ids:
    """The tokenizer as the engine knows it: `encode` returns ids."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._core.decode(ids, skip_special_tokens=skip_special_tokens)


async def ask(v1: OpenAI, case: Case, chat: bool) -> tuple[tuple[str, str], tuple[str, str], int]:
    """(text, finish reason) of the whole reply and of the streamed one, and how many pieces of text the stream had."""
    body: dict[str, Any] = {"model": "m", "max_tokens": len(case.script), "temperature": 0, "ignore_eos": True}
    body |= {"stop": case.stop} if case.stop else {}
    body |= {"messages": [{"role": "user", "content": case.prompt}]} if chat else {"prompt": case.prompt}
    request = parse(ChatRequest if chat else CompletionRequest, body)
    reply = await v1.begin(request)
    whole = (await reply.whole(v1.bridge))["choices"][0]
    v1.bridge.release(reply.ticket)
    reply = await v1.begin(request)
    pieces, finish = list[str](), ""
    frames = [data async for data in reply.frames(v1.bridge)]
    v1.bridge.release(reply.ticket)
    assert frames.pop() == b"data: [DONE]\n\n"
    for data in frames:
        choice = json.loads(data.decode("utf-8", "strict").removeprefix("data: "))["choices"][0]
        pieces.append(choice["delta"].get("content", "") if chat else choice["text"])
        finish = choice["finish_reason"] or finish
    text = whole["message"]["content"] if chat else whole["text"]
    return (text, whole["finish_reason"]), ("".join(pieces), finish), sum(map(bool, pieces))


async def play(kind: str, count: int, seed: int) -> tuple[list[Case], list[Any], Counter[str]]:
    """Ask everything, 2 x SLOTS cases at a time, and shut the bridge down. Counts the steps of each request that added text."""
    played, steps = cases(kind, count, seed), Counter[str]()

    def counted() -> Engine:
        engine = engine_for(kind, played, seed)
        step = engine.step

        def counting(*given: Any) -> Any:
            events = step(*given)
            steps.update(e.request for e in events if e.text)
            return events

        engine.step = counting  # type: ignore[method-assign]
        return engine

    bridge = Bridge(counted, Metrics("m"), Limits(queue=8 * SLOTS, queue_seconds=600))
    await bridge.start()
    v1, limit = OpenAI(bridge, Settings("m")), asyncio.Semaphore(2 * SLOTS)

    async def one(i: int, case: Case) -> Any:
        async with limit:
            return await ask(v1, case, chat=i % 3 == 0)

    try:
        return played, await asyncio.gather(*(one(i, case) for i, case in enumerate(played))), steps
    finally:
        await bridge.close(1.0)


@pytest.mark.parametrize("count", [1_000, pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_streamed_text_is_the_whole_text(kind: str, count: int) -> None:
    played, answers, steps = asyncio.run(play(kind, count, seed=count))
    several = sum(n > 1 for n in steps.values())
    print(
        f"\nT17: {len(played)} cases, {kind}: {sum(s == w for w, s, _ in answers)} streams equal their whole text; of {len(steps)} "
        f"replies {several} had text of several steps"
    )
    assert len(played) >= 0.99 * count
    for case, (whole, stream, _) in zip(played, answers, strict=True):
        assert stream == whole, case
        if (
            kind == "byte_level" or "\ufffd" not in case.text
        ):  # byte fallback shows a run with a broken end as broken altogether
            assert whole == (case.text, case.finish), case
    stopped = sum(c.finish == "stop" for c in played)
    assert stopped > 0.25 * len(played)  # the cases are what they claim to be: stops, broken ends, several chunks
    assert sum("\ufffd" in c.text for c in played) > 0.02 * len(played)
    # Steps are counted at the engine: how many pieces they arrive in is for the machine to say, which may read several at once.
    assert several > 0.3 * len(steps) and any(n > 1 for *_, n in answers)

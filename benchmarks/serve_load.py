"""A load generator for OpenAI-compatible servers: raw HTTP over asyncio, closed and open loop, good and bad clients.

Closed loop: a fixed number of clients, each sends its next request when the last one has ended. Open loop: Poisson arrivals at a
given rate, whatever the server does, which is the one that shows overload.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Seconds; `first` and `last` since it was sent. tokens: from the usage chunk."""

    status: int = 0
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def kind(self) -> str:
        """What became of it, for counting."""
        return self.error or ("ok" if self.status == 200 else f"http {self.status}")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent. prompts: cycled through. The shares (0 .. 1) of bad clients add up to at most 1.

    hang_up: disconnect after the first chunk. slow: read one chunk every half second. malformed: send what is not JSON. bare: leave
    out what only some servers know (`ignore_eos`, `stream_options`).
    """

    model: str
    prompts: Sequence[str]
    max_tokens: int = 64
    temperature: float = 1.0
    hang_up: float = 0.0
    slow: float = 0.0
    malformed: float = 0.0
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    key: str | None = None


async def one(address: Address, body: bytes, manner: str = "good") -> Outcome:
    """Send one request and read its stream to the end, or as its manner has it."""
    out, start = Outcome(), perf_counter()
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:
        return Outcome(error="refused")
    try:
        auth = f"Authorization: Bearer {address.key}\r\n" if address.key else ""
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\n{auth}Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        out.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if out.status == 200:
            await _read(reader, out, start, manner)
        else:
            await reader.read()
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
        out.error = type(error).__name__
    finally:
        out.last = perf_counter() - start
        writer.close()
    return out


async def _read(reader: asyncio.StreamReader, out: Outcome, start: float, manner: str) -> None:
    previous, ended = start, False
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            ended = True
            break
        chunk = json.loads(line[6:])
        if "error" in chunk:
            out.error = "error event"
            continue
        now = perf_counter()
        if chunk["choices"]:
            if out.first is None:
                out.first = now - start
            else:
                out.gaps.append(now - previous)
            previous = now
            out.text += chunk["choices"][0]["text"]
        if chunk.get("usage"):
            out.tokens = chunk["usage"]["completion_tokens"]
            ended = bool(
                chunk["choices"] and chunk["choices"][0].get("finish_reason")
            )  # the end of servers without [DONE]
        if manner == "hang up":
            out.error = "hung up"
            return
        if manner == "slow":
            await asyncio.sleep(0.5)
    if not ended:
        out.error = out.error or "cut off"


class Sender:
    """Makes bodies, one after another, reproducibly."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self.traffic, self.random, self.count = traffic, random.Random(seed), 0

    def next(self) -> tuple[bytes, str]:
        t = self.traffic
        prompt = t.prompts[self.count % len(t.prompts)]
        self.count += 1
        u = self.random.random()
        if u < t.malformed:
            return b'{"model": ' + bytes(self.random.randrange(256) for _ in range(40)), "good"
        manner = "hang up" if u < t.malformed + t.hang_up else "good"
        if t.malformed + t.hang_up <= u < t.malformed + t.hang_up + t.slow:
            manner = "slow"
        body: dict[str, Any] = {"model": t.model, "prompt": prompt, "max_tokens": t.max_tokens, "stream": True}
        body |= {"temperature": t.temperature}
        body |= {} if t.bare else {"ignore_eos": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode(), manner


async def closed_loop(
    address: Address, traffic: Traffic, clients: int, requests: int, seed: int = 0
) -> tuple[list[Outcome], float]:
    """`requests` requests by `clients` clients; the outcomes, and the seconds from the first byte to the last."""
    sender, out, left = Sender(traffic, seed), list[Outcome](), requests
    start = perf_counter()

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            out.append(await one(address, *sender.next()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return out, perf_counter() - start


async def open_loop(
    address: Address, traffic: Traffic, rate: float, seconds: float, seed: int = 0
) -> tuple[list[Outcome], float]:
    """Poisson arrivals at `rate` a second for `seconds`; waits for all that was sent."""
    sender, arrivals, tasks = Sender(traffic, seed), random.Random(seed + 1), []
    start = perf_counter()
    at = arrivals.expovariate(rate)
    while at < seconds:
        await asyncio.sleep(max(0.0, start + at - perf_counter()))
        tasks.append(asyncio.create_task(one(address, *sender.next())))
        at += arrivals.expovariate(rate)
    return list(await asyncio.gather(*tasks)), perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie (nearest rank); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Throughput and latencies of the requests that ended well; a failed one is an outcome and no number."""
    good = [o for o in outcomes if o.kind == "ok"]
    first = [o.first for o in good if o.first is not None]
    per_token = [(o.last - (o.first or 0.0)) / (o.tokens - 1) for o in good if o.tokens > 1]
    refused = [o.last for o in outcomes if o.status in (429, 503)]
    table = {"first_token": first, "per_token": per_token, "whole": [o.last for o in good], "refusal": refused}
    latencies = {
        name: {f"p{round(100 * q)}": percentile(values, q) for q in (0.5, 0.9, 0.99)} for name, values in table.items()
    }
    return {
        "requests": len(outcomes),
        "outcomes": dict(Counter(o.kind for o in outcomes)),
        "seconds": seconds,
        "tokens": sum(o.tokens for o in good),
        "tokens_per_second": sum(o.tokens for o in good) / seconds,
        "latency": latencies,
    }

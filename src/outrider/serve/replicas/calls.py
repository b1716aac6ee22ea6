"""What the front asks of replicas, wherever they run: to answer a client's request, and to say how they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from outrider.serve.tickets import Unavailable

OPENING = 1024
"""Characters of a prompt that name its conversation."""
PASSED = frozenset({b"content-type", b"accept", b"x-outrider-user"})
"""Headers of a client that a replica is told; what else a client may say is the front's business."""


class Lost(Unavailable):
    """The replica that had this request has ended."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request for a replica. headers: lower-case names."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a reply: first a status with headers, then bytes of the body."""

    status: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@runtime_checkable
class Replicas(Protocol):
    """Servers that are started, kept alive and chosen among."""

    async def start(self) -> None:
        """Return when at least one serves. Raises what kept the first from starting."""
        ...

    def forward(self, call: Call, key: str) -> AsyncIterator[Part]:
        """The reply of the replica that `key` belongs to, or of the next one while that is down or full. Raises Lost when it ends
        in the middle, Unavailable when none serves. Closing the iterator ends the request there."""
        ...

    async def ask(self, calls: Sequence[Call]) -> dict[str, list[tuple[int, bytes]]]:
        """Name -> (status, body) of each call, for every replica that answers within some seconds."""
        ...

    async def close(self, grace: float) -> None:
        """Let requests finish for `grace` seconds, and end the replicas."""
        ...


def conversation_key(body: Any) -> str:
    """The name of a request's conversation: its prefix up to the first message of the user, which later turns repeat.

    So a follow-up meets the replica that has seen its beginning. Requests with one beginning are one conversation.
    """
    if not isinstance(body, dict):
        return ""
    messages = body.get("messages", body.get("input"))  # of /v1/responses
    if isinstance(messages, list):
        first = next(
            (i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), len(messages)
        )
        told = body.get("system", body.get("instructions"))  # what two of the formats have beside the messages
        opening: Any = [told, *messages[: first + 1]] if told else messages[: first + 1]
    else:
        prompt = body.get("prompt", messages)
        opening = prompt[:OPENING] if isinstance(prompt, str | list) else prompt
    text = json.dumps(opening, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def ranked(key: str, names: Sequence[str]) -> list[str]:
    """All names, the key's own first: rendezvous hashing, so that a replica that goes moves no other's conversations."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}\0{name}".encode()).digest())

"""The settings of a server: one frozen, checked value that the routes read."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from outrider.serve.tickets import Limits

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """model: served name. keys: SHA-256 digests of the API keys; empty: no key is required.

    hosts: names the server answers to when no key is set (a page of another site that resolves its own name to this
    machine must not reach it). body: largest request body in bytes. body_seconds, head_seconds: time limits for it and its head.
    connections: most at once, fewer if the process may not open so many descriptors. pad: pad and pace streams. details:
    per-request acceptance metrics in replies. price: dollars per hour of this machine. webhook: the URL that alerts are sent to
    (`webhook.check_url`). tool_format: the notation of calls, instead of the one that the chat template shows. cors: origins whose
    pages may read replies; "*": any.
    """

    model: str
    keys: tuple[bytes, ...] = ()
    hosts: tuple[str, ...] = LOCAL_NAMES
    body: int = 2_000_000
    body_seconds: float = 30.0
    head_seconds: float = 10.0
    connections: int = 1024
    pad: bool = False
    details: bool = True
    fallback_chat: bool = True
    limits: Limits = field(default_factory=Limits)
    grace: float = 30.0
    price: float | None = None
    webhook: str | None = None
    tool_format: str | None = None
    cors: tuple[str, ...] = ()

    def owner(self, key: str) -> int | None:
        """The number of `key` among the keys, or None; in time that does not depend on where it differs."""
        given = digest(key)
        found = [hmac.compare_digest(given, known) for known in self.keys]
        return found.index(True) if any(found) else None


def digest(key: str) -> bytes:
    """The digest of an API key: the key itself is not kept."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def model_name(target: str | None) -> str:
    """Name of a target for clients: the last part of its path or Hub name; `pycode` is the shipped pair."""
    if target is None:
        return "pycode"
    path = Path(target).expanduser()
    return path.resolve().name if path.exists() else target

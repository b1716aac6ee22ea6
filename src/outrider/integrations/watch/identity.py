"""What a server says of itself beside its metrics: its version and its model, where it says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from outrider.errors import printable
from outrider.web import Fault, get

MOST = 1 << 20
HINTS = (
    ("/props", "total_slots", "llama.cpp's server without metrics: start it with --metrics"),
    ("/server_info", "server_args", "SGLang without metrics: start it with --enable-metrics"),
    ("/get_server_info", "tp_size", "SGLang without metrics: start it with --enable-metrics"),
    ("/server_info", "tp_size", "SGLang without metrics: start it with --enable-metrics"),
)
"""Routes of engines that may serve without metrics, a key of their answer, and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """None: it does not say. max_length: tokens of its context."""

    version: str | None = None
    model: str | None = None
    max_length: int | None = None


def ask(url: str, key: str | None, seconds: float, model: str | None) -> Identity:
    """Ask for version and model; a server that answers neither is no less watched. model: what its metrics say."""
    version, models, props = (document(f"{url}{path}", key, seconds) for path in ("/version", "/v1/models", "/props"))
    first = next((m for m in models.get("data") or () if isinstance(m, dict)), {}) if _listed(models) else {}
    built = props.get("build_info")
    number = (
        version.get("version") if isinstance(version.get("version"), str) else built if isinstance(built, str) else None
    )
    meta: Any = first.get("meta")
    longest = first.get("max_model_len", meta.get("n_ctx") if isinstance(meta, dict) else None)
    named = first.get("id") if isinstance(first.get("id"), str) else model
    return Identity(
        None if number is None else printable(number)[:40],
        None if named is None else printable(named)[:200],
        longest if type(longest) is int and longest > 0 else None,
    )


def _listed(models: dict[str, Any]) -> bool:
    return isinstance(models.get("data"), list)


def document(url: str, key: str | None, seconds: float) -> dict[str, Any]:
    """The JSON object at an address; empty where there is none."""
    try:
        found = json.loads(get(url, key, seconds=seconds, most=MOST).body)
    except (Fault, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def without_metrics(url: str, key: str | None, seconds: float, fault: Fault) -> str:
    """The sentence for a server that has no page of metrics."""
    for path, mark, words in HINTS:
        if mark in document(f"{url}{path}", key, seconds):
            return f"{url} is {words}"
    return f"{url} has no /metrics ({fault.code}): is it the address of a server, without a path?"

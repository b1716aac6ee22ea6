"""Which parts of ours are live in a running vLLM server: asked over HTTP, from outside."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

from outrider.errors import ConfigError, printable
from outrider.integrations.vllm.status import ALL, part

MOST = 1 << 22
"""Bytes that are read of an answer."""


def examine(url: str, seconds: float = 10.0) -> list[dict[str, Any]]:
    """The parts of the server at `url`. Raises ConfigError if there is none, or if it is no vLLM."""
    base = url.rstrip("/").removesuffix("/v1")
    if not re.match(r"https?://", base):
        raise ConfigError(f"the address of a server begins with http:// or https://, got {url!r}")
    found = _get(base, "/outrider/parts", seconds)
    if found is not None:
        try:
            rows = json.loads(found)["parts"]
            return [part(*(printable(str(r[k])) if k != "live" else bool(r[k]) for k in _KEYS)) for r in rows]  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{base}/outrider/parts does not answer as Outrider's endpoint in vLLM does") from None
    metrics = _get(base, "/metrics", seconds)
    if metrics is None or "vllm:" not in metrics:
        raise ConfigError(
            f"{base} answers, and is no vLLM server: nothing at /outrider/parts, no vllm: metrics at /metrics"
        )
    if "outrider_steps_total" in metrics and "outrider_config_info" in metrics:
        raise ConfigError(f"{base} is Outrider's own server, where every part is live: its page is at {base}/")
    remedy = (
        f"vLLM loads routes only if VLLM_PLUGINS names them, and it is one list for all groups: set VLLM_PLUGINS={ALL}"
    )
    speculates = "vllm:spec_decode_num_drafts" in metrics
    told = "vLLM reports drafts" if speculates else "vLLM reports no drafts"
    return [
        part("endpoint", False, "no /outrider routes; is Outrider installed beside vLLM?", remedy),
        part("speculation", speculates, told, "give vLLM a --speculative-config"),
    ]


_KEYS = ("part", "live", "found", "remedy")


def _get(base: str, path: str, seconds: float) -> str | None:
    """The text at an address; None if there is nothing there. Raises ConfigError if nobody answers."""
    try:
        with urllib.request.urlopen(base + path, timeout=seconds) as reply:
            return reply.read(MOST).decode("utf-8", "replace")
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no server answers at {base} ({getattr(error, 'reason', error)}): give the address of vLLM"
        ) from None

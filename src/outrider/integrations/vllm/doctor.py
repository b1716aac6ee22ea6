"""Which parts of ours are live in a running vLLM server: asked over HTTP, from outside."""

from __future__ import annotations

import json
from typing import Any

from outrider.errors import ConfigError, printable
from outrider.integrations.vllm.status import ALL, part
from outrider.web import Fault, base_of, get

MOST = 1 << 22
"""Most bytes of an answer."""


def examine(url: str, seconds: float = 10.0) -> list[dict[str, Any]]:
    """The parts of the server at `url`. Raises ConfigError if there is none, or if it is no vLLM."""
    base = base_of(url, "--vllm")
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
    """The text at an address; None if there is nothing there. Raises ConfigError if nobody answers, or not within `seconds`."""
    try:
        return get(base + path, seconds=seconds, most=MOST).body.decode("utf-8", "replace")
    except Fault as fault:
        if fault.code is not None and not 300 <= fault.code < 400:
            return None
        raise ConfigError(f"no server answers at {base} as vLLM does ({fault})") from None

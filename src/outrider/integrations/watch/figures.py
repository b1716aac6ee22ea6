"""The figures of a span as plain data, and what is left open in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from outrider.integrations.watch.flavours import Flavour
from outrider.integrations.watch.sums import Span


def document(span: Span) -> dict[str, Any]:
    """The figures of a span. None: this engine does not tell, or nothing was counted. Rejections are an interval, [n, n] where
    they are known exactly."""
    found, share = span.rejections(), span.rejection()
    judged, accepted = span.judged_at(), span.at("accepted_at")
    return {
        "seconds": span.seconds or None,
        "tokens": span.get("emitted"),
        "prompt_tokens": span.get("prompt"),
        "passes": span.get("passes"),
        "tokens_per_pass": span.tokens_per_pass,
        "tokens_per_second": span.rate(),
        "drafted": {
            "passes": span.get("drafts"),
            "share_of_passes": span.ratio("drafts", "passes"),
            "proposed": span.get("proposed"),
            "accepted": span.get("accepted"),
            "acceptance_rate": span.ratio("accepted", "proposed"),
            "tokens_per_drafted_pass": span.tokens_per_drafted_pass,
            "accepted_by_position": accepted,
            "judged_by_position": judged or None,
            "by_length": _by_length(judged, accepted),
        },
        "rejections": None if found is None else list(found),
        "rejection_probability": None if share is None else list(share),
        "predicted_rejections": span.get("risk"),
        "total_variation": span.get("bias"),
        "ended": {k: round(v) for k, v in span.under("ended").items()},
        "failed": span.get("failed"),
        "first_token_seconds": span.quantiles("first"),
        "per_token_seconds": span.quantiles("per_token"),
    }


def _by_length(judged: list[float], accepted: list[float]) -> list[float] | None:
    """Tokens per drafted pass that the acceptance by position implies at every length up to the served one; None where positions
    are not known."""
    out, total, reach = [], 1.0, 1.0
    for j, a in zip(judged, accepted, strict=False):
        reach *= a / j if j else 0.0
        total += reach
        out.append(total)
    return out if judged and judged[0] else None


def missing(span: Span, gauges: dict[str, float]) -> list[str]:
    """Parts of the page for which this server gives no figures."""
    speculates = bool(span.get("drafts"))
    absent = {
        "passes": span.get("passes") is None,
        "rejections": span.rejections() is None,
        "ledger": "risk" not in span.sums,
        "pareto": "risk" not in span.sums or "bias" not in span.sums,
        "positions": "drafts" not in span.sums or (speculates and not span.judged_at()),
        "phases": not span.phases(),
        "length": "length" not in gauges,
        "speedup": "speedup" not in gauges,
        "speeds": True,
        "requests": True,
        "play": True,
        "outcomes": not span.under("ended"),
    }
    return [name for name, is_absent in absent.items() if is_absent]


def cannot(flavour: Flavour | None, span: Span, gauges: dict[str, float]) -> list[str]:
    """What this server does not tell, for people."""
    if flavour is None:
        return []
    out = [words for words in flavour.cannot if not ("predicted" in words and "risk" in span.sums)]
    if span.get("passes") is None:
        out.append("tokens per pass: it has exported no generated tokens yet")
    if "drafts" not in span.sums:
        out.append("whether it speculates: it exports no counts of drafts")
    if gauges.get("reported") is not None:
        out.append("the window of its own acceptance length, which is of its latest batches and cannot be added up")
    return out


def finite(value: Any) -> Any:
    """Plain data with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value

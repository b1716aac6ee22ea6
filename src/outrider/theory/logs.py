"""Logs of emitted texts as JSON lines: what any engine can write and `replay` can read.

One object a line, one line a text:

    {"id": "7-0", "prompt_id": "7", "domain": "code",
     "target_logprobs": [-0.3, -1.2], "draft_logprobs": [-0.5, null],
     "draft_argmax_hit": [true, false], "tv": [0.1, 0.6], "greedy_risk": [0.3, 0.8],
     "stopped": false, "limit": 128}

target_logprobs, draft_logprobs: natural logarithms of the probabilities that sampling used, at most 0, one per emitted
token; `null` (or -Infinity) in draft_logprobs is a token the draft gave no probability, as behind top-p. All else may be
absent: `draft_argmax_hit` is needed for greedy drafting; `tv` and `greedy_risk` (1 - p(argmax q)) lower the variance of
expected rejections; `prompt_id` (default: `id`) groups the samples of one prompt; `stopped` says that the text ended with
a stop token, `limit` the most tokens it could have had. See `outrider.theory.replay.Text` for their meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from outrider.theory.replay import Text

ROUNDING = 1e-5
"""A log-probability this little above 0 is float32's rounding of certainty, and read as 0."""

KNOWN = (
    "id",
    "prompt_id",
    "domain",
    "target_logprobs",
    "draft_logprobs",
    "draft_argmax_hit",
    "tv",
    "greedy_risk",
    "stopped",
    "limit",
)


def read_log(lines: Iterable[str], source: str = "log") -> list[Text]:
    """The texts of a log; blank lines are skipped.

    Args:
        lines: an open file, or any iterable of lines.
        source: what the error messages call it, with the line's number: "run.jsonl" gives "run.jsonl:3: ...".

    Raises:
        ValueError: names the line, the field and the value: not JSON, an unknown field, lengths that disagree, a
            log-probability above 0 or NaN, no text at all.

    >>> read_log(['{"target_logprobs": [-1.0], "draft_logprobs": [-0.5]}'])[0].target.tolist()
    [-1.0]
    >>> read_log(['{"target_logprobs": [0.7], "draft_logprobs": [-0.5]}'], "run.jsonl")
    Traceback (most recent call last):
    ValueError: run.jsonl:1: target_logprobs[0] must be at most 0, got 0.7
    """
    texts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                texts.append(_text(json.loads(line), number))
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}:{number}: not JSON ({error.msg})") from None
            except RecursionError:
                raise ValueError(f"{source}:{number}: lists in lists in lists") from None
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from None
    if not texts:
        raise ValueError(f"{source}: no texts found: expected one JSON object per line")
    return texts


def to_json(text: Text) -> dict[str, Any]:
    """The object `read_log` reads back as the same text (numbers are rounded to 9 digits).

    >>> to_json(Text(np.array([-1.0]), np.array([-np.inf])))["draft_logprobs"]
    [None]
    """
    out: dict[str, Any] = {"id": text.name, "prompt_id": text.prompt, "domain": text.domain}
    out["target_logprobs"] = _round(text.target)
    out["draft_logprobs"] = [None if x == -math.inf else x for x in _round(text.draft)]
    if text.hit is not None:
        out["draft_argmax_hit"] = [bool(h) for h in text.hit]
    if text.tv is not None:
        out["tv"] = _round(text.tv)
    if text.risk is not None:
        out["greedy_risk"] = _round(text.risk)
    out["stopped"] = text.stopped
    if text.limit is not None:
        out["limit"] = text.limit
    return out


def _round(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{v:.9g}") for v in values]


def _text(row: Any, number: int) -> Text:
    """One line as a text."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    unknown = sorted(set(row) - set(KNOWN))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(KNOWN)}")
    target = _numbers(row, "target_logprobs", high=0.0)
    draft = _numbers(row, "draft_logprobs", high=0.0, null=-math.inf)
    if target is None or draft is None:
        raise ValueError("target_logprobs and draft_logprobs are needed")
    if not len(target):
        raise ValueError("target_logprobs is empty: leave out texts without tokens")
    hit = row.get("draft_argmax_hit")
    if hit is not None and not (isinstance(hit, list) and all(h in (0, 1) for h in hit)):
        raise ValueError("draft_argmax_hit must be a list of true and false")
    tv, risk = (_numbers(row, name, low=0.0, high=1.0) for name in ("tv", "greedy_risk"))
    for name, values in (("draft_logprobs", draft), ("draft_argmax_hit", hit), ("tv", tv), ("greedy_risk", risk)):
        if values is not None and len(values) != len(target):
            raise ValueError(f"{name} has {len(values)} entries, target_logprobs {len(target)}")
    limit, stopped = row.get("limit"), row.get("stopped", False)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise ValueError(f"limit must be a whole number, got {limit!r}")
    if not isinstance(stopped, bool):
        raise ValueError(f"stopped must be true or false, got {stopped!r}")
    name = str(row.get("id", number))
    flags = None if hit is None else np.asarray(hit, bool)
    where = {"name": name, "prompt": str(row.get("prompt_id", name)), "domain": str(row.get("domain") or "")}
    return Text(target, draft, flags, tv, risk, stopped, limit, **where)


def _numbers(
    row: dict[str, Any], name: str, *, high: float, low: float = -math.inf, null: float | None = None
) -> np.ndarray | None:
    """A list of numbers of [low, high]; None if it is absent. `null` is what a null stands for."""
    values = row.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of numbers, got {type(values).__name__}")
    out = np.empty(len(values))
    for i, x in enumerate(values):
        value = null if x is None else x
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}[{i}] must be a number, got {x!r}")
        if math.isnan(value) or (math.isinf(value) and value != null):
            raise ValueError(f"{name}[{i}] must be finite, got {value}")
        if value > high + ROUNDING or value < low - ROUNDING:
            wanted = "at most 0" if low == -math.inf else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name}[{i}] must be {wanted}, got {value:g}")
        out[i] = min(max(value, low), high)
    return out

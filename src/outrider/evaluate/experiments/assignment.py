"""Experiments on live traffic: who gets which arm, and what an arm may vary. What the requests say is in `tally`.

A unit (a user, or a request without one) belongs to an arm by a salted hash, so the same user always has the same arm and no
table is kept. Requests that are decoded together share their steps, and with them the cost of everybody's drafts: what users of
two arms then differ by is tokens per step. To learn what a whole server gains, let the unit be a stretch of time (`window`) in
which all requests have one arm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import Experiment
from outrider.options import PART, EngineOptions
from outrider.verify import load_rule


def unit_of(e: Experiment, who: str) -> str:
    """The name a unit has in records: without the salt it tells nothing about `who`."""
    return _hash(e, "unit", who).hex()[:16]


def arm_of(e: Experiment, who: str) -> str | None:
    """The arm of a unit: the same at all times and places; None for the share of traffic that is in no arm."""
    place = int.from_bytes(_hash(e, "arm", who)[:8], "big") / 2.0**64
    for arm, share in sorted(shares_of(e).items()):  # whatever the order in the file
        if place < share:
            return arm
        place -= share
    return None


def unit_key(e: Experiment, who: str, now: float) -> str:
    """The unit of a request at Unix time `now`: its user, or the stretch of time."""
    return who if e.window is None else f"window {math.floor(now / e.window)}"


def _hash(e: Experiment, use: str, who: str) -> bytes:
    text = "\0".join((use, e.name, e.salt, who))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def shares_of(e: Experiment) -> dict[str, float]:
    """The share of traffic of each arm, in the order of the arms; equal ones if the file names none."""
    return dict.fromkeys(e.arms, 1 / len(e.arms)) if e.shares is None else {a: e.shares[a] for a in e.arms}


# ----------------------------------------------------------------- what can vary
def arm_overrides(e: Experiment, served: EngineOptions, *, fixed: bool = True) -> dict[str, dict[str, Any]]:
    """For each arm, the sampling parameters that a request of it gets besides its own.

    served: the options that the server was started with. fixed: whether its draft length is what they say.
    Raises ConfigError for what one loaded engine cannot vary from request to request.
    """
    if not fixed:
        raise ConfigError(
            f"experiment {e.name!r}: arms need draft lengths that stay: start with --fixed-length, "
            "otherwise the server chooses them by its load"
        )
    if not 0 < sum(shares_of(e).values()) <= 1 + 1e-9:
        raise ConfigError(f"experiment {e.name!r}: the shares of its arms add up to more than 1")
    if bad := [a for a in e.arms if not (a.isascii() and a.isprintable() and len(a) <= 64)]:
        raise ConfigError(f"arm {bad[0]!r}: its name is told in a header: at most 64 plain ASCII characters")
    lossless = load_rule(served.rule).lossless
    return {arm: _overrides(f"arm {arm!r}", options, served, lossless) for arm, options in e.arms.items()}


def _overrides(arm: str, options: Mapping[str, Any], served: EngineOptions, lossless: bool) -> dict[str, Any]:
    """The parameters of one arm."""
    draft = options.get("draft", served.draft)
    off = draft == "none" or options.get("length") == 0
    if off and options.get("length"):
        raise ConfigError(f"{arm}: without a drafter there is no draft length: leave `length` out")
    for name in ("rule", "allow_lossy", "draft_quantize", "draft_vocabulary"):
        if name in options and options[name] != getattr(served, name):
            raise ConfigError(
                f"{arm}: {name} {options[name]!r} cannot vary from request to request, and this server has "
                f"{getattr(served, name)!r}: compare them with `outrider ab run`, or on two servers"
            )
    length = 0 if off else options.get("length", served.length)
    if not isinstance(length, int) or not 0 <= length <= served.length:
        raise ConfigError(
            f"{arm}: length {length!r} is more than this server drafts: start it with --length {length} or more"
        )
    out: dict[str, Any] = {"draft_length": length}
    if not off and draft != served.draft:
        out["drafters"] = _drafters(arm, draft, served.draft)
    if (budget := options.get("tv_budget")) is not None:
        if lossless:
            raise ConfigError(f"{arm}: tv_budget needs a lossy rule, and {served.rule!r} is exact")
        out["tv_budget"] = float(budget)
    return out


def parts_of(draft: str) -> list[str]:
    """The drafters that a --draft joins by '+', in order."""
    parts, rest = [], draft
    while (head := PART.match(rest)) is not None and head.end() < len(rest):
        parts.append(head.group(1))
        rest = rest[head.end() :]
    return [*parts, rest]


def _drafters(arm: str, draft: str, loaded: str) -> tuple[int, ...]:
    """Numbers of the loaded drafters that `draft` names."""
    there, wanted = parts_of(loaded), parts_of(draft)
    if any(part not in there for part in wanted) or wanted != [p for p in there if p in wanted]:
        raise ConfigError(
            f"{arm}: draft {draft!r} is not loaded, this server drafts with {loaded!r}: an arm can have that, the parts that '+' "
            "joins there, or none; compare drafters with `outrider ab run`, or on two servers"
        )
    return tuple(there.index(part) for part in wanted)

"""The table of rules: their names, their options, and the rule that "auto" stands for.

A rule is named in a configuration as `name` or `name:key=value,key=value`, for instance `tv_budget:per_token=0.02`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from outrider.errors import ConfigError, unknown_name
from outrider.protocols import Drafter, Rule
from outrider.verify.block import BlockVerification
from outrider.verify.codes import Cluster, Neighbours
from outrider.verify.lossy import AcceptanceRule, Lenience, Lossy, Mentored, OverAcceptance, Spend, TopK, Typical
from outrider.verify.match import Match
from outrider.verify.multidraft import KSeq
from outrider.verify.spechub import SpecHub
from outrider.verify.transport import OptimalTransport
from outrider.verify.traversal import Traversal
from outrider.verify.tree import SpeculativeSampling

BUDGET = {"per_token": (0.0, 1.0, 1.0), "per_sequence": (0.0, math.inf, math.inf)}
"""Options of every lossy rule: name -> (least, most, default)."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """make: builds the rule from its options. options: name -> (least, most, default). lossless: keeps the target's
    distribution. codes: `make` also takes the points of the target's image codes."""

    make: Callable[..., Rule]
    options: Mapping[str, tuple[float, float, float]]
    lossless: bool
    codes: bool = False


def _exact(rule: type) -> tuple[str, _Entry]:
    return rule.name, _Entry(rule, {}, True)


def _lossy(
    name: str, acceptance: Callable[..., AcceptanceRule], *, codes: bool = False, **options: tuple[float, float, float]
) -> tuple[str, _Entry]:
    """codes: whether the acceptance looks at the distances of codes, and takes their `points`."""
    budget = BUDGET | {key: options.pop(key) for key in BUDGET if key in options}

    def make(per_token: float, per_sequence: float, **values: Any) -> Lossy:
        return Lossy(name, acceptance(**values), per_token, per_sequence)

    return name, _Entry(make, options | budget, False, codes)


RULES: Mapping[str, _Entry] = MappingProxyType(
    dict(
        [
            _exact(SpeculativeSampling),
            _exact(Match),
            _exact(BlockVerification),
            _exact(KSeq),
            _exact(OptimalTransport),
            _exact(SpecHub),
            _exact(Traversal),
            _lossy("tv_budget", Spend, per_token=(0.0, 1.0, 0.05)),
            _lossy("over_acceptance", OverAcceptance, eps=(0.0, 1.0, 0.05)),
            _lossy("lenience", Lenience, l=(1e-6, 1.0, 0.8)),
            _lossy("mentored", Mentored, kl=(0.0, 100.0, 0.05)),
            _lossy("typical", Typical, eps=(0.0, 1.0, 0.09), delta=(0.0, 100.0, 0.3)),
            _lossy("top_k", lambda k: TopK(int(k)), k=(1, 2**31 - 1, 3)),
            _lossy(
                "neighbours",
                lambda delta, k, points: Neighbours(delta, int(k), points),
                codes=True,
                delta=(0.0, 1.0, 0.1),
                k=(1, 1024, 16),
            ),
            _lossy(
                "cluster",
                lambda k, gap, near, points: Cluster(int(k), gap, near, points),
                codes=True,
                k=(2, 1024, 14),
                gap=(0.0, 1.0, 0.15),
                near=(0.0, 16.0, 0.1),
            ),
        ]
    )
)
"""Every rule by name."""

LOSSLESS: tuple[str, ...] = tuple(name for name, entry in RULES.items() if entry.lossless)
"""The rules that keep the target's distribution."""

ALIASES: Mapping[str, str] = MappingProxyType({"auto": SpeculativeSampling.name})
"""Other names a user may give. An engine replaces "auto" by `best_exact` of its drafter."""


def best_exact(drafter: Drafter) -> Rule:
    """The lossless rule that accepts most of this drafter's proposals: what "auto" means for an engine.

    Block verification on chains of two or more tokens (never below speculative sampling, and the same for one token); traversal on
    trees drawn without replacement, which is block verification on them; optimal transport on other trees (no rule that works node
    by node accepts more of i.i.d. siblings). Proofs: docs/theory.md, sections 3 and 4.
    """
    if drafter.trees:
        return Traversal() if _without_replacement(drafter) else OptimalTransport()
    if getattr(drafter, "keyed", False):  # block verification would not be exact: see drafters/jacobi.py
        return SpeculativeSampling()
    return BlockVerification() if drafter.max_depth > 1 else SpeculativeSampling()


def _without_replacement(drafter: Drafter) -> bool:
    """Whether the siblings that this drafter draws, or one of those that it joins, are drawn without replacement."""
    parts = getattr(drafter, "parts", (drafter,))
    return any(getattr(getattr(part, "growth", None), "siblings", "") == "without_replacement" for part in parts)


def reads_codes(text: str) -> bool:
    """Whether the rule that `text` names looks at the distances of image codes."""
    entry = RULES.get(text.partition(":")[0])
    return entry is not None and entry.codes


def load_rule(text: str, points: Float64[Tensor, "T d"] | None = None) -> Rule:
    """The rule named by `name` or `name:key=value,...`. Raises ConfigError naming the nearest known name.

    points: of the target's tokens that are image codes, for rules that look at their distances, NaN for tokens that are none; None:
    codes on a line, in the order of their numbers.
    """
    name, _, rest = text.partition(":")
    entry = RULES.get(ALIASES.get(name, name))
    if entry is None:
        raise ConfigError(unknown_name("rule", name, [*RULES, *ALIASES]))
    values = {key: default for key, (_, _, default) in entry.options.items()}
    for part in filter(None, rest.split(",")):
        key, equals, number = part.partition("=")
        if key not in entry.options:
            if not entry.options:
                raise ConfigError(f"rule {name!r} has no options, got {part!r}")
            raise ConfigError(unknown_name(f"option of rule {name!r}", key, entry.options))
        low, high, _ = entry.options[key]
        values[key] = _number(f"{key} of rule {name!r}", number if equals else "nothing", low, high)
    return entry.make(**values, points=points) if entry.codes else entry.make(**values)


def _number(what: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{what} must be a number, got {text!r}") from None
    if not low <= value <= high:
        raise ConfigError(f"{what} must be between {low:g} and {high:g}, got {value:g}")
    return value

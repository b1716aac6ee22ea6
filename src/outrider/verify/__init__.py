"""Verification rules: pure functions of (p, draft, noise) that keep the target's law. One file and one name each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from outrider.errors import ConfigError, unknown_name
from outrider.protocols import Rule
from outrider.verify._common import check_draft
from outrider.verify.match import Match
from outrider.verify.tree import SpeculativeSampling

__all__ = ["ALIASES", "RULES", "Match", "SpeculativeSampling", "check_draft", "load_rule"]

RULES: Mapping[str, Callable[[], Rule]] = MappingProxyType({rule.name: rule for rule in (SpeculativeSampling, Match)})
"""Name -> factory of every rule."""

ALIASES: Mapping[str, str] = MappingProxyType({"auto": SpeculativeSampling.name})
"""Other names a user may write."""


def load_rule(name: str) -> Rule:
    """The rule called `name`, or one of ALIASES. Raises ConfigError naming the nearest known rule."""
    factory = RULES.get(ALIASES.get(name, name))
    if factory is None:
        raise ConfigError(unknown_name("rule", name, [*RULES, *ALIASES]))
    return factory()

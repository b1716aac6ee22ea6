"""The controllers by the names that `--lengths` gives them."""

from __future__ import annotations

from collections.abc import Callable

from outrider.control.adaptive import Adaptive
from outrider.control.bass import Bass
from outrider.control.fixed import Fixed
from outrider.control.per_sequence import PerSequence
from outrider.errors import ConfigError, unknown_name
from outrider.protocols import Controller

FOLLOWING: dict[str, type[Adaptive] | type[Bass]] = {"adaptive": Adaptive, "per_sequence": PerSequence, "bass": Bass}
"""Those that follow measurements."""


def load_controller(
    name: str, first: int, longest: int, *, invariant: bool = False, work: Callable[[float], float] | None = None
) -> Controller:
    """The controller of this name: one of FOLLOWING, or "fixed" and "auto", which always ask for `first`.

    first: the length before anything is measured, and that of sampled requests with a seed of their own. longest: of any draft; 0:
    nothing is drafted. invariant, work: see `Adaptive`; BASS's rule looks at no times. Raises ConfigError for an unknown name.
    """
    if name not in ("auto", "fixed", *FOLLOWING):
        raise ConfigError(unknown_name("way to set draft lengths", name, ["fixed", *FOLLOWING]))
    if name not in FOLLOWING or not longest:
        return Fixed(first)
    kind = FOLLOWING[name]
    if issubclass(kind, Bass):
        return kind(first, longest, invariant=invariant)
    return kind(first, longest, invariant=invariant, work=work)

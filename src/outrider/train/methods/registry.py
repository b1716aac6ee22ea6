"""The table of learned methods: what `outrider train` can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields

from outrider.errors import ConfigError, unknown_name
from outrider.train.losses import LOSSES
from outrider.train.methods.base import Method, MethodOptions
from outrider.train.methods.dflash import DFlash
from outrider.train.methods.draft import DraftModel
from outrider.train.methods.eagle import Eagle1, Eagle3
from outrider.train.methods.hydra import Hydra
from outrider.train.methods.medusa import Medusa
from outrider.train.methods.mtp import Mtp
from outrider.train.slot_losses import objective_named

METHODS: Mapping[str, Method] = {
    m.name: m for m in (Medusa(), Hydra(), Eagle3(), Eagle1(), Mtp(), DFlash(), DraftModel())
}
"""A row for each method, by its name."""
LABELS = ("distributions", "tokens")


def method_named(name: str) -> Method:
    """The method of this name; for an unknown one ConfigError names the nearest known name."""
    if name not in METHODS:
        raise ConfigError(unknown_name("drafter to train", name, tuple(METHODS)))
    return METHODS[name]


def check(method: Method, options: MethodOptions) -> None:
    """Raise ConfigError for options that are out of range, do not go together, or would change nothing."""
    levels, length = options.levels, options.length
    if levels < 1 or length <= levels + 1:
        raise ConfigError(f"levels must be >= 1 and well below the rows' length, got {levels}, {length}")
    if options.anchors < 1:
        raise ConfigError(f"a row needs at least one anchor, got {options.anchors}")
    objective_named(options.objective, levels + 1)
    if options.labels not in LABELS:
        raise ConfigError(unknown_name("kind of labels", options.labels, LABELS))
    if options.loss not in LOSSES:
        raise ConfigError(unknown_name("loss", options.loss, LOSSES))
    known = [f for f in fields(options) if f.default is not MISSING]
    given = frozenset(f.name for f in known if getattr(options, f.name) != f.default)
    unread = sorted(given & frozenset().union(*(m.reads for m in METHODS.values())) - method.reads)
    if unread:
        others = ", ".join(name for name, other in METHODS.items() if set(unread) <= other.reads)
        raise ConfigError(f"{method.name} does not read {', '.join(unread)}" + (f"; {others} would" if others else ""))
    method.check(options, given)

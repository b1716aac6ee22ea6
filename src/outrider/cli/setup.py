"""From options to an engine, with progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outrider.cli import options as opt

if TYPE_CHECKING:
    from outrider.build import Engine


def engine_from_options(**options: Any) -> Engine:
    """`build_engine` with a progress bar and with notices (fallbacks, choices) on stderr."""
    from outrider.build import build_engine

    with opt.loading("loading") as progress:
        engine = build_engine(progress=progress, **options)
    tell(engine.notices)
    return engine


def tell(notices: Iterable[str]) -> None:
    """Say on stderr what keeps an engine from being faster, each once."""
    for notice in dict.fromkeys(notices):
        opt.say(notice)

"""From options to an engine, with progress on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outrider.cli import options as opt

if TYPE_CHECKING:
    from outrider.engine.engine import Engine


def engine_from_options(**options: Any) -> Engine:
    """`build_engine` with a progress bar and with notices (fallbacks, choices) on stderr."""
    from outrider.engine.build import build_engine

    with opt.loading("loading") as progress:
        engine = build_engine(progress=progress, **options)
    for notice in engine.notices:
        opt.say(notice)
    return engine

"""The grammars of an engine, which makes them for the first request that has one."""

from __future__ import annotations

from outrider.engine.core import Engine
from outrider.sampling.grammar import Grammars


def grammars_of(engine: Engine) -> Grammars:
    engine.compile_grammar("regex:a")
    found = engine.parts.law.grammars
    assert found is not None
    return found

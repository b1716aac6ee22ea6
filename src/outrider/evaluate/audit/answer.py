"""An audit from a loaded engine to its document: of the engine's own texts, or of another generator's under its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from outrider.build import Engine
from outrider.errors import ConfigError
from outrider.evaluate.audit.audit import Auditor, audit
from outrider.evaluate.audit.findings import EXACT, NOT_THE_TARGET, AuditOptions, as_document
from outrider.evaluate.audit.greedy import audit_greedy
from outrider.evaluate.audit.whitebox import joint_distribution, rounding
from outrider.evaluate.measure import machine
from outrider.params import SamplingParams
from outrider.telemetry.ledger import ledger, summary


def allowed(tolerance: str, engine: Engine, text: list[int]) -> float:
    """Total variation per token that rounding may cause: what was said, or for "auto" twice what `text` shows."""
    if tolerance == "auto":
        return max(1e-6, 2 * rounding(engine.parts.target, text[:64]))
    try:
        return float(tolerance)
    except ValueError:
        raise ConfigError(f"--tolerance is a number or auto, got {tolerance!r}") from None


def sampled(
    engine: Engine,
    source: Any,
    texts: list[list[int]],
    options: AuditOptions,
    *,
    samples: int,
    ours: bool,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[dict[str, Any], int]:
    """The audit of sampled text: the document, and 0 (exact so far), 1 (not the target's distribution) or 3 (inconclusive).

    source: generates texts [prompts x samples] token ids. ours: it is `engine`, whose ledger and rule are then tested too.
    """
    models = list(engine.loaded.models.values()) if engine.loaded is not None else []
    auditor = Auditor(engine.parts.target, models[0][0] if models else None, options, tuple(engine.eos))
    engine.reset()
    verdict = audit(source, texts, auditor, samples=samples, progress=progress)
    document = {**as_document(verdict), "machine": machine()}
    bad = verdict.outcome == NOT_THE_TARGET
    if ours:
        joint = joint_distribution(engine.parts.rule)
        book = ledger(engine.counts, options.level)
        document["white_box"] = {**summary(engine.counts), "joint_law_p_value": joint.p_value}
        bad = bad or not book.agrees or joint.p_value < options.level * 1e-3
    return document, 1 if bad else 0 if verdict.outcome == EXACT else 3


def greedy(engine: Engine, source: Any, texts: list[list[int]]) -> tuple[dict[str, Any], int]:
    """The audit of greedy text: the document and the exit code."""
    v = audit_greedy(source, texts, engine.parts.target)
    document = {**asdict(v), "outcome": v.outcome, "sentence": v.outcome, "ties": len(v.departures) - len(v.wrong)}
    return document, 1 if v.wrong else 0 if v.texts else 3


def document_of(
    engine: Engine,
    source: Any,
    texts: list[list[int]],
    params: SamplingParams,
    asked: dict[str, Any],
    *,
    ours: bool,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[dict[str, Any], int]:
    """Either audit, by the temperature. asked: samples, level, tolerance, detect, seed."""
    if params.greedy:
        return greedy(engine, source, texts)
    tolerance = allowed(asked["tolerance"], engine, texts[0])
    options = AuditOptions(params, asked["level"], tolerance, asked["detect"], asked["seed"])
    return sampled(engine, source, texts, options, samples=asked["samples"], ours=ours, progress=progress)

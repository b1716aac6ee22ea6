"""`outrider plan --contexts`: whether a view of the target's own cache, or a draft model, pays at long context on this machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.cli.options import parse_acceptance
from outrider.cli.plan_options import PlanOptions
from outrider.errors import ConfigError

MOST = 1 << 20
"""The longest context that is planned for."""


def parse_contexts(text: str) -> list[int]:
    """ "2048,8192" as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 8 and 1 <= int(part) <= MOST for part in parts):
        raise ConfigError(f"contexts are numbers of tokens from 1 to {MOST}, as 2048,8192, got {text!r}")
    return sorted({int(part) for part in parts})


def drafts_of(drafts: list[str]) -> list[str]:
    """The drafters that are planned for: views and draft models; the view of `auto` if none was given. Raises ConfigError for
    others."""
    from outrider.drafters.registry import AUTO_VIEW, LEARNED
    from outrider.drafters.spec import SHAPES
    from outrider.drafters.without_model import HOSTS

    if drafts in ([], ["auto"]):
        return [f"sparse:{AUTO_VIEW}"]
    for draft in drafts:
        kind = draft.partition("+")[0].partition(":")[0]
        prefixes = (*SHAPES, "greedy", "dynamic", "stop", "ahead", "apart")
        if kind in (*LEARNED, *HOSTS, *prefixes, "auto", "none", "early", "jacobi"):
            raise ConfigError(
                "--contexts is about views of the target's own cache and draft models: give --draft sparse:window:16+496, or the "
                f"folder of a model, without a prefix, got {draft!r}"
            )
    return drafts


def contexts_document(engine: Any, lengths: list[int], batches: list[int], asked: PlanOptions) -> dict[str, Any]:
    """Constants of this machine, the best drafter, length and gain by context and batch, and from which context on a view gains."""
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning.contexts import choose, fit_contexts

    contexts = parse_contexts(asked.contexts or "")
    names = drafts_of(list(asked.draft or []))
    accepted = parse_acceptance(asked.acceptance, len(names))
    with terminal.loading("timing passes"):
        times = fit_contexts(engine.parts.target, max(contexts), max(batches), rounds=asked.rounds)
        candidates = [
            candidate(engine, name, a, max(contexts), max(batches), asked.rounds)
            for name, a in zip(names, accepted, strict=True)
        ]
    choices = choose(times, contexts, batches, candidates, lengths)
    views = [c for c in candidates if c.by is None]
    return {
        "drafts": [
            {"draft": c.draft, "acceptance": c.acceptance, "constants": c.by and asdict(c.by)} for c in candidates
        ],
        "constants": asdict(times),
        "choices": [asdict(c) for c in choices],
        "crossing": [
            {"draft": c.draft, "batch": b, "context": times.crossing(b, c.view, c.acceptance)}
            for c in views
            for b in batches
        ],
        "machine": machine(),
    }


def candidate(engine: Any, name: str, acceptance: float, longest: int, batch: int, rounds: int) -> Any:
    """A drafter to choose from; passes of a draft model are timed."""
    from outrider.drafters.sparse import parse_sparse
    from outrider.evaluate.planning.contexts import Candidate, fit_contexts
    from outrider.loading import load_model

    kind, _, view = name.partition(":")
    if kind == "sparse" and view == "int8":
        made = engine.parts.target.storing(view)
        return Candidate(name, acceptance, math.inf, fit_contexts(made, longest, batch, rounds=rounds))
    if kind == "sparse":
        return Candidate(name, acceptance, parse_sparse(view).size)
    model, _ = load_model(engine.loaded, engine.loaded.options, name)
    reach = min(longest, model.max_length - 16)
    return Candidate(name, acceptance, math.inf, fit_contexts(model, reach, batch, rounds=rounds), model.max_length)


def print_contexts(d: dict[str, Any]) -> None:
    """The document for people."""
    named = ", ".join(f"{one['draft']} at an acceptance of {one['acceptance']:g}" for one in d["drafts"])
    out, table = terminal.console(), Table(title=named)
    for column in ("context", "sequences", "plain step", "drafter", "draft length", "predicted gain"):
        table.add_column(column, justify="right")
    for c in d["choices"]:
        gain = f"{c['gain']:.2f}" if c["length"] else "plain decoding"
        step = f"{1e3 * c['plain_seconds']:.2f} ms"
        table.add_row(str(c["context"]), str(c["batch"]), step, c["draft"] or "none", str(c["length"]), gain)
    tables.show(table, out)
    for one in d["crossing"]:
        where = f"from {one['context']} tokens of context on" if one["context"] is not None else "at no context"
        out.print(f"{one['draft']}, {one['batch']} at a time: faster than plain decoding {where}")

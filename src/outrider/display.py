"""How an engine shows itself: in one line, as a table in a notebook, and as a picture of its acceptance and its ledger."""

from __future__ import annotations

from typing import Any

from outrider import canvas, markup
from outrider.engine.core import EngineCore
from outrider.errors import printable
from outrider.protocols import Target
from outrider.telemetry.ledger import acceptance_at, acceptance_length, draft_acceptance_rate, ledger, spent

MOST_NOTICES = 10
"""Notices that a notebook shows."""


def line_of(engine: EngineCore, path: str | None) -> str:
    """An engine in one line. path: where its target is from, if from a folder."""
    parts, length = engine.parts, acceptance_length(engine.counts)
    where = type(parts.target).__name__ if path is None else path
    done = f", {engine.steps} steps" + (f", {length:.2f} tokens per step" if length else "")
    return printable(
        f"Engine(target={where!r} ({kind_of(parts.target)}, {parts.target.device}), draft={parts.drafter.name!r}, "
        f"rule={parts.rule.name!r}, slots={engine.options.slots}, max_length={engine.max_length}{done})"
    )


def kind_of(target: Target) -> str:
    """The type of a target's numbers, and that of its cache where it is another."""
    kind, stored = str(target.dtype).removeprefix("torch."), getattr(target, "stored", None)
    return kind if stored is None or stored.name == kind else f"{kind}, {stored.name} cache"


def html_of(engine: EngineCore, path: str | None) -> str:
    """An engine as a table, with its sums and what users should read."""
    parts, counts, book = engine.parts, engine.counts, ledger(engine.counts)
    rows: list[tuple[str, object]] = [
        (
            "target",
            f"{path or ''} {type(parts.target).__name__}, {kind_of(parts.target)}, {parts.target.device}".strip(),
        ),
        ("draft", f"{parts.drafter.name}, up to {parts.drafter.max_depth} tokens"),
        ("rule", f"{parts.rule.name}, {'keeps the distribution' if parts.rule.lossless else 'LOSSY'}"),
        ("room", f"{engine.options.slots} slots, {engine.max_length} tokens each"),
    ]
    if counts.steps:
        rate, at = draft_acceptance_rate(counts), acceptance_at(counts)
        rows += [
            ("so far", f"{counts.emitted} tokens in {counts.steps} sequence-steps, {acceptance_length(counts):.2f} a step"),
            ("accepted", "nothing was proposed" if rate is None else f"{rate:.1%} of {counts.proposed} proposed"),
            ("by position", ", ".join(f"{a:.2f}" for a in at[:16]) or "none judged"),
            (
                "rejections",
                f"{book.predicted:.1f} predicted, {book.observed} observed; 99% {book.low:.1f} to {book.high:.1f}: "
                f"{'agree' if book.agrees else 'DISAGREE'}",
            ),
        ]  # fmt: skip
        if counts.bias:
            rows.append(("distribution", spent(counts.bias, counts.emitted)))
    notices = engine.notices
    rows += [("notice", text) for text in notices[:MOST_NOTICES]]
    if len(notices) > MOST_NOTICES:
        rows.append(("notice", f"and {len(notices) - MOST_NOTICES} more: engine.notices"))
    return markup.table(rows)


def plot_of(engine: EngineCore) -> Any:
    """Acceptance by position, and predicted beside observed rejections with the interval of 99%."""
    figure, (left, right) = canvas.new_picture(2)
    counts, book = engine.counts, ledger(engine.counts)
    at = acceptance_at(counts)
    left.bar(range(1, len(at) + 1), at, color=canvas.COLOURS[2])
    left.set(xlabel="position in the draft", ylabel="accepted of judged", ylim=(0, 1), title="acceptance by position")
    left.set_xticks(range(1, len(at) + 1))
    right.errorbar(
        [0], [book.predicted],
        yerr=[[max(0.0, book.predicted - book.low)], [max(0.0, book.high - book.predicted)]],
        fmt="o", capsize=6, color=canvas.COLOURS[0], label="predicted, 99%",
    )  # fmt: skip
    right.plot([1], [book.observed], "s", color=canvas.COLOURS[1], label="observed")
    right.set(xlim=(-0.7, 1.7), ylabel="rejections", title=f"ledger: {'agree' if book.agrees else 'DISAGREE'}")
    right.set_xticks([0, 1], ["predicted", "observed"])
    return figure

"""`outrider plan --gpus`: a target that is not here, on paper."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.cli.options import parse_acceptance, parse_batches, parse_lengths
from outrider.errors import ConfigError

SHOWN = 4
"""Layouts that are shown for each number of sequences."""


def paper_document(target: str | None, output: int, asked: Any) -> dict[str, Any]:
    """The plan of `evaluate.planning.paper`. Raises ConfigError for sizes, machines and links that are not known."""
    from outrider.evaluate.planning import paper
    from outrider.theory import hardware, links

    if target is None:
        raise ConfigError("--gpus plans on paper: name the size of the target, as --target 70b")
    drafts = asked.draft or ["1b"]
    (acceptance,) = parse_acceptance(asked.acceptance, 1)
    if len(drafts) > 1:
        raise ConfigError("--gpus plans on paper for one draft: give --draft once")
    try:
        found = paper.Paper(
            hardware.model(target), hardware.model(drafts[0]), hardware.hardware(asked.hardware), asked.gpus,
            paper.usual_link(asked.hardware, asked.link), links.link(asked.between), acceptance, asked.context, output,
            asked.efficiency, asked.disaggregated, asked.recurrent,
        )  # fmt: skip
        return paper.paper_document(found, parse_batches(asked.batches), parse_lengths(asked.lengths), asked.price)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def print_paper(d: dict[str, Any]) -> None:
    """The document for people: the best layouts for each number of sequences, and every assumption."""
    out = terminal.console()
    out.print(
        f"predicted from data sheets, not measured: {d['gpus']} GPUs; the {SHOWN} fastest layouts for each number of sequences"
    )
    table = Table()
    priced = d["choices"][0]["cost_per_million_tokens"] is not None
    columns = (
        "sequences",
        "layout",
        "length",
        "tokens/s",
        "per sequence",
        "plain",
        "speed-up",
        "waiting for links",
        "first token ms",
    )
    for name in (*columns, "tokens/s per GPU, prompts included", *(["per million tokens"] if priced else [])):
        table.add_column(name, justify="left" if name == "layout" else "right", overflow="fold")
    shown: dict[int, int] = {}
    for c in d["choices"]:
        shown[c["sequences"]] = shown.get(c["sequences"], 0) + 1
        if shown[c["sequences"]] > SHOWN:
            continue
        cells = [
            str(c["sequences"]),
            c["name"],
            str(c["length"]),
            tables.rate(c["tokens_per_second"]),
            f"{c['per_sequence']:.1f}",
        ]
        cells += [
            tables.rate(c["plain"]),
            f"{c['speedup']:.2f}",
            f"{c['communication']:.0%}",
            f"{1e3 * c['first_token']:.0f}",
        ]
        table.add_row(
            *cells, tables.rate(c["served_per_gpu"]), *([f"{c['cost_per_million_tokens']:.2f}"] if priced else [])
        )
    tables.show(table, out)
    for line in d["assumptions"]:
        out.print(f"  {line}", soft_wrap=True, markup=False, style="dim")

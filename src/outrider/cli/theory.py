"""`outrider theory`: calculators of the exact theory, and the figures of the base paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import paths, tables, terminal
from outrider.cli.options import Json
from outrider.cli.theory_speedup import speedup
from outrider.errors import ConfigError

theory_app = typer.Typer(
    name="theory",
    help="Exact rejections, calls and speed-up of speculative decoding, and the figures of the base paper.",
    short_help="Calculators, and the figures of the base paper.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MOST_ENTRIES = 250_000_000
"""Transition probabilities of one chain that `chain` computes with: 2 GB, and as many of the draft's."""
MOST_WORK = 10_000_000_000
"""Transition probabilities times drafts: some minutes."""


@contextmanager
def theory_errors() -> Iterator[None]:
    """A ValueError of `outrider.theory` is the user's input: one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


# -- chain ------------------------------------------------------------------------------------------------------------


@theory_app.command("chain", short_help="Rejections and calls of a random pair, exactly.")
def chain(
    states: Annotated[int, typer.Option("--states", min=1, max=1000, help="Size of the vocabulary.")] = 7,
    horizon: Annotated[int, typer.Option("--horizon", min=1, max=2000, help="Tokens of one output.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the instance.")] = 10,
    drafts: Annotated[int, typer.Option("--drafts", min=1, max=100_000, help="Drafts scored by one call.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            "-l",
            min=0,
            help="Longest draft; a bonus token follows a draft that is accepted whole. Default: to the horizon, as in the paper.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compute rejections and target calls of a random pair of Markov chains exactly: no sampling, no error bars.

    The instance is drawn as in Yin et al., NeurIPS 2024 (7 states, seed 10, uniform prompt).

    Example: outrider theory chain --states 7 --horizon 50 --length 4
    """
    if states * states * horizon > MOST_ENTRIES:
        raise ConfigError(
            f"{states} states and {horizon} tokens need {16e-9 * states * states * horizon:.0f} GB for the two chains, and at "
            f"most {16e-9 * MOST_ENTRIES:.0f} are taken: at {states} states that is --horizon {MOST_ENTRIES // states**2}"
        )
    if drafts > max(1, most := MOST_WORK // (states * states * horizon)):
        raise ConfigError(
            f"--drafts {drafts} of {states} states and {horizon} tokens take hours: at most {max(1, most)}"
        )
    with theory_errors():
        document = chain_document(states, horizon, seed, drafts, length)
    terminal.print_json(document) if json else print_chain(document)


def chain_document(states: int, horizon: int, seed: int, drafts: int, length: int | None) -> dict[str, Any]:
    """The numbers of `outrider theory chain`; ratios carry their denominators in their names."""
    import math

    from outrider.theory import batch, chains, rejections

    instance = chains.best_guess(states, horizon, seed)
    moments = rejections.rejection_moments(instance, drafts, length)
    counts = rejections.calls(instance, drafts, length)
    return {
        "states": states,
        "horizon": horizon,
        "seed": seed,
        "drafts": drafts,
        "length": length,
        "expected_rejections": moments.mean,
        "standard_deviation": moments.standard_deviation,
        "oracle_calls": counts.calls,
        "bonus_tokens": counts.bonus,
        "accepted_tokens": counts.accepted,
        "tokens_per_call": counts.tokens_per_call,
        "tokens_per_rejection": horizon / moments.mean if moments.mean > 0.0 else None,
        "lower_bound": rejections.lower_bound(instance),
        "limit": batch.expected_rejections(instance, math.inf),
    }


def print_chain(d: dict[str, Any]) -> None:
    """The document for people."""
    reach = "to the horizon" if d["length"] is None else f"of at most {d['length']}"
    table = Table(
        title=f"{d['states']} states, {d['horizon']} tokens, seed {d['seed']}, {d['drafts']} draft(s) {reach}",
        title_justify="left",
    )
    for column in ("quantity", "value", "what it is"):
        table.add_column(column, overflow="fold")
    ratio = d["tokens_per_rejection"]
    rows = [
        (
            "expected rejections",
            f"{d['expected_rejections']:.4f}",
            "tokens that replace a rejected draft token (Theorems 1 and 3)",
        ),
        ("standard deviation", f"{d['standard_deviation']:.3f}", "of the number of rejections in one output"),
        ("target calls", f"{d['oracle_calls']:.4f}", "expected; plain decoding makes one per token"),
        ("accepted tokens", f"{d['accepted_tokens']:.4f}", "drafted and accepted"),
        ("bonus tokens", f"{d['bonus_tokens']:.4f}", "sampled after a draft was accepted whole"),
        ("tokens per call", f"{d['tokens_per_call']:.3f}", "tokens / calls: the speed-up if drafting is free"),
        ("tokens per rejection", "none" if ratio is None else f"{ratio:.3f}", "the ratio printed in the paper"),
        (
            "lower bound",
            f"{d['lower_bound']:.4f}",
            "rejections of any rule of the paper's family, one draft to the horizon (Theorem 2)",
        ),
        ("limit", f"{d['limit']:.4f}", "rejections with ever more drafts, to the horizon (Proposition 1)"),
    ]
    for row in rows:
        table.add_row(*row)
    tables.show(table)


# -- speedup ----------------------------------------------------------------------------------------------------------

theory_app.command("speedup", short_help="Tokens per second, from data sheets.")(speedup)


# -- figures ----------------------------------------------------------------------------------------------------------


@theory_app.command("figures", short_help="Every figure of the base paper, recomputed.")
def figures(
    out: Annotated[
        Path,
        typer.Option("--out", callback=paths.out_folder, help="Folder for the pictures and index.md; made if missing."),
    ],
    runs: Annotated[
        int,
        typer.Option("--runs", min=200, max=1_000_000, help="Simulated outputs per curve; the paper has 20000."),
    ] = 20000,
    quick: Annotated[bool, typer.Option("--quick", help="1000 simulated outputs per curve.")] = False,
    json: Json = False,
) -> None:
    """Recompute every figure of Yin et al., NeurIPS 2024: exact beside simulated, as SVG and PNG, with a page.

    Example: outrider theory figures --out figures --quick
    """
    paths.needs("plot", ("matplotlib",))
    from outrider.theory import figures as book

    with theory_errors(), terminal.loading("simulating and drawing"):
        made = book.all_figures(1000 if quick else runs)
        try:
            files = book.write(made, out)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror or error}") from None
    rows = [{"name": f.name, "caption": f.caption, "reproduced": f.reproduced, "differs": f.differs} for f in made]
    if json:
        terminal.print_json({"files": [str(f) for f in files], "figures": rows})
        return
    table = Table(title=f"{len(made)} figures in {out}", title_justify="left")
    for column in ("figure", "reproduced", "what differs, and why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["reproduced"], row["differs"])
    tables.show(table)

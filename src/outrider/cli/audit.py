"""`outrider audit`: is a generator's text distributed as the target's?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import paths, tables, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import ChatTemplate, Json, refuse_beside
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.evaluate.workloads import told
from outrider.options import EngineOptions


@dataclass(frozen=True, slots=True)
class AuditedBy:
    """What is audited, on how much text, and how sure the answer must be. As on the command line."""

    url: Annotated[
        str | None,
        typer.Option("--url", help="Audit the OpenAI-compatible server at this address.", show_default=False),
    ] = None
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model at --url. Default: --target.", show_default=False)
    ] = None
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OUTRIDER_API_KEY", help="Key for --url.", show_default=False)
    ] = None
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            help="Audit module:function, called with (prompt token ids, seed); it returns the new token ids.",
            show_default=False,
        ),
    ] = None
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            callback=paths.file,
            help="Audit recorded texts: JSON lines of prompt_token_ids and token_ids.",
            show_default=False,
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", callback=paths.file, help="JSONL or text file of prompts.", show_default=False),
    ] = None
    chat_template: ChatTemplate = True
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts used, from the start of the set.")] = 32
    samples: Annotated[int, typer.Option("--samples", min=1, help="Continuations of each prompt.")] = 2
    level: Annotated[
        float, typer.Option("--level", help="Highest probability that an exact generator is ever rejected.")
    ] = 0.01
    tolerance: Annotated[
        str,
        typer.Option(
            "--tolerance", help="Total variation per token that rounding may cause, or auto: it is measured here."
        ),
    ] = "auto"
    detect: Annotated[
        float,
        typer.Option("--detect", help="Bias per token that must be detectable for a pass; otherwise inconclusive."),
    ] = 0.1
    seed: Annotated[int, typer.Option("--seed", help="Seed of the audited texts.")] = 0

    @property
    def other(self) -> str | None:
        """The generator that is audited in place of our engine: an address, a function or a file."""
        return next((str(given) for given in (self.url, self.python, self.texts) if given is not None), None)

    def check(self) -> None:
        """ConfigError where more than one generator is named, or no audit has such a level: before a model is loaded."""
        if not (0 < self.level < 1 and 0 < self.detect < 1):
            raise ConfigError(f"--level and --detect lie between 0 and 1, got {self.level:g} and {self.detect:g}")
        if sum(x is not None for x in (self.url, self.python, self.texts)) > 1:
            raise ConfigError("--url, --python and --texts each name a generator: use one")
        if self.texts is not None:  # they have their prompts, and as many texts of each as they have
            refuse_beside("texts", self, ("prompts", "chat_template", "count", "samples"))
        if self.model is not None and self.url is None:
            raise ConfigError("--model is the model's name at --url: add it, or leave this out")
        if self.url is not None:
            from outrider.web import base_of  # no other command needs a client of HTTP at once

            base_of(self.url)


@takes(ENGINE, "options", leave_out=("slots",))
@takes(AuditedBy, "asked")
@takes(
    SAMPLING,
    "sampling",
    only=("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos"),
    max_tokens=64,
)
def audit(options: EngineOptions, asked: AuditedBy, sampling: Any, json: Json = False) -> None:
    """Test whether texts have the target's own distribution: of our engine, a server (--url) or a Python function (--python).

    Exit code 0: exact so far, to the stated resolution. 1: not the target's distribution. 3: inconclusive.

    Example: outrider audit --count 4 --max-tokens 16
    """
    from outrider.evaluate.workloads import load_rows, ready

    asked.check()
    rows = [] if asked.texts else load_rows(asked.prompts, asked.count)
    engine = load_engine(replace(options, slots=1 if asked.other else 8))
    found = None if asked.texts else ready(engine, asked.prompts, rows, asked.chat_template)
    source, prompts, samples = source_of(asked, engine, sampling, options.target, [] if found is None else found.ids)
    document, code = answered(engine, source, prompts, sampling, asked, samples)
    document |= {} if found is None else {"data": found.data}
    document["generator"] = asked.other or f"{engine.parts.drafter.name} / {engine.parts.rule.name}"
    terminal.print_json(document) if json else print_document(document)
    raise typer.Exit(code)


def source_of(
    asked: AuditedBy, engine: Any, sampling: Any, target: str | None, prompts: list[list[int]]
) -> tuple[Any, list[list[int]], int]:
    """What generates the texts, the tokens of the prompts, and how many continuations each has."""
    from outrider.evaluate.audit import sources as src

    if asked.texts:
        recorded = src.read_texts(asked.texts)
        return recorded.source(), recorded.prompts, recorded.samples
    if asked.url is not None:
        name = asked.model or target
        if name is None:
            raise ConfigError("--url needs the model's name there: add --model")
        endpoint = src.Endpoint(asked.url, name, asked.api_key)
        return src.of_endpoint(endpoint, sampling, engine.parts.target.vocab_size), prompts, asked.samples
    if asked.python is not None:
        return src.of_callable(src.load_callable(asked.python)), prompts, asked.samples
    return src.of_engine(engine, sampling), prompts, asked.samples


def answered(
    engine: Any, source: Any, texts: list[list[int]], sampling: Any, asked: AuditedBy, samples: int
) -> tuple[dict[str, Any], int]:
    """The audit of greedy or of sampled text: the document and the exit code."""
    from outrider.evaluate.audit.answer import document_of

    said = {"samples": samples, **{name: getattr(asked, name) for name in ("level", "tolerance", "detect", "seed")}}
    what = "greedy continuations" if sampling.greedy else f"{samples} continuations"
    with terminal.loading(f"auditing {what} of {len(texts)} prompts") as progress:
        return document_of(engine, source, texts, sampling, said, ours=asked.other is None, progress=progress)


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    console = terminal.console()
    console.print(f"[bold]{d['generator']}: {d['sentence']}[/bold]")
    if "data" in d:
        console.print(f"prompts              {told(d['data'])}")
    console.print(f"tested               {d['tokens']} tokens of {d['texts']} texts, {d['failed']} failed")
    if "departures" in d:
        for x in d["departures"]:
            kind = "tie" if x["gap"] <= 2 * x["delta"] else "WRONG"
            console.print(
                f"  prompt {x['prompt']}, token {x['position']}: margin {x['gap']:.4g}, rounding {x['delta']:.2g}: {kind}"
            )
        return
    alarm = "" if d["alarm_at"] is None else f", alarm after {d['alarm_at']} tokens"
    console.print(
        f"evidence             {power(d['log10_evidence'])} against the target's distribution "
        f"(alarm at {power(-math.log10(d['level']))}){alarm}"
    )
    console.print(f"tolerance            {d['tolerance']:.2g} total variation per token")
    if d["bias"] is not None:
        console.print(
            f"bias                 about {d['bias']:.3f} per token; {power(d['odds'])} times likelier than the next cause"
        )
    console.print(
        f"controls             target's own text {power(d['control_honest'])}, planted bias of {d['detect']:g} "
        f"{power(d['control_planted'])} (at their highest)"
    )
    if d["law_gap"] is not None:
        console.print(f"reported log-probs   differ from ours by {d['law_gap']:.2g} total variation per token")
    if "white_box" in d:
        book = d["white_box"]["ledger"]
        console.print(
            f"ledger               predicted {book['predicted']:.1f} rejections, observed {book['observed']}: "
            f"{'agree' if book['agrees'] else 'DISAGREE'}; "
            f"joint distribution of the rule p = {d['white_box']['joint_law_p_value']:.3g}"
        )
    tables.show(families_table(d), console)


def power(exponent: float) -> str:
    """A power of ten as text: what rounds to zero has no sign."""
    return f"10^{round(exponent, 1) + 0.0:.1f}"


def families_table(d: dict[str, Any]) -> Table:
    """Evidence for each family of mistakes, and the least bias of it that would have been seen."""
    table = Table(title="families of mistakes", title_justify="left")
    for column in ("mistake", "evidence", "detectable bias per token"):
        table.add_column(column)
    for family, value in list(d["families"].items()):
        mine = [x for x in d["detectable"] if x["family"] == family]
        seen = [x["tv"] for x in mine if x["tv"] is not None]
        table.add_row(family, power(value), f"{min(seen):.3f}" if seen else "")
    return table

"""Options that several commands share, each declared once, and the console they report on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from outrider.cli import paths
from outrider.cli.tables import console, plain, show
from outrider.errors import ConfigError

__all__ = ["console", "err", "plain", "show"]

Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        callback=paths.model,
        help="Target model: a folder or a Hub name. Default: the shipped pair.",
        show_default=False,
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        "-d",
        callback=paths.drafter,
        help="What proposes: none, ngram, auto, a folder or a Hub name, or several joined by '+' (first that has a draft).",
    ),
]
Length = Annotated[
    int,
    typer.Option("--length", "-l", min=0, max=64, help="Draft length (tokens proposed per step); 0 is plain decoding."),
]
Rule = Annotated[
    str,
    typer.Option(
        "--rule",
        help="How drafts are judged: auto, speculative_sampling, block, k_seq, optimal_transport, spechub, traversal, match; lossy "
        "ones need --allow-lossy: tv_budget:per_token=0.05,per_sequence=2, over_acceptance, lenience, mentored, typical, top_k.",
    ),
]
AllowLossy = Annotated[
    bool,
    typer.Option(
        "--allow-lossy",
        help="Let a rule change the distribution of the text; every output then says so and by how much.",
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the smallest set of tokens with this mass.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than this share of the most likely one.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Divide the logits of tokens seen before; 1: off.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Subtract once from the logits of tokens in the output.")
]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="Subtract per occurrence in the output.")]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Same seed, same text, whatever runs beside it. Default: a new one each time.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to emit.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Stop before this string (repeatable).", show_default=False)
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", help="The whole output must match this regular expression.", show_default=False),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        callback=paths.readable,
        help="The output must be JSON of the schema in this file.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float32 or float64.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize-draft", help="int8 or int4 weights for the draft model: free of bias.", show_default=False
    ),
]
Implementation = Annotated[
    str, typer.Option("--implementation", help="auto, lean (our runtime) or hf (unmodified Hugging Face model).")
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        "--speculative-config", help="vLLM's JSON, unchanged; replaces --draft and --length.", show_default=False
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length", help="Context to reserve, prompt and output. Default: the model's.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]

err = console(stderr=True)


def say(text: str) -> None:
    """One dim line on stderr."""
    err.print(f"outrider: {text}", style="dim", markup=False)


_UNSEEN = re.compile(r"[\x7f-\x9f\ud800-\udfff]")
"""What JSON may hold as it is and a terminal or an encoding may not: written as JSON's escapes."""


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command; NaN becomes null."""
    text = json.dumps(_clean(document), indent=2, ensure_ascii=False)
    typer.echo(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _clean(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return value


@contextmanager
def loading(text: str) -> Iterator[Any]:
    """A progress bar on stderr while something loads; yields `progress(fraction)`. Vanishes when done; a pipe gets none."""
    if plain(err):
        yield lambda fraction: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


def grammar(regex: str | None, schema: Path | None) -> str | None:
    """The `grammar` of the sampling parameters that --regex or --json-schema ask for. Raises ConfigError."""
    if regex is not None and schema is not None:
        raise ConfigError("--regex and --json-schema exclude each other: give one")
    if schema is None:
        return None if regex is None else f"regex:{regex}"
    try:
        return "json:" + schema.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{schema} cannot be read: {error}") from None

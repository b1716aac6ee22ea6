"""The options of sampling on the command line: each makes a field of `SamplingParams`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths
from outrider.cli.takes import Table
from outrider.errors import ConfigError
from outrider.files import read_text

MOST = 1 << 20
"""Largest file of a schema, bytes; what its grammar may be is said later."""


def _params(**values: Any) -> Any:
    """The `SamplingParams` of the values."""
    from outrider.params import SamplingParams

    return SamplingParams(**{**values, "stop": tuple(values.get("stop") or ())})


SAMPLING = Table(
    _params,
    {
        "temperature": Annotated[
            float, typer.Option("--temperature", help="Sampling temperature; 0 always takes the most likely token.")
        ],
        "top_k": Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0 keeps all.")],
        "top_p": Annotated[
            float, typer.Option("--top-p", help="Keep the smallest set of tokens with this probability.")
        ],
        "min_p": Annotated[
            float, typer.Option("--min-p", help="Drop tokens less likely than this share of the most likely one.")
        ],
        "repetition_penalty": Annotated[
            float,
            typer.Option(
                "--repetition-penalty",
                help="Divide the logits of tokens that stand in the prompt or the output by this; 1 is off.",
            ),
        ],
        "presence_penalty": Annotated[
            float,
            typer.Option(
                "--presence-penalty", help="Subtract this from the logits of tokens that stand in the output."
            ),
        ],
        "frequency_penalty": Annotated[
            float,
            typer.Option("--frequency-penalty", help="Subtract this for every time a token stands in the output."),
        ],
        "seed": Annotated[
            int | None,
            typer.Option(
                "--seed",
                help="The same seed gives the same text, whatever else is decoded. Default: a new one each time.",
                show_default=False,
            ),
        ],
        "n": Annotated[int, typer.Option("--samples", help="Independent samples of the prompt.")],
        "max_tokens": Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of an output.")],
        "stop": Annotated[
            list[str] | None,
            typer.Option("--stop", help="End the output before this string (repeatable).", show_default=False),
        ],
        "logprobs": Annotated[
            int | None,
            typer.Option(
                "--logprobs",
                help="Report the log-probability of each token and of this many alternatives.",
                show_default=False,
            ),
        ],
        "ignore_eos": Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-text token.")],
    },
    {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "n": 1,
        "max_tokens": 128,
        "stop": None,
        "logprobs": None,
        "ignore_eos": False,
    },
)
"""Field of `SamplingParams` -> its option. Of the others, the grammar has two of its own; the rest has none."""
Regex = Annotated[
    str | None,
    typer.Option("--regex", help="The whole output must match this regular expression.", show_default=False),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        callback=paths.readable,
        help="The output must be JSON that fits the schema in this file.",
        show_default=False,
    ),
]


def grammar(regex: str | None, schema: Path | None) -> str | None:
    """The `grammar` of the sampling parameters that --regex or --json-schema ask for. Raises ConfigError."""
    if regex is not None and schema is not None:
        raise ConfigError("--regex and --json-schema exclude each other: give one")
    if schema is None:
        return None if regex is None else f"regex:{regex}"
    return "json:" + read_text(schema, MOST)

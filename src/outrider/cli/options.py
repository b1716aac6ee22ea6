"""Options that several commands have besides those of the engine and of sampling, and how lists of numbers are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths
from outrider.cli.takes import defaults_of
from outrider.errors import ConfigError

STORE = "outrider.db"
"""The store where none is named."""
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]
StorePath = Annotated[
    str, typer.Option("--store", help="The store that bench --store wrote: a file, or a postgresql:// URL.")
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Take prompts by the target's chat template, if it has one, a text as a user's message; or as they stand.",
    ),
]
Traffic = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        callback=paths.file,
        help="Prompts like those that you serve: JSONL with `prompt`, `messages`, ShareGPT's `conversations` or OpenAI's batches, "
        "or text with one per line. Default: held-out prompts of the shipped pair, or questions for a chat model.",
        show_default=False,
    ),
]


AlertWebhook = Annotated[
    str | None,
    typer.Option(
        "--alert-webhook",
        envvar="OUTRIDER_ALERT_WEBHOOK",
        help="URL that is told of alerts as they begin and end.",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--address", help="With --on ray: the cluster, as auto. Default: one is started here.", show_default=False
    ),
]


_SPELLED = {
    "overhead": "--overhead-ms",
    "step": "--step-ms",
    "chat_template": "--no-chat-template",
    "ignore_eos": "--stop-at-eos",
}
"""Options whose names on the command line are not those of their fields, and flags by what asks for another than the default."""


def spelled(name: str) -> str:
    """The option of a field, as it is written on the command line."""
    return _SPELLED.get(name, f"--{name.replace('_', '-')}")


def given_of(asked: Any) -> set[str]:
    """The fields of a command's options that have another value than their default."""
    return {name for name, usual in defaults_of(type(asked)).items() if getattr(asked, name) != usual}


def refuse_beside(mode: str, asked: Any, names: Iterable[str]) -> None:
    """ConfigError for the first of these fields that was given although it says nothing beside the option `mode`."""
    given = given_of(asked)
    for name in names:
        if name in given:
            raise ConfigError(f"{spelled(name)} says nothing beside {spelled(mode)}: leave out one of them")


def parse_acceptance(text: str, drafts: int) -> list[float]:
    """ "0.9,0.6" as a number for each draft; one alone is that of all."""
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--acceptance takes numbers such as 0.9, or 0.9,0.6 for each --draft; got {text!r}"
        ) from None
    if not all(0 <= n <= 1 for n in numbers):
        raise ConfigError(f"--acceptance takes probabilities from 0 to 1, got {text!r}")
    if len(numbers) not in (1, drafts):
        raise ConfigError(f"--acceptance takes one number, or one for each of {drafts} drafts, got {text!r}")
    return numbers * (drafts if len(numbers) == 1 else 1)


def parse_lengths(text: str) -> list[int]:
    """ "0,2,4" -> [0, 2, 4]; plain decoding comes first, as the base, and is added if missing."""
    try:
        numbers = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise ConfigError(f"--lengths takes whole numbers separated by commas, such as 0,2,4; got {text!r}") from None
    if not numbers or any(not 0 <= n <= 64 for n in numbers):
        raise ConfigError(f"--lengths takes numbers from 0 to 64, got {text!r}")
    return sorted({0, *numbers})


def parse_batches(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    try:
        sizes = sorted({int(x) for x in text.split(",") if x.strip()})
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= n <= 1024 for n in sizes):
        raise ConfigError(f"--batches takes whole numbers from 1 to 1024 separated by commas, got {text!r}")
    return sizes

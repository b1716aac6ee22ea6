"""`outrider train`: a learned drafter for a target, from text to a folder that `--draft` takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from outrider.cli import terminal
from outrider.cli.engine_options import ENGINE
from outrider.cli.options import Json
from outrider.cli.takes import takes
from outrider.cli.train_options import TrainOptions
from outrider.options import EngineOptions


@takes(ENGINE, "options", only=("target", "device"))
@takes(TrainOptions, "asked")
def train(
    kind: Annotated[
        str,
        typer.Argument(
            help="medusa (heads), hydra (heads one after the other), eagle (a layer on hidden states), eagle1 and mtp (on the last "
            "one), dflash (blocks) or draft (a model)."
        ),
    ],
    options: EngineOptions,
    asked: TrainOptions,
    json: Json = False,
) -> None:
    """Train a drafter: the target writes text, its hidden states are kept, and the drafter learns to predict its distributions.

    Interrupted at any moment, it continues with the same command; exit code 1 when the loss is not finite.

    Example: outrider train medusa --rows 200 --steps 100 --dry-run
    """
    from outrider.train.estimate import estimate
    from outrider.train.loop import DivergedError
    from outrider.train.pipeline import run

    job = asked.job(kind, options.target, options.device)
    if asked.dry_run:
        show(estimate(job), json)
        return
    try:
        show(run(job, terminal.err.print), json)
    except KeyboardInterrupt:
        terminal.say(f"what is done is kept in {asked.work}: the same command goes on from there")
        raise
    except DivergedError as error:
        terminal.err.print(f"outrider: {error}")
        raise typer.Exit(1) from None


def show(document: dict[str, Any], json: bool) -> None:
    """The document, for programs or for people."""
    if json:
        terminal.print_json(document)
        return
    for key, value in document.items():
        if key.endswith("_bytes"):
            terminal.pair(key.removesuffix("_bytes"), f"{value / 2**20:,.0f} MiB")
        elif isinstance(value, dict):
            terminal.pair(key, ", ".join(f"{k} {v:,.0f}" for k, v in value.items()))
        else:
            terminal.pair(key, f"{value:,.4g}" if isinstance(value, float) else str(value))

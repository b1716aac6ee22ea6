"""The options of `outrider bench` besides those of its engine and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths
from outrider.cli.options import ChatTemplate
from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """As on the command line."""

    lengths: Annotated[
        str, typer.Option("--lengths", help="Draft lengths to compare, as 0,2,4; 0 is plain decoding, the base.")
    ] = "0,2,4"
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="chart: plain decoding, draft model, Medusa, EAGLE, block diffusion, n-gram and suffix decoding in one "
            "run, with charts; untrained: n-gram, suffix decoding, recycled tokens and the draft model; eagle: EAGLE and the "
            "draft model, for many prompts. Replaces --lengths; --draft then names the draft model.",
            show_default=False,
        ),
    ] = None
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            callback=paths.out_folder,
            help="With --preset: folder for the charts (SVG and PNG). Default: runs/chart.",
            show_default=False,
        ),
    ] = None
    hardware: Annotated[
        str, typer.Option("--hardware", help="With --preset: machine of the predicted chart, as h100 or m4-max.")
    ] = "h100"
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            callback=paths.file,
            help="JSONL with `prompt`, `messages`, ShareGPT's `conversations` or OpenAI's batches, or text with one per line. "
            "Default: held-out prompts of the shipped pair, or questions for a chat model.",
            show_default=False,
        ),
    ] = None
    chat_template: ChatTemplate = True
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Compare every arm with this one as well, as with the base: an arm's name, as 'length 2' or 'EAGLE, chain'; "
            "repeatable. Default: the draft model's arms of a preset.",
            show_default=False,
        ),
    ] = None
    count: Annotated[int, typer.Option("--count", min=2, help="Prompts used, from the start of the set.")] = 16
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts decoded at the same time.")] = 1
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured runs of each arm on each prompt.")] = 3
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Runs of each arm before these, which are not counted.")
    ] = 1
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled texts and of the order of the arms.")] = 0
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_file,
            help="Write the JSON document, with every record, to this file.",
            show_default=False,
        ),
    ] = None
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Append every record to this store (a file, or a postgresql:// URL) as it comes.",
            show_default=False,
        ),
    ] = None
    name: Annotated[
        str, typer.Option("--name", help="Name of the run in --store; an unfinished run of that name is continued.")
    ] = "bench"
    quality: Annotated[
        bool, typer.Option("--quality", help="Score every text under the target, outside the measured time.")
    ] = False
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", callback=paths.out_file, help="Write a self-contained report with plots.", show_default=False
        ),
    ] = None
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            help="Price of this machine per hour: adds the cost of a million tokens.",
            show_default=False,
        ),
    ] = None
    compat: Annotated[
        str | None,
        typer.Option("--compat", help="spec-bench: adds the numbers as that harness counts them.", show_default=False),
    ] = None
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            callback=paths.out_folder,
            help="With --compat: folder for its answer files, one per arm.",
            show_default=False,
        ),
    ] = None

    @property
    def plan(self) -> dict[str, int]:
        """How often what is measured, in which order."""
        return {"batch": self.batch, "repeats": self.repeats, "warmup": self.warmup, "seed": self.seed}

    def check(self) -> None:
        """ConfigError for another harness than those that are known, and for what it does not do."""
        if self.compat not in (None, "spec-bench") or (self.answers is not None and self.compat is None):
            raise ConfigError("--compat knows spec-bench, and --answers needs it")
        if self.compat is not None and self.batch != 1:
            raise ConfigError("Spec-Bench runs one question at a time: use --batch 1")

    def machine(self) -> Any:
        """The machine of a preset's predicted chart; None without a preset. Raises ConfigError for an unknown one."""
        if self.preset is None:
            if self.figures is not None:
                raise ConfigError("--figures draws the charts of a preset: add --preset chart")
            return None
        from outrider.theory.hardware import hardware as find

        paths.needs("plot", ("matplotlib",))
        try:
            return find(self.hardware)
        except ValueError as error:
            raise ConfigError(str(error)) from None

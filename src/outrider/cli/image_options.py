"""The options of `outrider image` besides those of its engine and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli import paths


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """As on the command line."""

    out: Annotated[
        Path, typer.Option("--out", "-o", callback=paths.out_file, help="The PNG file to write.", show_default=True)
    ] = Path("grid.png")
    kind: Annotated[
        str | None,
        typer.Option(
            "--class",
            "-c",
            help="What to draw, such as 7; 'none' for no class. Default: every class in turn.",
            show_default=False,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to draw, in words, for models that write images (Janus, Emu3).",
            show_default=False,
        ),
    ] = None
    negative: Annotated[
        str | None,
        typer.Option(
            "--negative-prompt",
            help="What guidance leads away from, in words, for models that take such a text (Emu3).",
            show_default=False,
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Height x width in tokens, such as 32x32, for models that write any size. Default: 90x90.",
            show_default=False,
        ),
    ] = None
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1024, help="Pictures in the grid.")] = 16
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            callback=paths.model,
            help="A folder with raster.json, or of a model that writes images (Janus, Emu3). Default: the shipped digits.",
            show_default=False,
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            min=0.0,
            max=100.0,
            help="Scale of classifier-free guidance, 1 for none. Default: the model's.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**62, help="Seed of the first picture; the next ones follow.")
    ] = 0
    scale: Annotated[
        int | None,
        typer.Option(
            "--scale",
            min=1,
            max=64,
            help="Pixels of the file for a pixel of the model. Default: 8, or 1 for models that write images.",
            show_default=False,
        ),
    ] = None
    colour: Annotated[
        bool,
        typer.Option(
            "--colour", help="Tint tokens: green accepted, red corrected where a draft was rejected, blue bonus."
        ),
    ] = False

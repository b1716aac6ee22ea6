"""`outrider image`: pictures from a model of image tokens."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.options import Json


def image(
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=paths.out_file, help="The PNG file to write.", show_default=True)
    ] = Path("grid.png"),
    kind: Annotated[
        str | None,
        typer.Option(
            "--class",
            "-c",
            help="What to draw, such as 7; 'none' for no class. Default: every class in turn.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1024, help="Pictures in the grid.")] = 16,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            callback=paths.model,
            help="A folder with raster.json. Default: the shipped digits.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str,
        typer.Option(
            "--draft",
            callback=paths.drafter,
            help="What drafts: auto, none, jacobi:5, jacobi:5:up, counts, a folder, ...",
        ),
    ] = "auto",
    length: Annotated[int, typer.Option("--length", min=0, max=64, help="Tokens drafted in a step.")] = 5,
    rule: Annotated[str, typer.Option("--rule", help="The verification rule.")] = "auto",
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Permit a rule that changes the distribution.")
    ] = False,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            min=0.0,
            max=100.0,
            help="Scale of classifier-free guidance. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=100.0, help="0 takes the most likely tokens.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**62, help="Seed of the first picture; the next ones follow.")
    ] = 0,
    scale: Annotated[
        int, typer.Option("--scale", min=1, max=64, help="Pixels of the file for a pixel of the model.")
    ] = 8,
    colour: Annotated[
        bool,
        typer.Option(
            "--colour", help="Tint tokens: green accepted, red corrected where a draft was rejected, blue bonus."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Draw pictures token by token, speculatively, and write them as one PNG. They have the model's own distribution.

    Example: outrider image --class 7 --out grid.png --colour
    """
    from outrider.assets import shipped_images
    from outrider.evaluate.images import load_painter
    from outrider.evaluate.png import check_size, enlarged, grid, png
    from outrider.files import write_whole
    from outrider.telemetry.ledger import ledger

    with terminal.loading("loading"):
        painter = load_painter(
            target or shipped_images(),
            draft,
            length=length,
            rule=rule,
            guidance=guidance,
            slots=min(count, 16),
            allow_lossy=allow_lossy,
        )
    names = [None if kind == "none" else kind] if kind is not None else list(painter.raster.classes)
    columns = math.ceil(math.sqrt(count))
    high, wide = grid([painter.raster.pixels([])] * count, columns).shape[:2]
    check_size((high * scale, wide * scale))  # before anything is drawn
    wanted = [(names[i % len(names)], seed + i) for i in range(count)]
    show = Progress(painter.raster, columns)
    try:
        drawings = painter.draw(wanted, temperature, show)
    finally:
        show.end()
    pictures = [d.coloured() if colour else d.picture() for d in drawings]
    write_whole(out, png(enlarged(grid(pictures, columns), scale)))
    counts = painter.engine.counts
    book = ledger(counts)
    found = {
        "file": str(out),
        "pictures": count,
        "tokens": counts.emitted,
        "passes": counts.steps,
        "tokens_per_pass": counts.emitted / counts.steps,
        "rule": painter.engine.parts.rule.name,
        "lossless": painter.engine.parts.rule.lossless,
        "bias": counts.bias,
        "ledger": {**asdict(book), "agrees": book.agrees},
    }
    if json:
        terminal.print_json(found)
        return
    typer.echo(
        f"{out}: {count} pictures, {counts.emitted} tokens in {counts.steps} passes, {found['tokens_per_pass']:.2f} a pass"
    )
    typer.echo(
        f"rejections: predicted {book.predicted:.1f}, observed {book.observed}, expected within {book.low:.0f} to "
        f"{book.high:.0f}" + ("" if found["lossless"] else f"; distance from the model spent: {counts.bias:.2f}")
    )


class Progress:
    """The grid as it grows, on terminals that show colours; called with the tokens of all pictures so far."""

    def __init__(self, raster: Any, columns: int) -> None:
        self.raster, self.columns, self.lines = raster, columns, 0
        encoding = (getattr(terminal.err.file, "encoding", "") or "").lower()
        wide = columns * (raster.pixels([]).shape[1] + 1)
        able = (
            terminal.err.is_terminal and not terminal.err.is_dumb_terminal and terminal.err.color_system == "truecolor"
        )
        self.able = able and "utf" in encoding and wide <= terminal.err.width

    def __call__(self, tokens: list[list[int]]) -> None:
        """Draw over what was drawn before."""
        if not self.able:
            return
        from outrider.evaluate.png import blocks, grid

        lines = blocks(grid([self.raster.pixels(t) for t in tokens], self.columns))
        if len(lines) >= terminal.err.height:
            self.able = False
            return
        up = f"\x1b[{self.lines}A" if self.lines else ""
        terminal.err.file.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        terminal.err.file.flush()
        self.lines = len(lines)

    def end(self) -> None:
        """Leave the last state where it is."""
        if self.lines:
            terminal.err.file.write("\x1b[0m")
            terminal.err.file.flush()

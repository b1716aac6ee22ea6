"""`outrider image`: pictures from a model of image tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from outrider.cli import terminal
from outrider.cli.engine_options import ENGINE, tell
from outrider.cli.image_options import ImageOptions
from outrider.cli.options import Json
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions


@takes(ENGINE, "options", only=("draft", "length", "rule", "allow_lossy", "dtype"), length=5)
@takes(ImageOptions, "asked")
@takes(SAMPLING, "sampling", only=("temperature",))
def image(options: EngineOptions, asked: ImageOptions, sampling: Any, json: Json = False) -> None:
    """Draw pictures token by token, speculatively, and write them as one PNG. They have the model's own distribution.

    --draft also takes jacobi:5, jacobi:5:up and counts.

    Example: outrider image --class 7 --out grid.png --colour

    A model of transformers that writes images: outrider image --target JANUS --prompt "a red boat" --count 1

    Emu3, away from something: outrider image --target EMU3 --prompt "a red boat" --guidance 3 --negative-prompt blurry
    """
    from outrider.assets import shipped_images
    from outrider.evaluate.images import load_painter, takes_descriptions
    from outrider.evaluate.png import check_size, enlarged, grid, grid_size, png
    from outrider.files import write_whole

    described = asked.target is not None and takes_descriptions(asked.target)
    if described and (asked.prompt is None or asked.kind is not None):
        raise ConfigError(
            "this model writes images from a description: say what to draw with --prompt, without --class"
        )
    if asked.prompt is not None and not described:
        raise ConfigError("this model draws classes, not descriptions: use --class")
    with terminal.loading("loading"):
        painter = load_painter(
            asked.target or shipped_images(),
            options.draft,
            length=options.length,
            rule=options.rule,
            guidance=asked.guidance,
            slots=min(asked.count, 16),
            allow_lossy=options.allow_lossy,
            dtype=options.dtype,
            size=size_of(asked.size),
            negative=asked.negative,
        )
    jobs = wanted(asked, painter.raster)
    tell(painter.engine.notices)
    scale = asked.scale or (1 if asked.prompt is not None else 8)
    columns = math.ceil(math.sqrt(asked.count))
    raster = painter.raster
    high, wide = grid_size((raster.height * raster.side, raster.width * raster.side), asked.count, columns)
    check_size((high * scale, wide * scale))  # before anything is drawn
    with shown(painter.raster, columns, whole=described) as show:
        drawings = painter.draw(jobs, sampling.temperature, show)
    pictures = [d.coloured() if asked.colour else d.picture() for d in drawings]
    write_whole(asked.out, png(enlarged(grid(pictures, columns), scale)))
    document = document_of(painter.engine, asked)
    terminal.print_json(document) if json else print_document(document)


def size_of(text: str | None) -> tuple[int, int] | None:
    """Height and width of "32x32". ConfigError for another text."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip())
    if found is None:
        raise ConfigError(f"--size takes height x width in tokens, such as 32x32; got {text[:40]!r}")
    return int(found[1]), int(found[2])


def wanted(asked: ImageOptions, code: Any) -> list[tuple[str | None, int]]:
    """Class or description, and seed, of every picture."""
    kinds: list[str | None] = [None if asked.kind == "none" else asked.kind]
    if asked.prompt is not None:
        kinds = [asked.prompt]
    elif asked.kind is None:
        kinds = list(code.classes) or [None]
    return [(kinds[i % len(kinds)], asked.seed + i) for i in range(asked.count)]


def document_of(engine: Any, asked: ImageOptions) -> dict[str, Any]:
    """What was drawn, in how many passes, and whether the ledger agrees."""
    from outrider.telemetry.ledger import ledger

    counts, rule = engine.counts, engine.parts.rule
    book = ledger(counts)
    return {
        "file": str(asked.out),
        "pictures": asked.count,
        "tokens": counts.emitted,
        "passes": counts.steps,
        "tokens_per_pass": counts.emitted / counts.steps,
        "rule": rule.name,
        "lossless": rule.lossless,
        "bias": counts.bias,
        "ledger": {**asdict(book), "agrees": book.agrees},
    }


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    out = terminal.console()
    book = d["ledger"]
    out.print(
        f"{d['file']}: {d['pictures']} pictures, {d['tokens']} tokens in {d['passes']} passes, {d['tokens_per_pass']:.2f} a pass"
    )
    out.print(
        f"rejections: predicted {book['predicted']:.1f}, observed {book['observed']}, expected within {book['low']:.0f} to "
        f"{book['high']:.0f}" + ("" if d["lossless"] else f"; distance from the model spent: {d['bias']:.2f}")
    )


@contextmanager
def shown(raster: Any, columns: int, *, whole: bool) -> Iterator[Callable[[list[list[int]]], None]]:
    """Shows how far drawing is; yields what is called with the tokens of all pictures so far. whole: a model decodes pictures of
    all their tokens alone, so that there is none to look at before the end: their share is shown instead."""
    if whole:
        with terminal.loading("drawing; there is a picture once it has all its tokens") as tell:
            yield lambda tokens: tell(sum(map(len, tokens)) / (len(tokens) * raster.tokens))
        return
    show = Progress(raster, columns)
    try:
        yield show
    finally:
        show.end()


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

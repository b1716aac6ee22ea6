"""`outrider train`: a learned drafter for a target, from text to a folder that `--draft` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli import paths


def train(
    kind: Annotated[
        str,
        typer.Argument(
            help="medusa (heads), eagle (a layer on hidden states), eagle1 (on the last one), dflash (blocks) or draft (a model)."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            callback=paths.readable,
            help="Text to start from: files, JSON lines (text, prompt or messages) or folders; repeatable. Default: the "
            "sources of this Python's standard library.",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Files of folders. Default: *.py of the library, else all.")
    ] = None,
    target: opt.Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.writable,
            help="Folder of the drafter. Default: its place in the work folder.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        Path,
        typer.Option("--work", callback=paths.writable, help="Folder of data and checkpoints; a run continues there."),
    ] = Path("runs/drafters"),
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of training text.")] = 800,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Rows that are only measured on.")] = 64,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a row that are given text.")] = 64,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a row.")] = 256,
    as_written: Annotated[
        bool, typer.Option("--as-written", help="Train on the text itself; the target writes nothing.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="At which the target writes.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 600,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 2e-3,
    levels: Annotated[
        int, typer.Option("--levels", min=1, max=16, help="Heads, levels trained through, or drafted slots.")
    ] = 4,
    blocks: Annotated[
        int, typer.Option("--blocks", min=1, max=8, help="Residual blocks of a head, layers of dflash or of a draft.")
    ] = 1,
    width: Annotated[
        int, typer.Option("--width", min=0, help="Of eagle (0: the target's) or of a draft (0: half of it).")
    ] = 0,
    taps: Annotated[
        str | None, typer.Option("--taps", help="Layers that eagle and dflash read, as 2,9,15.", show_default=False)
    ] = None,
    anchors: Annotated[int, typer.Option("--anchors", min=1, help="Blocks of a row and step, for dflash.")] = 16,
    objective: Annotated[
        str, typer.Option("--objective", help="For dflash: uniform, decay, focal, chain, dpace or until_error.")
    ] = "decay",
    labels: Annotated[
        str, typer.Option("--labels", help="For dflash: laws (the target's distributions), or tokens (those it wrote).")
    ] = "laws",
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            help="For all but eagle1: staged (KL, then total variation), kl or log_acceptance; for all but dflash also tv, "
            "hybrid (KL and total variation, weighted by acceptance), or ce (next tokens of the text).",
        ),
    ] = "staged",
    save_every: Annotated[float, typer.Option("--save-every", help="Seconds between checkpoints.")] = 120.0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip rows that cannot be read, and count them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it needs of disk, memory and time; stop.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Train a drafter: the target writes text, its hidden states are kept, the drafter learns to foresee its distributions.

    Killed at any moment it continues with the same command; exit code 1 when the loss is not finite.
    """
    import sysconfig

    from outrider.assets import shipped
    from outrider.train.loop import DivergedError, LoopConfig
    from outrider.train.pipeline import Job, estimate, run

    job = Job(
        kind=kind,
        target=target or shipped("target"),
        data=tuple(data) if data else (Path(sysconfig.get_paths()["stdlib"]),),
        pattern=pattern or ("*" if data else "*.py"),
        skip_bad=skip_bad,
        work=work,
        out=out or work / "out" / kind,
        rows=rows,
        held_out=held_out,
        prompt=length if as_written else prompt,
        length=length,
        temperature=temperature,
        batch=batch,
        levels=levels,
        blocks=blocks,
        width=width,
        taps=parse_taps(taps),
        anchors=anchors,
        objective=objective,
        labels=labels,
        loss=loss,
        loop=LoopConfig(
            steps=steps, lr=lr, warmup=min(50, steps), final_lr_ratio=0.02, seed=seed, save_every_s=save_every
        ),
    )
    if dry_run:
        show(estimate(job), json)
        return
    try:
        show(run(job, opt.err.print), json)
    except KeyboardInterrupt:
        opt.say(f"what is done is kept in {work}: the same command goes on from there")
        raise
    except DivergedError as error:
        opt.err.print(f"outrider: {error}")
        raise typer.Exit(1) from None


def parse_taps(text: str | None) -> tuple[int, ...]:
    """ "2,9,15" -> (2, 9, 15)."""
    from outrider.errors import ConfigError

    try:
        return tuple(int(x) for x in (text or "").split(",") if x.strip())
    except ValueError:
        raise ConfigError(f"--taps takes block numbers separated by commas, such as 2,9,15; got {text!r}") from None


def show(document: dict[str, Any], json: bool) -> None:
    """The document, for programs or for people."""
    if json:
        opt.print_json(document)
        return
    for key, value in document.items():
        if key.endswith("_bytes"):
            typer.echo(f"{key.removesuffix('_bytes'):12} {value / 2**20:,.0f} MiB")
        elif isinstance(value, dict):
            typer.echo(f"{key:12} " + ", ".join(f"{k} {v:,.0f}" for k, v in value.items()))
        else:
            typer.echo(f"{key:12} {value:,.4g}" if isinstance(value, float) else f"{key:12} {value}")

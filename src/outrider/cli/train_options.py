"""The options of `outrider train` besides its target, and the job that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli import paths
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from outrider.train.job import Job


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """As on the command line."""

    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            callback=paths.readable,
            help="Text to start from: files, JSON lines (text, prompt or messages) or folders; repeatable. Default: the "
            "sources of this Python's standard library.",
            show_default=False,
        ),
    ] = None
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern", help="Which files of the folders are read. Default: *.py of the library, otherwise all."
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_folder,
            help="Folder for the trained drafter. Default: its place in the work folder.",
            show_default=False,
        ),
    ] = None
    work: Annotated[
        Path,
        typer.Option(
            "--work",
            callback=paths.out_folder,
            help="Folder for data and checkpoints; an interrupted run continues there.",
        ),
    ] = Path("runs/drafters")
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of training text.")] = 800
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Rows that are only measured on.")] = 64
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a row that are taken from the text.")] = 64
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a row.")] = 256
    as_written: Annotated[
        bool, typer.Option("--as-written", help="Train on the text itself; the target writes nothing.")
    ] = False
    temperature: Annotated[
        str,
        typer.Option(
            "--temperature", help="Temperature at which the target writes, or several, as 0,1: rows have them in turn."
        ),
    ] = "1"
    repeats: Annotated[
        float,
        typer.Option(
            "--repeats",
            min=0.0,
            max=1.0,
            help="Leave out rows in which more than this share of the 8-grams occurred before; 1 keeps all, as greedy text needs.",
        ),
    ] = 0.5
    start: Annotated[
        Path | None,
        typer.Option(
            "--start",
            callback=paths.readable,
            help="Folder of a trained drafter of the same kind and sizes whose weights are the first ones.",
            show_default=False,
        ),
    ] = None
    autocast: Annotated[
        bool | None,
        typer.Option(
            "--autocast/--no-autocast",
            help="Multiply in bfloat16. Default: on processors that have such products (AVX512_BF16, AMX, ARM's bf16), where it "
            "is faster.",
            show_default=False,
        ),
    ] = None
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of training; a finished run goes on when they grow.")
    ] = 600
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows per step.")] = 8
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 2e-3
    levels: Annotated[
        int,
        typer.Option(
            "--levels",
            min=1,
            max=16,
            help="Heads (medusa), levels trained (hydra, eagle, mtp) or drafted slots (dflash).",
        ),
    ] = 4
    blocks: Annotated[
        int,
        typer.Option(
            "--blocks", min=1, max=8, help="Residual blocks of a head (medusa, hydra) or layers (dflash, draft)."
        ),
    ] = 1
    width: Annotated[
        int,
        typer.Option(
            "--width", min=0, help="Width of eagle or hydra (0: the target's) or of a draft model (0: half of it)."
        ),
    ] = 0
    taps: Annotated[
        str | None,
        typer.Option(
            "--taps", help="Layers of the target that hydra, eagle and dflash read, as 2,9,15.", show_default=False
        ),
    ] = None
    anchors: Annotated[int, typer.Option("--anchors", min=1, help="Blocks per row and step (dflash).")] = 16
    objective: Annotated[
        str,
        typer.Option(
            "--objective", help="Weights of the slots (dflash): uniform, decay, focal, chain, dpace or until_error."
        ),
    ] = "decay"
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            help="What dflash learns from: distributions (the target's) or tokens (those that it wrote).",
        ),
    ] = "distributions"
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            help="All but eagle1: staged (KL divergence, then total variation), kl or log_acceptance; all but dflash also tv, "
            "hybrid (both, weighted by acceptance) or ce (cross-entropy with the next tokens of the text).",
        ),
    ] = "staged"
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log", help="Also write metrics to tensorboard or wandb, where installed; repeatable.", show_default=False
        ),
    ] = None
    save_every: Annotated[float, typer.Option("--save-every", help="Seconds between checkpoints.")] = 120.0
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip rows that cannot be read, and count them.")] = False
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data and of the first weights.")] = 0
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the disk, memory and time that training needs, and stop.")
    ] = False

    def job(self, kind: str, target: str | None, device: str = "auto") -> Job:
        """What is trained for which target, and where. Raises ConfigError for options that do not fit together."""
        import sysconfig

        from outrider.assets import shipped
        from outrider.train.job import Job, products_of
        from outrider.train.loop import LoopConfig

        warmup = min(50, self.steps)
        return Job(
            kind=kind,
            target=target or shipped("target"),
            data=tuple(self.data) if self.data else (Path(sysconfig.get_paths()["stdlib"]),),
            pattern=self.pattern or ("*" if self.data else "*.py"),
            skip_bad=self.skip_bad,
            device=device,
            work=self.work,
            out=self.out or self.work / "out" / kind,
            rows=self.rows,
            held_out=self.held_out,
            prompt=self.length if self.as_written else self.prompt,
            length=self.length,
            temperature=parse_temperatures(self.temperature),
            repeats=self.repeats,
            start=self.start,
            batch=self.batch,
            levels=self.levels,
            blocks=self.blocks,
            width=self.width,
            taps=parse_taps(self.taps),
            anchors=self.anchors,
            objective=self.objective,
            labels=self.labels,
            loss=self.loss,
            log=tuple(self.log or ()),
            loop=LoopConfig(
                steps=self.steps,
                lr=self.lr,
                warmup=warmup,
                final_lr_ratio=0.02,
                seed=self.seed,
                save_every_s=self.save_every,
                autocast=products_of(device) if self.autocast is None else self.autocast,
            ),
        )


def parse_taps(text: str | None) -> tuple[int, ...]:
    """ "2,9,15" -> (2, 9, 15)."""
    try:
        return tuple(int(x) for x in (text or "").split(",") if x.strip())
    except ValueError:
        raise ConfigError(f"--taps takes block numbers separated by commas, such as 2,9,15; got {text!r}") from None


def parse_temperatures(text: str) -> float | tuple[float, ...]:
    """ "1" -> 1.0, "0,1" -> (0.0, 1.0)."""
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= t < 100 for t in found):  # a nan is neither
        raise ConfigError(
            f"--temperature takes numbers from 0 to below 100, separated by commas, such as 0,1; got {text!r}"
        )
    return tuple(found) if len(found) > 1 else found[0]

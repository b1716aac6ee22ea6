"""Metrics of a training as it goes: JSON lines in its work folder, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, unknown_name

FILE = "metrics.jsonl"
Log = Callable[[int, Mapping[str, float]], None]
"""(step, values by name): called as a training goes."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What may be asked for, and the package that it needs."""


def loggers(folder: Path, wanted: tuple[str, ...] = (), settings: Mapping[str, Any] | None = None) -> list[Log]:
    """Where metrics go: always FILE in `folder`, and what is asked for by name. settings: of the training, for those that
    show them.

    Raises ConfigError for an unknown name, and for one whose package is missing.
    """
    check(wanted)
    made = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [_lines(folder), *(made[name](folder, dict(settings or {})) for name in wanted)]


def check(wanted: tuple[str, ...]) -> None:
    """Raise ConfigError for a place that is not known or whose package is missing: before any work is done."""
    for name in wanted:
        if name not in PACKAGES:
            raise ConfigError(unknown_name("place for metrics", name, PACKAGES))
        if find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"--log {name} needs a package: pip install {PACKAGES[name]}; {FILE} is written without it"
            )


def _lines(folder: Path) -> Log:
    """A line for each call. After a kill a step may stand there twice, the later line being that of the run that went on."""

    def log(step: int, values: Mapping[str, float]) -> None:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    return log


def _tensorboard(folder: Path, settings: dict[str, Any]) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(folder: Path, settings: dict[str, Any]) -> Log:
    import wandb  # type: ignore[import-not-found]

    run = wandb.init(
        project="outrider", name=folder.name, id=folder.name, dir=str(folder), resume="allow", config=settings
    )
    return lambda step, values: run.log(dict(values), step=step)

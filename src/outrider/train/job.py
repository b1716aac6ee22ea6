"""The options of one training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.deprecated import current
from outrider.errors import ConfigError
from outrider.isa import multiplies_bfloat16
from outrider.models.dtypes import device_named
from outrider.models.folder import identity_of, resolve_folder
from outrider.train import metrics
from outrider.train.features import MOST_REPEATED, DataSpec
from outrider.train.loop import BOOKKEEPING
from outrider.train.methods.base import Method, MethodOptions
from outrider.train.methods.registry import check, method_named

ELSEWHERE = frozenset(
    {"target", "data", "work", "out", "pattern", "skip_bad", "rows", "held_out", "slots", "device", "log"}
)
"""Fields of a job that do not affect the training of a drafter, or affect it through the data alone."""
LATER: Mapping[str, Any] = {"start": None, "repeats": MOST_REPEATED}
"""Fields that older releases did not have, with the values that mean what those did: these leave a training's name unchanged."""


def products_of(device: str) -> bool:
    """Whether a training on this device multiplies in bfloat16 unless it is told otherwise: where the processor has the
    instructions. On a GPU it must be asked for."""
    return device_named(device).type == "cpu" and multiplies_bfloat16()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(MethodOptions):
    """One training run. Raises ConfigError for values that no method supports.

    kind: a name of `methods.registry.METHODS`, or a method object. data: files and folders of text. work: the folder for resuming.
    out: the finished drafter. rows, held_out: rows of training and held-out data. temperature: at which the target writes; of
    several, its rows have them in turn. slots: rows that the target writes at once.
    device: where target and drafter compute: "auto" (a GPU where there is one), "cpu" or "cuda"; trainings on different devices are
    the same up to rounding, and share data and checkpoints.
    repeats: the largest share of repeated 8-grams that a row may have, 0 to 1.
    log: where metrics go besides the work folder, see `metrics.loggers`.
    """

    kind: str | Method
    data: tuple[Path, ...]
    work: Path
    out: Path
    pattern: str = "*"
    skip_bad: bool = False
    rows: int = 800
    held_out: int = 64
    temperature: float | tuple[float, ...] = 1.0
    slots: int = 16
    device: str = "auto"
    repeats: float = MOST_REPEATED
    log: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", current(self.labels, {"laws": "distributions"}, "labels"))
        if isinstance(self.data, str | Path):  # one place, not its letters
            object.__setattr__(self, "data", (Path(self.data),))
        if not 0 <= self.repeats <= 1:
            raise ConfigError(f"repeats is a share of a row, 0 to 1, got {self.repeats}")
        check(self.method, self)
        metrics.check(self.log)

    @property
    def method(self) -> Method:
        """The options that methods read."""
        return method_named(self.kind) if isinstance(self.kind, str) else self.kind

    def choices(self, taps: tuple[int, ...]) -> dict[str, Any]:
        """Everything that determines the result of a training on given data: trainings that differ in it share no checkpoint.

        Every field counts except paths, the description of the data (which has its own key) and options of logging; so a new field
        counts automatically. taps: as given by `Method.taps`.
        """
        plain: dict[str, Any] = asdict(self) | {"kind": self.method.name}
        plain["labels"] = {"distributions": "laws"}.get(self.labels, self.labels)  # as keys of work folders have it
        plain |= {"start": self.start and identity_of(resolve_folder(self.start))}
        plain = {k: v for k, v in plain.items() if k not in LATER or v != LATER[k]}
        loop = {k: v for k, v in plain.pop("loop").items() if k not in BOOKKEEPING}
        return {k: v for k, v in plain.items() if k not in ELSEWHERE} | {"loop": loop, "taps": taps}

    def wanted(self, part: str) -> DataSpec:
        """The data specification of a part, "training" or "held_out"."""
        rows = self.rows if part == "training" else self.held_out
        return DataSpec(rows, self.prompt, self.length, self.temperature, self.loop.seed)

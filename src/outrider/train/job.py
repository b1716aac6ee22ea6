"""One training run, as it is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.deprecated import current
from outrider.train.features import DataSpec
from outrider.train.loop import BOOKKEEPING
from outrider.train.methods.base import Method, MethodOptions
from outrider.train.methods.registry import check, method_named

ELSEWHERE = frozenset({"target", "data", "work", "out", "pattern", "skip_bad", "rows", "held_out", "slots"})
"""Fields of a job that do not bear on the training of a drafter, or do so through the data alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(MethodOptions):
    """One training run. Raises ConfigError for what no method could do.

    kind: a name of `methods.registry.METHODS`, or a method of one's own. data: files and folders of text. work: what can be
    resumed; out: the finished drafter. rows, held_out: rows of training and held-out data. slots: rows that the target writes at
    once.
    """

    kind: str | Method
    data: tuple[Path, ...]
    work: Path
    out: Path
    pattern: str = "*"
    skip_bad: bool = False
    rows: int = 800
    held_out: int = 64
    temperature: float = 1.0
    slots: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", current(self.labels, {"laws": "distributions"}, "labels"))
        if isinstance(self.data, str | Path):  # one place, not its letters
            object.__setattr__(self, "data", (Path(self.data),))
        check(self.method, self)

    @property
    def method(self) -> Method:
        """What is trained, and how."""
        return method_named(self.kind) if isinstance(self.kind, str) else self.kind

    def choices(self, taps: tuple[int, ...]) -> dict[str, Any]:
        """All that decides what a training on given data makes: two trainings that differ in any of it share no checkpoint.

        Every field counts but those that say where things lie, what the data are of (which have a name of their own) and how a
        run is watched; so a field that is added counts. taps: as `Method.taps` has them.
        """
        plain: dict[str, Any] = asdict(self) | {"kind": self.method.name}
        plain["labels"] = {"distributions": "laws"}.get(self.labels, self.labels)  # as keys of work folders have it
        loop = {k: v for k, v in plain.pop("loop").items() if k not in BOOKKEEPING}
        return {k: v for k, v in plain.items() if k not in ELSEWHERE} | {"loop": loop, "taps": taps}

    def wanted(self, part: str) -> DataSpec:
        """The data of a part, "training" or "held_out"."""
        rows = self.rows if part == "training" else self.held_out
        return DataSpec(rows, self.prompt, self.length, self.temperature, self.loop.seed)

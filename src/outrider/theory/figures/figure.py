"""What a figure is before it is drawn: curves, panels, a caption, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from outrider.theory.simulate import Estimate

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[Any] | Sequence[float] | Sequence[int]
Kind = Literal["exact", "simulated", "paper", "limit"]
SEED = 10


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One curve: `kind` decides how it is drawn; `error` is the half width of a band or of error bars."""

    label: str
    kind: Kind
    x: Array
    y: Array
    error: Array | None = None
    series: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One set of axes; `notes` are (x, y, text) in data coordinates."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    notes: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A figure of the paper: its panels (none: the schematic of Figure 3, left), and what came of it."""

    name: str
    panels: tuple[Panel, ...]
    caption: str
    reproduced: str
    differs: str


def curve(label: str, kind: Kind, x: Numbers, y: Numbers, error: Numbers | None = None, series: int = 0) -> Curve:
    spread = None if error is None else np.asarray(error, dtype=np.float64)
    return Curve(label, kind, np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), spread, series)


def points(label: str, counts: Sequence[int], estimates: Sequence[Estimate], series: int = 0) -> Curve:
    bars = [3.0 * e.standard_error for e in estimates]
    return curve(label, "simulated", counts, [e.mean for e in estimates], bars, series)

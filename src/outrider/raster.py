"""What the tokens of an image model mean: `raster.json` beside its weights. Plain values, no model.

An image is `height` x `width` tokens, row by row; a token is one of `colours` and is drawn as a square of `patch` x `patch` pixels.
The prompt of an image is one token: its class, or `null` for no class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError
from outrider.files import read_json, write_whole

FILE = "raster.json"
LIMIT = 16 << 20
MOST = 4096
"""Most tokens of a row or column, and most pixels of a patch's side."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Raster:
    """height, width: tokens. colours: [C, patch, patch] grey values of tokens 0 .. C - 1. classes: name -> token. null: the
    token that stands for no class. guidance: the scale of classifier-free guidance that the model was tuned for, 1 for none."""

    height: int
    width: int
    colours: Pixels
    classes: Mapping[str, int]
    null: int
    guidance: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.height * self.width

    @property
    def side(self) -> int:
        """Pixels of a token's side."""
        return int(self.colours.shape[1])

    def cells(self, values: Sequence[Any]) -> Sequence[Any]:
        """Of one value for every token those of tokens that are drawn: all."""
        return values

    def prompt(self, name: str | None) -> list[int]:
        """The prompt of an image of class `name`; None: of no class. ConfigError for a class that the model does not have."""
        if name is None:
            return [self.null]
        if name not in self.classes:
            raise ConfigError(f"the model has no class {name!r}: choose one of {', '.join(self.classes)}")
        return [self.classes[name]]

    def conditions(self) -> dict[int, int]:
        """Class token -> the token that takes its place in the unconditional row of guidance."""
        return dict.fromkeys(self.classes.values(), self.null)

    def pixels(self, tokens: Sequence[int]) -> Pixels:
        """The picture [height * patch, width * patch] of up to `tokens` tokens; missing ones are white."""
        if len(tokens) > self.tokens or any(not 0 <= t < len(self.colours) for t in tokens):
            raise ConfigError(
                f"an image has at most {self.tokens} tokens below {len(self.colours)}: these are not of this model"
            )
        side = self.colours.shape[1]
        flat = np.full((self.tokens, side, side), 255, dtype=np.uint8)
        flat[: len(tokens)] = self.colours[list(tokens)]
        grid = flat.reshape(self.height, self.width, side, side).transpose(0, 2, 1, 3)
        return grid.reshape(self.height * side, self.width * side)

    def codes(self) -> npt.NDArray[np.float64]:
        """[C, patch * patch] the colours as points, scaled so that a distance is a root mean square in units of full contrast."""
        flat = self.colours.reshape(len(self.colours), -1).astype(np.float64)
        return flat / (255.0 * flat.shape[1] ** 0.5)

    def save(self, folder: Path) -> None:
        """Write `raster.json`."""
        values = {
            "height": self.height,
            "width": self.width,
            "patch": self.colours.shape[1],
            "classes": dict(self.classes),
            "null": self.null,
            "guidance": self.guidance,
            "colours": self.colours.reshape(len(self.colours), -1).tolist(),
        }
        write_whole(folder / FILE, (json.dumps(values) + "\n").encode())


def find_raster(folder: Path | str | None) -> Raster | None:
    """The raster of a model's folder; None where there is none."""
    if folder is None or not (Path(folder) / FILE).is_file():
        return None
    return read_raster(Path(folder))


def read_raster(folder: Path) -> Raster:
    """The raster of a model's folder. Raises ConfigError for a missing or damaged one."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder} has no {FILE}, so it is no image model of ours: see docs/images.md")
    raw = read_json(path, LIMIT)
    number = lambda key, low, high: _whole(raw.get(key), f"{key} of {path}", low, high)  # noqa: E731
    height, width, patch = (number(key, 1, MOST) for key in ("height", "width", "patch"))
    if height * width > 1 << 20:
        raise ConfigError(f"{path} has images of {height} x {width} tokens, more than a million: it is damaged")
    colours, classes = raw.get("colours"), raw.get("classes")
    if not isinstance(colours, list) or not colours or not isinstance(classes, dict):
        raise ConfigError(f"{path} lacks its colours or classes: copy it again from where the model was made")
    table = [_row(row, patch, path) for row in colours]
    named = {str(name): _whole(token, f"a class of {path}", 0, 1 << 24) for name, token in classes.items()}
    guidance = raw.get("guidance", 1.0)
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0.0 <= guidance <= 100.0:
        raise ConfigError(f"guidance of {path} must be a number from 0 to 100, got {guidance!r}")
    pixels = np.asarray(table, dtype=np.uint8).reshape(len(table), patch, patch)
    return Raster(height, width, pixels, named, number("null", 0, 1 << 24), float(guidance))


def _row(row: Any, patch: int, path: Path) -> list[int]:
    if not isinstance(row, list) or len(row) != patch * patch:
        raise ConfigError(
            f"a colour of {path} is not {patch * patch} numbers: copy it again from where the model was made"
        )
    return [_whole(value, f"a colour of {path}", 0, 255) for value in row]


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{what} must be a whole number from {low} to {high}, got {value!r}")
    return value

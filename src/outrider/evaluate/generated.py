"""Pictures of models that write images with a decoder of their own, as `images` draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outrider.errors import ConfigError
from outrider.evaluate.png import Picture
from outrider.models.config import read_raw_config
from outrider.models.dtypes import choose_dtype
from outrider.models.framed import Framed
from outrider.models.guided import Guided
from outrider.models.hf.generators import ImageGenerator, load_generator
from outrider.protocols import Target

PROMPT = 1024
"""Most tokens of a description."""


class Written:
    """What the tokens of a model's pictures mean: implements `images.ImageCode`."""

    def __init__(self, model: ImageGenerator) -> None:
        self.model, self.frame = model, model.frame
        self.tokens, self.height, self.width = model.frame.tokens, model.frame.height, model.frame.width

    @cached_property
    def side(self) -> int:
        """Pixels of a code: the decoder is asked once."""
        return len(self._decoded([int(self.frame.codes.nonzero()[0])] * (self.height * self.width))) // self.height

    def cells(self, values: Sequence[Any]) -> Sequence[Any]:
        """Those of codes, without the marks that end rows."""
        return self.frame.codes_of(list(values))

    def prompt(self, name: str | None) -> list[int]:
        """A description as the model's prompt. ConfigError without one."""
        if not name:
            raise ConfigError("say what to draw: this model writes images from a description (--prompt)")
        return self.model.prompt(name)

    def pixels(self, tokens: Sequence[int]) -> Picture:
        """Colours [h, w, 3] of a whole picture; of less, white."""
        codes = self.frame.codes_of(list(tokens))
        if len(codes) < self.height * self.width:
            return np.full((self.height * self.side, self.width * self.side, 3), 255, dtype=np.uint8)
        return self._decoded(codes)

    def _decoded(self, codes: Sequence[int]) -> Picture:
        return self.model.decode(codes)


@dataclass(frozen=True, eq=False)
class Opened:
    """A folder's target, what its tokens mean, the places of its codes for rules of nearness, and how drafts are loaded.

    most: tokens of the longest text.
    """

    target: Target
    code: Any
    points: torch.Tensor | None
    draft: Callable[[str], Target]
    most: int


def open_generator(place: Path, guidance: float | None, dtype: str, size: tuple[int, int] | None) -> Opened:
    """A model that writes images. guidance: None: its own scale. Raises ConfigError if it cannot be guided, or not be read."""
    raw = read_raw_config(place)
    kind = choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), torch.device("cpu"), lean=False)

    def target_of(model: ImageGenerator) -> Target:
        scale = model.guidance if guidance is None else guidance
        if scale != 1.0 and not model.free:
            raise ConfigError(f"{place} has no text without its condition to be guided by: leave out the guidance")
        guided = model.target if scale == 1.0 else Guided(model.target, model.free, scale)
        return Framed(guided, model.frame)

    model = load_generator(place, kind, size)
    points = None if model.points is None else torch.from_numpy(model.points)
    most = min(model.target.max_length, PROMPT + model.frame.tokens)
    if most <= model.frame.tokens:
        raise ConfigError(
            f"a picture of {model.frame.tokens} tokens does not fit the {most} positions of {place}: choose a smaller size"
        )
    return Opened(
        target_of(model), Written(model), points, lambda path: target_of(load_generator(Path(path), kind, size)), most
    )

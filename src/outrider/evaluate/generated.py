"""Pictures of models that write images with a decoder of their own, as `images` draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from outrider.models.guided import FreeText, Guided
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
    """A folder's target, what its tokens mean, the places of its codes for rules of nearness (`verify.codes`), and how drafts are
    loaded.

    most: tokens of the longest text.
    """

    target: Target
    code: Any
    points: torch.Tensor
    draft: Callable[[str], Target]
    most: int


def open_generator(
    place: Path, guidance: float | None, dtype: str, size: tuple[int, int] | None, negative: str | None = None
) -> Opened:
    """A model that writes images. guidance: None: its own scale. negative: what the text without a condition describes; None: it is
    the model's own. Raises ConfigError for a model whose free text cannot be another, or that cannot be read."""
    raw = read_raw_config(place)
    kind = choose_dtype(dtype, raw.get("dtype") or raw.get("torch_dtype"), torch.device("cpu"), lean=False)

    model = load_generator(place, kind, size)
    scale = model.guidance if guidance is None else guidance

    def target_of(model: ImageGenerator, place: Path) -> Target:
        free = model.free if negative is None else described(model, negative, scale, place)
        return Framed(model.target if scale == 1.0 else Guided(model.target, free, scale), model.frame)

    def draft(path: str) -> Target:
        return target_of(load_generator(Path(path), kind, size), Path(path))

    target = target_of(model, place)
    most = min(target.max_length, PROMPT + model.frame.tokens)
    if most <= model.frame.tokens:
        raise ConfigError(
            f"a picture of {model.frame.tokens} tokens does not fit the {most} positions of {place}: choose a smaller size"
        )
    return Opened(target, Written(model), torch.from_numpy(model.points), draft, most)


def described(model: ImageGenerator, negative: str, scale: float, place: Path) -> FreeText:
    """The free text of a description. ConfigError where there can be none, or where it would change nothing."""
    if model.free.mark is None:
        raise ConfigError(f"{place} has a text without condition of its own: leave out the negative prompt")
    if scale == 1.0:
        raise ConfigError("a negative prompt acts by guidance, whose scale is 1 here: set it, for instance to 3")
    tokens = model.prompt(negative)
    if len(tokens) > PROMPT:
        raise ConfigError(f"the negative prompt has {len(tokens)} tokens with its marks: use at most {PROMPT}")
    return replace(model.free, prompt=tuple(tokens))

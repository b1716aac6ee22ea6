"""Image-token models as engines, and their outputs as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from outrider.build import Engine, build_engine
from outrider.drafters.registry import load_drafter
from outrider.errors import ConfigError
from outrider.evaluate.generated import Opened, open_generator
from outrider.evaluate.png import Picture
from outrider.models.folder import resolve_folder
from outrider.models.framed import Frame, Framed
from outrider.models.guided import FreeText, Guided
from outrider.models.hf.generators import GENERATORS, kind_of
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.raster import FILE, read_raster
from outrider.verify import best_exact, load_rule

TINTS = {"accepted": (60, 170, 90), "corrected": (225, 50, 50), "bonus": (50, 150, 220), "sampled": (150, 150, 150)}
"""Colours of tokens by origin: accepted drafts, corrections where a draft was rejected, tokens behind a whole accepted draft."""


@runtime_checkable
class ImageCode(Protocol):
    """What the tokens of a picture mean: a `Raster`, or a `Written` picture of a model with a decoder of its own.

    tokens: of a picture. height, width: in drawn tokens. side: pixels of one of these.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def side(self) -> int: ...

    def cells(self, values: Sequence[Any]) -> Sequence[Any]:
        """Of one value for every token those of tokens that are drawn."""
        ...

    def prompt(self, name: str | None) -> list[int]:
        """Tokens before a picture of a class, or of a description."""
        ...

    def pixels(self, tokens: Sequence[int]) -> Picture:
        """The picture of all its tokens; without tokens a white one of its size."""
        ...


@dataclass(frozen=True)
class Painter:
    """An engine that draws pictures. raster: what its tokens mean; a class of it is a description where a model takes texts."""

    engine: Engine
    raster: ImageCode

    def request(self, name: str | None, seed: int, temperature: float = 1.0) -> tuple[list[int], SamplingParams]:
        """Prompt and parameters of one picture of class `name`."""
        params = SamplingParams(temperature=temperature, max_tokens=self.raster.tokens, ignore_eos=True, seed=seed)
        return self.raster.prompt(name), params

    def draw(
        self,
        wanted: Sequence[tuple[str | None, int]],
        temperature: float = 1.0,
        watch: Callable[[list[list[int]]], None] | None = None,
    ) -> list[Drawing]:
        """One picture for each (class, seed). watch: called after every step with the tokens of all pictures so far."""
        requests = [self.request(name, seed, temperature) for name, seed in wanted]
        found: dict[str, Drawing] = {}
        try:
            for prompt, params in requests:
                found[self.engine.submit(prompt, params)] = Drawing(self.raster, [], [])
            while self.engine.busy:
                for event in self.engine.step():
                    if event.error:
                        raise ConfigError(f"a picture failed: {event.error}")
                    found[event.request].tokens.extend(event.tokens)
                    found[event.request].origins.extend(event.origins)
                if watch is not None:
                    watch([drawing.tokens for drawing in found.values()])
        finally:
            for name in found:
                self.engine.abort(name)
        return list(found.values())


@dataclass(frozen=True)
class Drawing:
    """One picture: its tokens and where each came from."""

    raster: ImageCode
    tokens: list[int]
    origins: list[str]

    def picture(self) -> Picture:
        """Greys [h, w], or colours [h, w, 3]."""
        return self.raster.pixels(self.tokens)

    def coloured(self, share: float = 0.45) -> Picture:
        """Colours [h, w, 3]: every token tinted by its origin."""
        side, picture = self.raster.side, self.picture()
        tints = np.asarray([TINTS[o] for o in self.raster.cells(self.origins)], dtype=float).reshape(
            self.raster.height, self.raster.width, 3
        )
        plain = np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else picture
        wide = tints.repeat(side, axis=0).repeat(side, axis=1)
        return np.round((1 - share) * plain.astype(float) + share * wide).astype(np.uint8)


def takes_descriptions(folder: str | Path) -> bool:
    """Whether a folder is of a model that writes images from texts; otherwise it draws classes, by its raster.json."""
    place = resolve_folder(folder)
    return not (place / FILE).is_file() and kind_of(place) in GENERATORS


def load_painter(
    folder: str | Path,
    draft: str = "auto",
    *,
    length: int = 5,
    rule: str = "auto",
    guidance: float | None = None,
    slots: int = 16,
    allow_lossy: bool = False,
    dtype: str = "auto",
    size: tuple[int, int] | None = None,
    negative: str | None = None,
) -> Painter:
    """An engine for the image model of a folder. draft: a spec of `load_drafter`; a draft model is guided as the target is.

    dtype: see `load_target`. guidance: its scale; None: the model's own. size: height and width in codes, for models that write
    pictures of any size. negative: a description of what guidance leads away from, for models whose text without a condition can be
    any. Raises ConfigError for a folder that has no raster.json and is no model that writes images, or one whose raster.json does
    not fit.
    """
    place = resolve_folder(folder)
    written = takes_descriptions(place)
    if size is not None and not written:
        raise ConfigError(f"{place} has pictures of one size: leave out the size")
    if negative is not None and not written:
        raise ConfigError(
            f"{place} draws classes, and guidance leads away from that of none: leave out the negative prompt"
        )
    opened = open_generator(place, guidance, dtype, size, negative) if written else open_raster(place, guidance, dtype)
    made = load_rule(rule, opened.points)
    drafter = load_drafter(
        draft if length else "none",
        target=opened.target,
        length=length,
        rule=made,
        target_path=str(place),
        load_model=lambda path: (opened.draft(path), None),
        find_folder=resolve_folder,
    )
    engine = build_engine(
        opened.target,
        drafter,
        rule=best_exact(drafter) if rule == "auto" else made,
        length=length,
        slots=slots,
        max_length=opened.most,
        allow_lossy=allow_lossy,
        prefix_cache=not written,
    )
    return Painter(engine, opened.code)


def open_raster(place: Path, guidance: float | None, dtype: str) -> Opened:
    """A model whose folder has a raster.json."""
    raster = read_raster(place)
    scale = raster.guidance if guidance is None else guidance

    def drawing(model: Target) -> Target:
        """The model guided, and of its vocabulary nothing but colours: a bias of logits would be outweighed by a large scale of
        guidance, and divided by a high temperature."""
        guided = model if scale == 1.0 else Guided(model, FreeText(raster.conditions()), scale)
        colours = torch.arange(model.vocab_size) < len(raster.colours)
        return Framed(guided, Frame(colours, raster.height, raster.width))

    target = load_target(place, dtype=dtype, role="target")
    most = max(len(raster.colours) - 1, raster.null, *raster.classes.values())
    if most >= target.vocab_size or target.max_length < 1 + raster.tokens:
        raise ConfigError(
            f"{place}: its raster.json has token {most} and images of {raster.tokens}, and the model {target.vocab_size} tokens "
            f"and {target.max_length} positions: they are of different models"
        )

    def draft(path: str) -> Target:
        return drawing(load_target(path, dtype=dtype, role="draft"))

    return Opened(drawing(target), raster, torch.from_numpy(raster.codes()), draft, 1 + raster.tokens)

"""What a learned method states: the options it reads, the model it trains, what that predicts, its loss, its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.errors import ConfigError
from outrider.protocols import Target
from outrider.train.distill import Logits, Predict, Teacher, loss_of
from outrider.train.features import Features
from outrider.train.loop import Batch, LoopConfig, LossOf


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """The options of a training that methods read.

    target: folder or Hub name. levels: heads, levels of the training-time test, or drafted slots of a block. blocks: residual
    blocks of a head, or layers of a block drafter. width: of a feature drafter, 0 for the target's. taps: blocks that a feature or
    block drafter reads, () for EAGLE-3's choice. anchors: blocks of a row and step. objective: of a block drafter, a name of
    `slot_losses.ARMS`; labels: what it learns, the target's "distributions" or the "tokens". loss: a name of `losses.LOSSES`; a
    block drafter that learns distributions knows three of them. For a draft model, `blocks` are its layers and a width of 0 is
    about half of the target's.
    """

    target: Path | str
    loop: LoopConfig
    prompt: int = 64
    length: int = 256
    batch: int = 8
    levels: int = 4
    blocks: int = 1
    width: int = 0
    taps: tuple[int, ...] = ()
    anchors: int = 16
    objective: str = "decay"
    labels: str = "distributions"
    loss: str = "staged"


class Method(ABC):
    """A way to train a drafter for one target. It has no state: what a training is of stands in the options.

    name: what `outrider train` and work folders call it. reads: which of the options that not every method reads it does; the
    others are refused, not dropped.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]

    def check(self, options: MethodOptions, given: frozenset[str]) -> None:  # noqa: B027
        """Raise ConfigError for options that do not go together. given: those that are not what they are by default."""

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """Blocks of the target whose outputs the drafter reads; its last one unless a method says otherwise."""
        return (target.layers,)

    @abstractmethod
    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> nn.Module:
        """The drafter before its first step. seen: some hidden states of the blocks it will read, whose sizes differ by block."""

    @abstractmethod
    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """A `distill.Predict` for drafts of `levels` levels; a model that fixes their number has its own."""

    def predictor(self, levels: int) -> Predict:
        """`predict` for drafts of so many levels."""
        return partial(self.predict, levels=levels)

    def fit_inputs(
        self, options: MethodOptions, judge: Teacher, model: nn.Module, training: Features
    ) -> tuple[Callable[[int], Batch], LossOf]:
        """What the drafter is trained on, step by step, and its loss: by default rows of text, and a loss at every level."""
        return training, loss_of(judge, self.predictor(options.levels), options.loss)

    def predictions(self, options: MethodOptions) -> int:
        """Distributions that one row of text asks for in a step, all of which a training holds at once."""
        return options.length * options.levels

    def save(self, model: Any, options: MethodOptions, folder: Path) -> None:
        """Write the drafter as its `load` reads it."""
        model.save(folder)


def chosen_taps(options: MethodOptions, target: Target) -> tuple[int, ...]:
    """The blocks that are asked for, or those of EAGLE-3: 2, L / 2, L - 3. ConfigError for blocks that the target has not."""
    middle = {2, target.layers // 2, target.layers - 3}
    taps = options.taps or tuple(sorted(t for t in middle if 0 < t <= target.layers))
    if any(not 0 <= t <= target.layers for t in taps):
        raise ConfigError(f"taps {taps} are not blocks of a target with {target.layers}")
    return taps

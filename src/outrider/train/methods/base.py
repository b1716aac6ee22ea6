"""The interface of a learned method: the options it reads, the model it trains, its predictions, its loss, its folder."""

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
from outrider.train.distill import HeadRows, Logits, Predict, Teacher, loss_of
from outrider.train.features import Features
from outrider.train.loop import Batch, LoopConfig, LossOf


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """The options of a training that methods read.

    target: folder or Hub name. levels: heads, levels of the training-time test, or draft slots of a block. blocks: residual
    blocks of a head, or layers of a block drafter. width: of an EAGLE drafter or sequential heads, 0 for the target's. taps: blocks
    that these or a block drafter read, () for EAGLE-3's choice. anchors: blocks of a row and step. objective: of a block drafter,
    a name of `slot_losses.ARMS`. labels: what it learns, the target's "distributions" or the "tokens". loss: a name of
    `losses.LOSSES`; a block drafter that learns distributions supports three of them. For a draft model, `blocks` are its
    layers and a width of 0 is about half of the target's. start: the folder of a drafter whose weights are the first ones; None:
    fresh ones.
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
    start: Path | None = None


class Method(ABC):
    """A way to train a drafter for one target. It has no state: everything about a training is in the options.

    name: its name in `outrider train` and work folders. reads: the method-specific options that it reads; the others are refused,
    not ignored. names_target: whether `save` of its network takes the target's name, as programs that load both need it.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    names_target: ClassVar[bool] = False

    def check(self, options: MethodOptions, given: frozenset[str]) -> None:  # noqa: B027
        """Raise ConfigError for options that do not go together. given: those that differ from their defaults."""

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """Blocks of the target whose outputs the drafter reads; by default its last one."""
        return (target.layers,)

    @abstractmethod
    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> nn.Module:
        """The drafter before its first step. seen: some hidden states of the blocks it will read, whose sizes differ by block."""

    def load(self, folder: Path, target: Target) -> Any:
        """A trained drafter of this method, with a `config` that says all its sizes. ConfigError for another folder."""
        raise ConfigError(f"a training of {self.name} cannot start from a trained one: leave the start out")

    @abstractmethod
    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """A `distill.Predict` for drafts of `levels` levels; some models fix that number themselves."""

    def scored(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> HeadRows | None:
        """What `predict`'s logits are made of, where all levels are rows times one matrix: a `distill.Scored`, which saves a
        training most of its time. None: they are not."""
        return None

    def predictor(self, levels: int) -> Predict:
        """`predict` for drafts of so many levels."""
        return partial(self.predict, levels=levels)

    def fit_inputs(
        self, options: MethodOptions, judge: Teacher, model: nn.Module, training: Features
    ) -> tuple[Callable[[int], Batch], LossOf]:
        """The batches of a training and its loss: by default rows of text, and a loss at every level."""
        levels = options.levels
        return training, loss_of(judge, self.predictor(levels), options.loss, partial(self.scored, levels=levels))

    def predictions(self, options: MethodOptions) -> int:
        """Distributions per row of text in a step, all of which a training holds in memory at once."""
        return options.length * options.levels

    def save(self, model: Any, options: MethodOptions, folder: Path) -> None:
        """Write the drafter as its `load` reads it, with the name of its target where its format has a place for that."""
        model.save(folder, **({"verifier": named_target(options.target)} if self.names_target else {}))

    def passes(self, options: MethodOptions) -> int:
        """Passes of the drafter for one draft: one for each level, unless it makes all levels at once."""
        return options.levels


class Unrolled(Method):
    """A method whose network makes one level after the other and has `unroll` and `unrolled`: it is trained at every level at once.

    A row of text ends `levels` before its last token, so that every level has a token to read and one to be compared with.
    """

    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """Every level reads what the one before it made, and the text's own token."""
        return model.unroll(tokens, taps[:, : tokens.shape[1] - levels], levels)

    def scored(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> HeadRows | None:
        """The rows of every level before the network's output matrix."""
        made = model.unrolled(tokens, taps[:, : tokens.shape[1] - levels], levels)
        return None if made is None else HeadRows(*made)


def named_target(target: Path | str) -> str:
    """What a drafter's folder calls its target: the absolute path of a folder, or the Hub name."""
    return str(Path(target).expanduser().resolve()) if Path(target).expanduser().exists() else str(target)


def chosen_taps(options: MethodOptions, target: Target) -> tuple[int, ...]:
    """The requested blocks, or those of EAGLE-3: 2, L / 2, L - 3. ConfigError for blocks that the target does not have."""
    middle = {2, target.layers // 2, target.layers - 3}
    taps = options.taps or tuple(sorted(t for t in middle if 0 < t <= target.layers))
    if any(not 0 <= t <= target.layers for t in taps):
        raise ConfigError(f"taps {taps} are not blocks of a target with {target.layers}")
    return taps

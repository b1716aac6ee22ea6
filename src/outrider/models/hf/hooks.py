"""Captures a Hugging Face model's hidden states, and runs the part of it after its last block.

Both are found by observing one call, not by the names of a family: the blocks are the module list with as many entries as
the model has layers, and the tail is everything that the blocks' owner calls after the last of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from outrider.errors import CapabilityError
from outrider.models.hf.direct import call_directly


def find_blocks(model: PreTrainedModel, layers: int, inputs: Tensor) -> tuple[nn.Module, nn.ModuleList] | None:
    """The list of decoder blocks and the module that holds it, or None. Of several lists of that length, such as the blocks that
    read pictures, the first that the tokens `inputs` [1, n] go through."""
    found = [
        (module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == layers
    ]
    if len(found) < 2:
        return found[0] if found else None
    ran: set[int] = set()
    with ExitStack() as hooks, torch.no_grad():
        for i, (_, blocks) in enumerate(found):
            hooks.callback(blocks[0].register_forward_hook(lambda *_, i=i: ran.add(i)).remove)
        model(input_ids=inputs)
    return next((pair for i, pair in enumerate(found) if i in ran), found[0])


class StopForward(Exception):
    """Ends a call whose rest is not needed; never reaches the user."""


def _state(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@dataclass(slots=True)
class RecordedStates:
    """Hidden states recorded during one or more calls, per tap."""

    layers: tuple[int, ...]
    parts: dict[int, list[Tensor]] = field(default_factory=dict)

    def hear(self, layer: int, state: Tensor) -> None:
        self.parts.setdefault(layer, []).append(state[0])

    def keep(self, count: int) -> None:
        """Keep only the last `count` rows of the newest call: those before were fed again."""
        for parts in self.parts.values():
            parts[-1] = parts[-1][len(parts[-1]) - count :]

    def states(self) -> tuple[Float[Tensor, "N H"], ...]:
        """One tensor per requested layer: the rows of all calls, in order."""
        return tuple(torch.cat(self.parts[i]) if len(self.parts[i]) > 1 else self.parts[i][0] for i in self.layers)


@dataclass(frozen=True, slots=True)
class HiddenStateHooks:
    """Hidden states after the blocks `layers` (0: what enters the first block), before any final norm."""

    blocks: nn.ModuleList | None
    layers: tuple[int, ...]

    @contextmanager
    def listen(self) -> Iterator[RecordedStates]:
        heard = RecordedStates(self.layers)
        if not self.layers:
            yield heard
            return
        if self.blocks is None:
            raise CapabilityError(
                "this model's blocks were not found, so it gives no hidden states: use a drafter that reads none"
            )
        with ExitStack() as hooks:
            for i in set(self.layers):
                hooks.callback(self._hook(heard, i).remove)
            yield heard

    @contextmanager
    def stop(self) -> Iterator[None]:
        """Context that raises `StopForward` in the model once the deepest of `layers` is computed; enter it after `listen`."""
        assert self.blocks is not None

        def enough(*_: Any) -> None:
            raise StopForward

        hook = self.blocks[max(self.layers) - 1].register_forward_hook(enough)
        try:
            yield
        finally:
            hook.remove()

    def _hook(self, heard: RecordedStates, layer: int) -> Any:
        assert self.blocks is not None
        if layer:
            return self.blocks[layer - 1].register_forward_hook(lambda m, args, out: heard.hear(layer, _state(out)))

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard.hear(0, next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()))

        return self.blocks[0].register_forward_pre_hook(entering, with_kwargs=True)


@dataclass
class _Decoded(ModelOutput):
    """A decoder's output for the head of any family: the last state. Everything else that a head passes on is None."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def steps_after(owner: nn.Module, blocks: nn.ModuleList) -> tuple[list[nn.Module], ExitStack]:
    """Observe a call: the returned list is filled with the children of `owner` that run after the last block."""
    steps: list[nn.Module] = []
    hooks = ExitStack()
    hooks.callback(blocks[-1].register_forward_hook(lambda *_: steps.clear()).remove)
    for child in owner.children():
        if child is not blocks:
            hooks.callback(child.register_forward_hook(lambda module, *_: steps.append(module)).remove)
    return steps, hooks


def head_only_model(model: PreTrainedModel, owner: nn.Module, steps: Sequence[nn.Module]) -> PreTrainedModel:
    """The model without its blocks: `inputs_embeds` of `owner` go through `steps` and then to the head.

    The same head, scaling and caps on logits, by the family's own code; all weights are shared with `model`.
    """

    def behind_the_blocks(input_ids: None = None, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Decoded:
        for step in steps:
            inputs_embeds = step(inputs_embeds)
        return _Decoded(last_hidden_state=inputs_embeds)

    part: nn.Module = copy.copy(owner)
    part.forward = behind_the_blocks
    path = next(name for name, module in model.named_modules() if module is owner).split(".")
    for depth in range(
        len(path) - 1, -1, -1
    ):  # shallow copies from the owner up to the model, so that the original is not changed
        outer = copy.copy(model.get_submodule(".".join(path[:depth])))
        outer._modules = {**outer._modules, path[depth]: part}
        part = outer
    call_directly(part)  # copies are not
    return cast(PreTrainedModel, part)

"""A second set of modules over the same weights: a user's model is read through it, and stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from outrider.errors import CapabilityError
from outrider.models.hf.state import brief

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class View:
    """model: the same class, configuration, hooks and weights as `given`, in modules of its own, which are frozen and in eval mode.

    The weights are the same memory: what an optimizer or `load_state_dict` writes into them is seen at once.
    """

    def __init__(self, given: PreTrainedModel) -> None:
        """Raises CapabilityError for a model whose modules cannot be copied."""
        memo: dict[int, Any] = {}
        for thing in _kept(given):
            memo[id(thing)] = thing
        pairs = [(own, _frozen(own)) for own in given.parameters()]
        memo.update((id(own), ours) for own, ours in pairs)
        try:
            self.model = copy.deepcopy(given, memo).eval()
        except Exception as error:  # whatever a module holds besides its weights: a lock, a file
            raise CapabilityError(
                f"{type(given).__name__} cannot be read without changing it ({brief(error)}): save it (save_pretrained) and give "
                "the folder"
            ) from error
        self._pairs = [(own, ours) for own, ours in pairs if own.device.type != "meta"]
        self._given = given  # held, so that its address is nobody else's: engines know it by that

    def weights(self) -> int:
        """A number that changes when weights are written to. Raises CapabilityError when they are elsewhere now."""
        total = 0
        for own, ours in self._pairs:
            if own.data_ptr() != ours.data_ptr():
                raise CapabilityError(
                    f"{type(self._given).__name__} was moved or converted after the engine was built on it: build the engine again"
                )
            total += 0 if own.is_inference() else own._version
        return total


def _frozen(own: nn.Parameter) -> nn.Parameter:
    """The same memory as a parameter without gradient; one of a class of its own (quantised) as it is."""
    plain = type(own) is nn.Parameter and type(own.data) is Tensor
    return nn.Parameter(own.detach(), requires_grad=False) if plain else own


def _kept(given: nn.Module) -> Iterator[Any]:
    """What both sets of modules share: tensors besides the parameters, and hooks, which may belong to an object of the user."""
    for module in given.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
        yield from (value for value in module._buffers.values() if value is not None)
        for name in _HOOKS:
            yield from getattr(module, name).values()

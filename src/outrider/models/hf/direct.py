"""Modules that are called without torch's bookkeeping: of a small model's step that is a tenth.

Calling a module of torch goes through two functions that look for hooks and compiled forwards, and every child and parameter is
found by a fallback of attribute lookup. In modules that nobody else has, both can be left out: what is computed is the same, to
the bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# torch only adds to these dictionaries, and takes out of them: hooks on all modules
_PRE, _POST = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
_BACK_PRE, _BACK = torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks


def call_directly(model: nn.Module) -> None:
    """Let a model's modules be called without torch's bookkeeping from now on, and find their children and parameters at once.

    Hooks are heard as before, those that are added later too. Classes with a `__call__` of their own keep it. A child or parameter
    may be replaced by an attribute, as usual; whoever does it in `_modules` or `_parameters` must call `look_up` first.
    """
    for module in model.modules():
        if type(module).__call__ is nn.Module.__call__:
            module.__class__ = _direct(type(module))
        found = {**module._modules, **module._parameters}
        vars(module).update({name: held for name, held in found.items() if held is not None})


def look_up(module: nn.Module) -> None:
    """Find this module's children and parameters where torch keeps them."""
    for name in (*module._modules, *module._parameters):
        vars(module).pop(name, None)


@cache
def _direct(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with a direct call; its name and its place are those of the class."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        heard = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if heard or _PRE or _POST or _BACK_PRE or _BACK or self._compiled_call_impl is not None:
            return kind.__call__(self, *args, **kwargs)
        return self.forward(*args, **kwargs)

    own = {
        "__call__": __call__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), own)

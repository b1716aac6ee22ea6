"""Modules that are called without torch's bookkeeping: of a small model's step that is a tenth.

Calling a module of torch goes through two functions that look for hooks and compiled forwards, and every child and parameter is
found by a fallback of attribute lookup. In modules that nobody else has, both can be left out: what is computed is the same, to
the bit.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# torch only adds to these dictionaries, and takes out of them: hooks on all modules
_PRE, _POST = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
_BACK_PRE, _BACK = torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks
_MARK = "_outrider_direct"


def call_directly(model: nn.Module) -> None:
    """Let a model's modules be called without torch's bookkeeping from now on, and find their children and parameters at once.

    Hooks are heard as before, those that are added later too. Classes with a `__call__` of their own keep it. A child or parameter
    may be replaced or taken away by an attribute, as usual; in `_modules` and `_parameters` it is not seen. Copies and pickles are
    of the classes themselves.
    """
    for module in model.modules():
        if not hasattr(type(module), _MARK):
            module.__class__ = _direct(type(module))
        found = {**module._modules, **module._parameters}
        vars(module).update({name: held for name, held in found.items() if held is not None})


def _is_part(module: nn.Module, name: str) -> bool:
    return name in module._modules or name in module._parameters


def _forget(module: nn.Module, name: str) -> None:
    """Where torch alone keeps it, None and nothing are found too."""
    if _is_part(module, name):
        vars(module).pop(name, None)


@cache
def _direct(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with a direct call, unless it has a call of its own; its name and its place are those of the class."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        heard = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if heard or _PRE or _POST or _BACK_PRE or _BACK or self._compiled_call_impl is not None:
            return kind.__call__(self, *args, **kwargs)
        return self.forward(*args, **kwargs)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        _forget(self, name)
        kind.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        _forget(self, name)
        kind.__delattr__(self, name)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        made, of, *rest = kind.__reduce_ex__(self, protocol)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: held for name, held in rest[0].items() if not _is_part(self, name)}
        # which only makes objects of the class that is asked
        if made is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = object.__new__
        return made, tuple(kind if part is type(self) else part for part in of), *rest

    own = {
        _MARK: True,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if kind.__call__ is nn.Module.__call__:
        own["__call__"] = __call__
    return type(kind.__name__, (kind,), own)

"""Old import addresses. Each works for one more release, with a warning that names the new one.

A row is (old address, new address): of a module, or of a name in one (then with a colon). For all others see `git log --follow`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "outrider.drafters.block": "outrider.drafters.dflash.network",
    "outrider.drafters.load": "outrider.drafters.registry",
    "outrider.drafters.shapes": "outrider.drafters.tree.shapes",
    "outrider.engine.build": "outrider.build",
    "outrider.engine.engine": "outrider.engine.core",
    "outrider.evaluate.stats": "outrider.evaluate.statistics.ratios",
    "outrider.evaluate.presets": "outrider.evaluate.bench.presets",
    "outrider.evaluate.chart": "outrider.evaluate.bench.chart",
    "outrider.sampling.law": "outrider.sampling.pipeline",
    "outrider.sampling.params": "outrider.params",
    "outrider.target": "outrider.models",
    "outrider.target.hf": "outrider.models.hf.target",
    "outrider.target.lean": "outrider.models.lean",
    "outrider.target.load": "outrider.models.load",
    "outrider.target.toy": "outrider.models.toy",
}
NAMES = {
    "outrider.engine.core:Engine": "outrider.build:Engine",
    "outrider.engine.core:Result": "outrider.engine.outputs:Result",
    "outrider.engine.core:Output": "outrider.engine.outputs:Output",
    "outrider.drafters:BlockDrafter": "outrider.drafters:DFlashDrafter",
    "outrider.drafters:Eagle": "outrider.drafters:EagleDrafter",
    "outrider.drafters:Medusa": "outrider.drafters:MedusaDrafter",
    "outrider.drafters:Prediction": "outrider.drafters:PredictedOutput",
    "outrider.drafters.dflash.network:BlockModel": "outrider.drafters.dflash.network:DFlashNetwork",
    "outrider.drafters.dflash.network:BlockConfig": "outrider.drafters.dflash.network:DFlashConfig",
    "outrider.drafters.tree.shapes:Shared": "outrider.drafters.tree.shapes:MergedDrafts",
    "outrider.sampling.pipeline:Law": "outrider.sampling.pipeline:LogitsPipeline",
}
"""Names that did not move with their module; used if the module's new address has no such name."""


def find(module: str, name: str) -> object:
    """The present object of `name`, which has left its module. Raises AttributeError if it never existed there, or is gone."""
    new = NAMES.get(f"{module}:{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, new_name = new.split(":")
    _warn(f"{module}.{name}", f"{home}.{new_name}", 4)
    return getattr(import_module(home), new_name)


def names_of(module: str) -> Callable[[str], object]:
    """A module's `__getattr__` for names that have left it."""
    return lambda name: find(module, name)


class _Alias(ModuleType):
    """A module at an old address: every name is looked up at the new one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        new = MODULES[self.__name__]
        module = import_module(new)
        return getattr(module, name) if hasattr(module, name) else find(new, name)


class _Finder(MetaPathFinder, Loader):
    """The last finder, for modules that no other finder has found."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=any(old.startswith(f"{fullname}.") for old in MODULES))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _warn(module.__name__, MODULES[module.__name__], 3)


def _warn(old: str, new: str, level: int) -> None:
    """level: frames up to the importing code."""
    warnings.warn(
        f"{old} is now {new}; the old address goes with the next release", DeprecationWarning, stacklevel=level
    )


def install() -> None:
    """Make the old addresses importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

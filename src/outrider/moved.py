"""Old import addresses. Each works for one more release, with a warning that names the new one.

A row is (old address, new address): of a module, or of a name in one (then with a colon). For all others see `git log --follow`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from outrider.deprecated import warn

MODULES = {
    "outrider.compiled": "outrider.nn.compiled",
    "outrider.control.forecast": "outrider.control.step_times",
    "outrider.control.load": "outrider.control.length_search",
    "outrider.control.reading": "outrider.control.prefill_cost",
    "outrider.control.rows": "outrider.control.row_times",
    "outrider.drafters.block": "outrider.drafters.dflash.network",
    "outrider.drafters.contained": "outrider.contained",
    "outrider.drafters.early_exit": "outrider.drafters.model.early_exit",
    "outrider.drafters.feature": "outrider.drafters.eagle.eagle3",
    "outrider.drafters.feature1": "outrider.drafters.eagle.eagle1",
    "outrider.drafters.gated": "outrider.drafters.combine",
    "outrider.drafters.heads": "outrider.drafters.medusa.network",
    "outrider.drafters.load": "outrider.drafters.registry",
    "outrider.drafters.shapes": "outrider.drafters.tree.shapes",
    "outrider.engine.build": "outrider.build",
    "outrider.engine.emission": "outrider.engine.emit",
    "outrider.engine.engine": "outrider.engine.core",
    "outrider.engine.guard": "outrider.engine.sanitize",
    "outrider.engine.notices": "outrider.notices",
    "outrider.engine.spelling": "outrider.serve.spelling",
    "outrider.evaluate.audit_greedy": "outrider.evaluate.audit.greedy",
    "outrider.evaluate.audit_laws": "outrider.evaluate.audit.alternatives",
    "outrider.evaluate.audit_sources": "outrider.evaluate.audit.sources",
    "outrider.evaluate.audit_verdict": "outrider.evaluate.audit.findings",
    "outrider.evaluate.audit_whitebox": "outrider.evaluate.audit.whitebox",
    "outrider.evaluate.chart": "outrider.evaluate.bench.chart",
    "outrider.evaluate.continuations": "outrider.evaluate.experiments.continuations",
    "outrider.evaluate.costs": "outrider.evaluate.scoring.costs",
    "outrider.evaluate.database": "outrider.evaluate.store.database",
    "outrider.evaluate.eprocess": "outrider.evaluate.statistics.eprocess",
    "outrider.evaluate.experiment": "outrider.evaluate.experiments.experiment",
    "outrider.evaluate.gate": "outrider.evaluate.bench.gate",
    "outrider.evaluate.importers": "outrider.evaluate.store.importers",
    "outrider.evaluate.lossless": "outrider.evaluate.scoring.divergence",
    "outrider.evaluate.online": "outrider.evaluate.experiments.assignment",
    "outrider.evaluate.plan": "outrider.evaluate.planning.plan",
    "outrider.evaluate.plan_check": "outrider.evaluate.planning.plan_check",
    "outrider.evaluate.predict": "outrider.evaluate.scoring.score",
    "outrider.evaluate.predict_report": "outrider.evaluate.planning.predict_report",
    "outrider.evaluate.presets": "outrider.evaluate.bench.presets",
    "outrider.evaluate.quality": "outrider.evaluate.scoring.quality",
    "outrider.evaluate.reduction": "outrider.evaluate.experiments.control_variates",
    "outrider.evaluate.report": "outrider.evaluate.bench.report",
    "outrider.evaluate.runlog": "outrider.evaluate.store.runlog",
    "outrider.evaluate.scale": "outrider.evaluate.bench.scale",
    "outrider.evaluate.sequential": "outrider.evaluate.statistics.sequential",
    "outrider.evaluate.spec_bench": "outrider.evaluate.bench.spec_bench",
    "outrider.evaluate.stats": "outrider.evaluate.statistics.ratios",
    "outrider.evaluate.tables": "outrider.evaluate.store.tables",
    "outrider.evaluate.tally": "outrider.evaluate.experiments.tally",
    "outrider.evaluate.tree": "outrider.evaluate.planning.tree",
    "outrider.evaluate.trial": "outrider.evaluate.experiments.live",
    "outrider.packed": "outrider.nn.linear",
    "outrider.sampling.law": "outrider.sampling.pipeline",
    "outrider.sampling.params": "outrider.params",
    "outrider.serve.guard": "outrider.serve.middleware",
    "outrider.serve.keeper": "outrider.serve.supervisor",
    "outrider.serve.openai": "outrider.serve.requests",
    "outrider.serve.run": "outrider.serve.server",
    "outrider.serve.trial": "outrider.serve.experiment",
    "outrider.serve.v1": "outrider.serve.routes",
    "outrider.serve.worker": "outrider.serve.engine_thread",
    "outrider.target": "outrider.models",
    "outrider.target.admit": "outrider.models.admit",
    "outrider.target.attention": "outrider.nn.attention",
    "outrider.target.checkpoint": "outrider.models.checkpoint",
    "outrider.target.config": "outrider.models.config",
    "outrider.target.decoder": "outrider.models.decoder",
    "outrider.target.folder": "outrider.models.folder",
    "outrider.target.fresh": "outrider.models.hf.fresh",
    "outrider.target.hf": "outrider.models.hf.target",
    "outrider.target.hf_cache": "outrider.models.hf.cache",
    "outrider.target.hf_choice": "outrider.models.hf.choice",
    "outrider.target.hf_prefix": "outrider.models.hf.prefix",
    "outrider.target.hf_probe": "outrider.models.hf.probe",
    "outrider.target.hf_seam": "outrider.models.hf.attention_interface",
    "outrider.target.hf_state": "outrider.models.hf.state",
    "outrider.target.hf_taps": "outrider.models.hf.hooks",
    "outrider.target.kv": "outrider.nn.kv",
    "outrider.target.lean": "outrider.models.lean",
    "outrider.target.load": "outrider.models.load",
    "outrider.target.memory": "outrider.nn.memory",
    "outrider.target.native": "outrider.models.native",
    "outrider.target.places": "outrider.models.places",
    "outrider.target.quantised": "outrider.models.quantised",
    "outrider.target.split": "outrider.nn.row_parts",
    "outrider.target.tokenizer": "outrider.models.tokenizer",
    "outrider.target.toy": "outrider.models.toy",
    "outrider.target.translate": "outrider.models.translate",
    "outrider.train.block": "outrider.train.methods.dflash",
    "outrider.train.drafter": "outrider.train.distill",
    "outrider.train.slots": "outrider.train.slot_losses",
    "outrider.verify.passes": "outrider.verify.native",
}
NAMES = {
    "outrider.types:PHASES": "outrider.records:PHASES",
    "outrider.types:Counts": "outrider.records:Counts",
    "outrider.types:StepRecord": "outrider.records:StepRecord",
    "outrider.evaluate.measure:ArmSummary": "outrider.evaluate.records:ArmSummary",
    "outrider.evaluate.measure:as_json": "outrider.evaluate.records:as_json",
    "outrider.evaluate.measure:latency": "outrider.evaluate.records:latency",
    "outrider.evaluate.measure:summarise": "outrider.evaluate.records:summarise",
    "outrider.train:CausalLM": "outrider.train.causal_lm:CausalLM",
    "outrider.engine.core:Engine": "outrider.build:Engine",
    "outrider.engine.core:Output": "outrider.engine.outputs:Output",
    "outrider.drafters:BlockDrafter": "outrider.drafters:DFlashDrafter",
    "outrider.drafters:Eagle": "outrider.drafters:EagleDrafter",
    "outrider.drafters:Medusa": "outrider.drafters:MedusaDrafter",
    "outrider.drafters:Prediction": "outrider.drafters:PredictedOutput",
    "outrider.drafters.dflash.network:BlockModel": "outrider.drafters.dflash.network:DFlashNetwork",
    "outrider.drafters.dflash.network:BlockConfig": "outrider.drafters.dflash.network:DFlashConfig",
    "outrider.drafters.tree.shapes:Shared": "outrider.drafters.tree.shapes:MergedDrafts",
    "outrider.sampling:Law": "outrider.sampling.pipeline:LogitsPipeline",
    "outrider.sampling.pipeline:Law": "outrider.sampling.pipeline:LogitsPipeline",
}
"""Names that did not move with their module; used if the module's new address has no such name."""


def find(module: str, name: str) -> object:
    """The present object of `name`, which has left its module. Raises AttributeError if it never existed there, or is gone."""
    new = NAMES.get(f"{module}:{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, new_name = new.split(":")
    warn(f"{module}.{name}", f"{home}.{new_name}", 4)
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


class _Finder:
    """The last finder, for modules that no other finder has found, and their loader. It inherits from neither: their module takes
    longer to import than all of this."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        loader: Any = self
        return ModuleSpec(fullname, loader, is_package=any(old.startswith(f"{fullname}.") for old in MODULES))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        warn(module.__name__, MODULES[module.__name__], 3)


def install() -> None:
    """Make the old addresses importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

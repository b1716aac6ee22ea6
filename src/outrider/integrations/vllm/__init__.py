"""Outrider inside vLLM, through vLLM's own plug-in points: drafters, draft lengths, the ledger, a lossy rule with its meter, a
repair.

`--speculative-config '{"method": "custom_class", "model": "outrider.integrations.vllm.Proposer", ...}'` drafts with our drafters,
`--scheduler-cls outrider.integrations.vllm.Scheduler` sets draft lengths, `--worker-cls outrider.integrations.vllm.CpuWorker` (or
`GpuWorker`) keeps the ledger. The entry points `outrider`, `outrider_ledger` and `outrider_http` are found by vLLM itself
(docs/vllm.md). vLLM is imported only when one of these names is used; the modules hold what we add, without it.
"""

from __future__ import annotations

import os
from typing import Any

PLUGINS = ("outrider", "outrider_ledger", "outrider_http")
"""Our entry points: what VLLM_PLUGINS must name, all of them, because it is one list for every group."""
NAMES = ("Proposer", "Scheduler", "SyncScheduler", "CpuWorker", "GpuWorker", "OutriderLlama")
_made: dict[str, type] = {}


def register() -> None:
    """vLLM's general plug-in, called in every process: repairs a known fault if a probe shows it, and registers our model class."""
    from outrider.integrations.vllm import repair, v2

    if repair.repair() and os.environ.get("OUTRIDER_VLLM_REPAIR_TOLD") != "1":
        os.environ["OUTRIDER_VLLM_REPAIR_TOLD"] = "1"  # child processes say it no more
        repair.logger.warning(
            "outrider repaired vLLM's CPU stand-in for `expand_kernel` (temperature, top-k and top-p of draft tokens): a probe on "
            "three numbers showed that it drops its result. Without the repair sampled speculative output is wrong"
        )
    v2.register()


def __getattr__(name: str) -> Any:
    """The classes that vLLM's options name, made when they are first asked for."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _made:
        from outrider.integrations.vllm import classes

        _made[name] = getattr(classes, name)()
        _made[name].__module__, _made[name].__qualname__ = __name__, name  # so that it can be named, and pickled
    return _made[name]

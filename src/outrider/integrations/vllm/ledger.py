"""vLLM's stat logger of ours: found by the entry point `outrider_ledger`, in the process that answers HTTP.

`OutriderLedger` is made when vLLM asks for it, because it derives from vLLM's class; `sums.StepSums` does the work.
"""

from __future__ import annotations

from typing import Any

from outrider.integrations.vllm.sums import StepSums, served_name

_made: list[type] = []


def __getattr__(name: str) -> Any:
    if name != "OutriderLedger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _made:
        _made.append(_make())
    return _made[0]


def _make() -> type:
    from vllm.v1.metrics.loggers import StatLoggerBase  # type: ignore[reportMissingImports]

    class OutriderLedger(StatLoggerBase):
        """Sums of one engine. The endpoint finds it among the loggers of the engine's client."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self.engine_index = engine_index
            self.sums = StepSums(served_name(vllm_config))

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            self.sums.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return OutriderLedger


def find(engine_client: Any) -> StepSums | None:
    """Our sums among the stat loggers of vLLM's engine client; None if the plug-in is not live there."""
    manager = getattr(engine_client, "logger_manager", None)
    pending = list(getattr(manager, "stat_loggers", ()) or ())
    while pending:
        one = pending.pop()
        if isinstance(sums := getattr(one, "sums", None), StepSums):
            return sums
        nested = getattr(one, "per_engine_stat_loggers", None) or (one if isinstance(one, list | dict) else ())
        pending += nested.values() if isinstance(nested, dict) else list(nested)
    return None

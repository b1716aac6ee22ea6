"""vLLM in this process on the shipped target, with our scheduler and worker if it speculates. Run by vLLM's own interpreter."""

from __future__ import annotations

import os
from typing import Any

from outrider.assets import shipped

SLOTS = 8
FOLDERS = {"eagle3": "eagle", "dflash": "dflash", "draft_model": "draft"}
"""Our shipped drafter of each of vLLM's methods."""


def speculative(method: str, length: int, **more: Any) -> dict[str, Any]:
    """A speculative configuration with our shipped drafter of this method, and a table of lengths for our scheduler."""
    folder = FOLDERS.get(method)
    model = str(shipped("target").parent / folder) if folder else "outrider.integrations.vllm.Proposer"
    table = {} if method == "custom_class" else {"num_speculative_tokens_per_batch_size": [[1, SLOTS, length]]}
    return {"method": method, "model": model, "num_speculative_tokens": length, **table, **more}


def started(config: dict[str, Any] | None) -> Any:
    """A `vllm.LLM` without processes of its own. config: speculative; None: plain vLLM."""
    # one GiB of keys and values: two of them may run side by side, and each would reserve most of the memory
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from vllm import LLM  # type: ignore[reportAttributeAccessIssue, reportMissingImports]

    ours: dict[str, Any] = {}
    if config is not None:
        ours = {
            "speculative_config": config,
            "scheduler_cls": "outrider.integrations.vllm.Scheduler",
            "worker_cls": "outrider.integrations.vllm.CpuWorker",
        }
    return LLM(
        model=str(shipped("target")),
        max_model_len=512,
        max_num_seqs=SLOTS,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **ours,
    )

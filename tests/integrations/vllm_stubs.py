"""Stand-ins for the objects that vLLM hands to our parts: plain namespaces with the fields that 0.32 and 0.33 have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def config(**outrider: Any) -> Any:
    """vLLM's configuration with 4 speculative tokens, 4 sequences and a context of 64 tokens."""
    return SimpleNamespace(
        additional_config={"outrider": outrider},
        speculative_config=SimpleNamespace(
            num_speculative_tokens=4,
            method="eagle3",
            model="eagle",
            rejection_sample_method="standard",
            num_speculative_tokens_per_batch_size=[(1, 4, 4)],
        ),
        model_config=SimpleNamespace(max_model_len=64, served_model_name="m", model="target"),
        scheduler_config=SimpleNamespace(
            max_num_seqs=4, max_num_batched_tokens=64, scheduler_cls="outrider.integrations.vllm.Scheduler"
        ),
        parallel_config=SimpleNamespace(worker_cls="outrider.integrations.vllm.CpuWorker"),
    )


class Batch:
    """The rows of vLLM's input batch: tokens of each row, in one table as vLLM has them."""

    def __init__(self, rows: int = 4, length: int = 64) -> None:
        self.table = np.full((rows, length), -9, dtype=np.int32)  # what another request may have left there
        self.count = np.zeros(rows, dtype=np.int64)

    def put(self, row: int, tokens: list[int]) -> None:
        self.table[row, : len(tokens)] = tokens
        self.count[row] = len(tokens)

    def arguments(self, sampled: list[list[int]]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        return sampled, self.count, self.table

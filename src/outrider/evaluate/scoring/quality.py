"""How likely emitted texts are under the target: the guard that a faster arm has not become a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from outrider.evaluate.records import Record
from outrider.evaluate.scoring.score import Clock, logits_along
from outrider.protocols import Target


@torch.inference_mode()
def text_nll(target: Target, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Negative log-likelihood of a continuation under the target at temperature 1, in nats: one teacher-forced pass."""
    if not output:
        return 0.0
    total, at = 0.0, 0
    for logits in logits_along(target, [*prompt, *output], len(prompt) - 1, Clock()):
        token = torch.tensor(list(output[at : at + len(logits)]), device=logits.device)
        total -= float(logits.double().log_softmax(-1).gather(1, token[:, None]).sum())
        at += len(logits)
    return total


def with_quality(target: Target, prompts: Sequence[Sequence[int]], record: Record) -> Record:
    """The record with the likelihood of its texts; they stand in the order of the prompts, or behind those that it has itself."""
    pairs = zip(record.asked or prompts, record.outputs, strict=True)
    return replace(record, nll=sum(text_nll(target, prompt, output) for prompt, output in pairs))

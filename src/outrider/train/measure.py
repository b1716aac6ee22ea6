"""Quality of a pair, measured on text: loss, bits per byte, and the probability that a draft token is accepted.

Everything is teacher-forced: both models read the same tokens, and at every position the two next-token distributions are
compared. That needs no speculative decoding, and it is exact, not sampled: ``sum_x min(p, q)`` is the probability that
a token drafted from ``q`` in that context is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from outrider.train import data, losses
from outrider.train.causal_lm import CausalLM

TEMPERATURES = (1.0, 0.7, 0.5)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance at one temperature over all positions. ``spread`` is its standard deviation from context to
    context: the larger, the more an adaptive draft length can gain over a fixed one."""

    temperature: float
    mean: float
    spread: float
    low_quarter: float
    high_quarter: float


def next_logits(model: CausalLM, windows: torch.Tensor, rows: int = 4) -> Iterator[tuple[torch.Tensor, ...]]:
    """(logits ``[r, L, V]``, next tokens ``[r, L]``) for ``windows [M, L + 1]``, ``rows`` at a time."""
    for part in windows.split(rows):
        with torch.no_grad():  # not around the yield: two interleaved generators would restore each other's mode
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        yield logits, part[:, 1:]


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """Nats per token over ``tokens`` tokens that spell ``size`` bytes -> bits per byte, free of the vocabulary."""
    return nats * tokens / size / math.log(2)


@dataclass(frozen=True, slots=True)
class PairComparison:
    """Two models on the same text: losses in nats per token, acceptance, and how often their most likely tokens agree."""

    target_nats: float
    draft_nats: float
    acceptance: list[Acceptance]
    greedy_agreement: float


def compare(
    target: CausalLM,
    draft: CausalLM,
    windows: torch.Tensor,
    temperatures: Sequence[float] = TEMPERATURES,
    skip: int = 0,
) -> PairComparison:
    """Measure a pair on ``windows [M, L + 1]`` in one pass; the first ``skip`` positions of each are context only.

    A temperature of t means both distributions are sharpened by 1/t before they are compared, as in decoding at t.
    """
    kept: list[list[torch.Tensor]] = [[] for _ in temperatures]
    agree, nats = [], []
    pairs = zip(next_logits(target, windows), next_logits(draft, windows), strict=True)
    for (p_logits, after), (q_logits, _) in pairs:
        p_logits, q_logits, after = p_logits[:, skip:], q_logits[:, skip:], after[:, skip:]
        nats.append([losses.cross_entropy(x, after).item() * after.numel() for x in (p_logits, q_logits)])
        agree.append((p_logits.argmax(-1) == q_logits.argmax(-1)).flatten())
        for number, temperature in enumerate(temperatures):
            kept[number].append(losses.acceptance(p_logits, q_logits, temperature).flatten())
    agreed = torch.cat(agree).double()
    target_nats, draft_nats = (sum(column) / len(agreed) for column in zip(*nats, strict=True))
    summaries = [summarise(t, torch.cat(k)) for t, k in zip(temperatures, kept, strict=True)]
    return PairComparison(target_nats, draft_nats, summaries, agreed.mean().item())


def summarise(temperature: float, kept: torch.Tensor) -> Acceptance:
    """Mean, standard deviation and quartiles of per-position acceptance ``[N]``."""
    low, high = torch.quantile(kept[: 2**23], torch.tensor([0.25, 0.75])).tolist()
    return Acceptance(temperature, kept.mean().item(), kept.std().item(), low, high)


def sample(model: CausalLM, prompts: torch.Tensor, new_tokens: int, temperature: float, seed: int) -> torch.Tensor:
    """Text ``[M, P + new_tokens]`` that the model writes after ``prompts [M, P]``, for acceptance in actual use. A temperature of 0
    is the most likely token."""
    torch.manual_seed(seed)
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        **how,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )


def text_report(pair: Mapping[str, CausalLM], tokenizer, windows: torch.Tensor) -> dict:
    """Loss and bits per byte of both models of ``pair``, and their acceptance, on ``windows [M, L + 1]``."""
    tokens = windows[:, 1:].numel()
    size = sum(len(tokenizer.decode(row).encode()) for row in windows[:, 1:])
    found = compare(pair["target"], pair["draft"], windows)
    losses_of = {"target": found.target_nats, "draft": found.draft_nats}
    return {
        "tokens": tokens,
        "bytes": size,
        **{n: {"nats_per_token": x, "bits_per_byte": bits_per_byte(x, tokens, size)} for n, x in losses_of.items()},
        "acceptance": [asdict(a) for a in found.acceptance],
        "greedy_agreement": found.greedy_agreement,
    }


def samples_report(pair: Mapping[str, CausalLM], prompts: torch.Tensor, new_tokens: int, seed: int) -> dict:
    """Acceptance on text that the target itself writes after ``prompts [M, P]``, at the temperature of the text."""
    kept = []
    for temperature in TEMPERATURES:
        text = sample(pair["target"], prompts, new_tokens, temperature, seed)
        own = compare(pair["target"], pair["draft"], text, (temperature,), skip=prompts.shape[1] - 1)
        kept += [asdict(a) for a in own.acceptance]
    return {"prompts": len(prompts), "new_tokens": new_tokens, "acceptance": kept}


def pair_report(
    pair: Mapping[str, CausalLM], tokenizer, texts: Mapping[str, np.ndarray], length: int, limit: int
) -> dict:
    """``text_report`` on at most ``limit`` windows of each stream, and ``samples_report`` after held-out prompts."""
    windows = {name: data.windows(stream, length, limit) for name, stream in texts.items()}
    report = {name: text_report(pair, tokenizer, w) for name, w in windows.items()}
    prompts = windows["held_out"][:: max(1, limit // 16), : length // 8]
    return report | {"own_samples": samples_report(pair, prompts, new_tokens=length // 4, seed=0)}

"""A small block drafter, text of its toy target, and a training of seconds."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.none import NoDraft
from outrider.drafters.target_tables import output_of
from outrider.engine.outputs import Result
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.train.distill import Teacher
from outrider.train.features import Features, hidden_of
from outrider.train.methods.dflash import (
    Blocks,
    block_loss,
    new_blocks,
)
from outrider.train.slot_losses import objective_named
from outrider.verify import load_rule

V, H, BLOCK, PROMPT, LENGTH = 19, 16, 4, 3, 40
TARGET = TinyLM(V, H, 3, seed=1, sharp=3.0, dtype=torch.float32)
STORED = (1, 2, 3)
READ = (1, 3)
JUDGE = Teacher.of(TARGET, STORED, READ)


@cache
def plain(count: int, temperature: float, first: int = 0) -> Tensor:
    """Rows [count, LENGTH] that the target wrote after PROMPT given tokens, with the prompts and seeds from `first` on."""
    one = Engine(
        TARGET, NoDraft(), load_rule("speculative_sampling"), Fixed(0), slots=64, max_length=LENGTH + 2, eos=()
    )
    seeds = range(first, first + count)
    params = [SamplingParams(temperature=temperature, max_tokens=LENGTH - PROMPT, seed=i) for i in seeds]
    return rows_of(one.generate(prompts(first + count)[first:], params))


def prompts(count: int) -> list[list[int]]:
    return [[1 + i % 7, (5 * i) % V, (i * i) % V] for i in range(count)]


def rows_of(results: list[Result]) -> Tensor:
    return torch.tensor([[*r.prompt, *r.outputs[0].token_ids] for r in results])


def features(tokens: Tensor, rows: int = 8) -> Features:
    hidden = hidden_of(TARGET, tokens, STORED)
    return Features(tokens.numpy().astype(np.uint16), hidden.numpy(), STORED, rows=rows)


@cache
def data() -> Features:
    return features(plain(64, 1.0))


def fresh(block: int = BLOCK) -> DFlashNetwork:
    config = DFlashConfig(H, READ, V, 2, 1, 8, 32, block, mask=0)
    _, hidden = data().take([0, 1])
    taps = hidden[:, :, list(JUDGE.taps)].flatten(0, 1)
    return new_blocks(config, TARGET, taps, output_of(TARGET), torch.ones(H))  # type: ignore[arg-type]


@cache
def trained(objective: str = "decay", steps: int = 150) -> DFlashNetwork:
    """Seconds of training: right often enough for drafts to be accepted, and wrong often enough."""
    model = fresh()
    blocks, loss = Blocks(data(), BLOCK, 8, PROMPT - 1), block_loss(JUDGE.taps, objective_named(objective, BLOCK))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        adam.zero_grad()
        loss(model, blocks(step), 0.0).backward()
        adam.step()
    return model.eval().requires_grad_(False)

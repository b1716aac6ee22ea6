"""EX-2: the rule as it runs (float32 laws, ragged batches, the engine's own noise) against the law of the same logits.

Chi-square of every emitted token given the tokens before it, against the float64 softmax of the float32 logits. Each of the
CONFIGS draws DRAWS tokens at a false-alarm probability of ALPHA; the least bias seen with probability 0.999 is a
total-variation distance of about 1% (64 cells; EX-2 in the reliability notes). 9 assertions of 1e-9: 1e-8 for the file.
The controls plant the two smallest mistakes known from real engines and must be rejected by the same statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from outrider.types import POINT_MASS, Draft, Proposal
from tests.law import subject

ALPHA = 1e-9
DRAWS = 450_000
BATCH = 4000
SUBJECT = subject.load()


@dataclass(frozen=True)
class Config:
    """A table of laws that differ at every depth and after every token, and how the drafter works."""

    name: str
    vocab: int
    length: int
    temperature: float = 1.0
    top_k: int = 0
    sharp: float = 1.5
    draft: str = "law"  # or "point": tokens drawn, no law declared; "mixed"; "support": a draft vocabulary
    declared_temperature: float | None = None  # what the declared draft law is computed with, if not `temperature`


CONFIGS = [
    Config("one", 8, 1),
    Config("three", 8, 3),
    Config("seven", 4, 7),
    Config("cold", 8, 3, temperature=0.3),
    Config("hot, top-k", 8, 3, temperature=1.5, top_k=5),
    Config("peaked, point masses", 8, 3, sharp=4.0, draft="point"),
    Config("mixed", 8, 3, temperature=0.7, draft="mixed"),
    Config("draft vocabulary", 8, 3, top_k=6, draft="support"),
]


def law(logits: np.ndarray, temperature: float, top_k: int, dtype) -> np.ndarray:
    """Temperature and top-k over the last axis, in `dtype`."""
    x = logits.astype(dtype) / dtype(temperature)
    if top_k:
        x = np.where(x < np.sort(x, -1)[..., -top_k, None], -np.inf, x)
    x = np.exp(x - x.max(-1, keepdims=True))
    return (x / x.sum(-1, keepdims=True)).astype(dtype)


class Table:
    """Target and draft logits [depth, previous token, V]."""

    def __init__(self, config: Config) -> None:
        rng = np.random.default_rng([31, len(config.name), config.vocab])
        shape = (config.length + 1, config.vocab, config.vocab)
        self.config = config
        self.target = (rng.normal(size=shape) * config.sharp).astype(np.float32)
        self.draft = (self.target + rng.normal(size=shape)).astype(np.float32)
        self.support = np.arange(config.vocab)
        if config.draft == "support":
            self.support = rng.permutation(config.vocab)[: config.vocab * 3 // 4]
        self.p = law(self.target, config.temperature, config.top_k, np.float32)
        self.exact = law(self.target, config.temperature, config.top_k, np.float64)
        self.drawn = law(self.draft[:, :, self.support], config.temperature, 0, np.float32)
        declared = config.declared_temperature or config.temperature
        self.declared = law(self.draft[:, :, self.support], declared, 0, np.float32)

    def step(self, rng: np.random.Generator, first_seed: int):
        """p, draft and noise of a batch of independent steps with ragged drafts; and the token each anchor is."""
        config, size = self.config, BATCH
        lengths = (
            rng.integers(0, config.length + 1, size=size) if config.draft == "mixed" else np.full(size, config.length)
        )
        before = rng.integers(config.vocab, size=size)
        tokens = np.zeros((size, config.length + 1), dtype=np.int64)
        tokens[:, 0] = before
        for d in range(config.length):
            cdf = self.drawn[d, tokens[:, d]].astype(np.float64).cumsum(-1)
            x = (cdf <= rng.random((size, 1)) * cdf[:, -1:]).sum(-1)
            tokens[:, d + 1] = self.support[x]
        anchors = self.p[0, before]
        deep = np.arange(config.length)[None, :] < lengths[:, None]
        where = np.nonzero(deep)
        nodes = self.p[where[1] + 1, tokens[where[0], where[1] + 1]]
        laws = self.declared[where[1], tokens[where[0], where[1]]]
        token = torch.from_numpy(tokens[where[0], where[1] + 1])
        parent = tuple(int(-1 if d == 0 else k - 1) for k, d in enumerate(where[1]))
        p = torch.from_numpy(np.concatenate([anchors, nodes]))
        row = np.arange(len(laws))
        if config.draft == "mixed":
            row[rng.random(len(row)) < 0.3] = POINT_MASS
        support = torch.from_numpy(self.support) if config.draft == "support" else None
        q = None if config.draft == "point" else Proposal(torch.from_numpy(laws), tuple(row.tolist()), support)
        noise = SUBJECT.noise(
            tuple(range(first_seed, first_seed + size)), tuple(rng.integers(5000, size=size).tolist())
        )
        return p, Draft(token, parent, tuple(lengths.tolist()), q), noise, before


def collect(rule, config: Config, draws: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts [depth, previous, token] of emitted tokens, and the exact law of each."""
    table, rng = Table(config), np.random.default_rng([32, seed])
    counts = np.zeros_like(table.exact)
    step = 0
    while counts.sum() < draws:
        p, draft, noise, before = table.step(rng, step * BATCH)
        verdict, step = rule(p, draft, noise), step + 1
        where = []
        for b, path in enumerate(verdict.path):
            last = int(before[b])
            for d, x in enumerate((*(draft.tokens[k] for k in path), verdict.next_token[b])):
                where.append((d, last, x))
                last = x
        np.add.at(counts, tuple(np.array(where).T), 1)
    return counts, table.exact


def statistic(counts: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Chi-square of the counts given their row sums, rare cells of a row pooled to 5 expected, and the bound at ALPHA."""
    total, degrees = 0.0, 0
    for seen, p in zip(counts.reshape(-1, counts.shape[-1]), exact.reshape(-1, counts.shape[-1]), strict=True):
        n = seen.sum()
        order = np.argsort(p * n)
        cells: list[np.ndarray] = []
        for cell in np.stack([p * n, seen], 1)[order]:
            if cells and cells[-1][0] < 5:
                cells[-1] = cells[-1] + cell
            else:
                cells.append(cell)
        if len(cells) > 1:
            total += sum((o - e) ** 2 / e for e, o in cells)
            degrees += len(cells) - 1
    return total, float(chi2.isf(ALPHA, degrees))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_emitted_tokens_have_the_targets_law(config):
    counts, exact = collect(SUBJECT.rule, config, DRAWS)
    value, bound = statistic(counts, exact)
    assert value < bound
    assert counts[exact == 0].sum() == 0, "a token without probability was emitted"


def test_control_law_declared_at_another_temperature():
    """Drawn at temperature 0.9, declared at 1: the smallest of the known contract violations is seen at this size."""
    config = replace(CONFIGS[1], temperature=0.9, declared_temperature=1.0)
    value, bound = statistic(*collect(SUBJECT.rule, config, DRAWS))
    assert value > bound


def test_control_residual_reuses_the_acceptance_coin():
    """The coin that refused a token also picks its replacement: acceptance stays right, the law does not."""

    def wrong(p, draft, noise):
        return SUBJECT.rule(p, draft, Reused(noise.seed, noise.position))

    value, bound = statistic(*collect(wrong, CONFIGS[1], 60_000))
    assert value > bound


class Reused(SUBJECT.noise):
    def uniform(self, b: int, depth: int, lane: str, index: int = 0) -> float:
        return SUBJECT.noise.uniform(self, b, depth, "accept", index)


def test_control_statistic_holds_for_plain_sampling():
    """The statistic itself on perfect draws: it does not reject them."""
    counts, exact = collect(SUBJECT.rule, replace(CONFIGS[1], length=0), 40_000)
    value, bound = statistic(counts, exact)
    assert value < bound

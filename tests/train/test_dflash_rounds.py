"""Block drafters: the trainer's rounds and its acceptance are the engine's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.params import SamplingParams
from outrider.train.distill import measure_of
from outrider.train.features import hidden_of
from outrider.train.walk import most_likely, sampled, walk
from outrider.verify import load_rule
from tests.train.dflash import (
    BLOCK,
    JUDGE,
    LENGTH,
    PROMPT,
    READ,
    STORED,
    TARGET,
    V,
    features,
    fresh,
    plain,
    prompts,
    rows_of,
    trained,
)


def engine_runs(
    model: DFlashNetwork, count: int, temperature: float, sample: str
) -> tuple[Tensor, list[list[int]], Engine]:
    """Rows the engine wrote with this drafter, and the accepted tokens of each of its rounds that lie within LENGTH."""
    growth = Levels(levels((1,) * (BLOCK - 1)), V, sample=sample)  # type: ignore[arg-type]
    one = Engine(
        TARGET, DFlashDrafter(model, growth), load_rule("speculative_sampling"), Fixed(BLOCK - 1), slots=64,
        max_length=LENGTH + 2 * BLOCK, eos=(),
    )  # fmt: skip
    more = LENGTH - PROMPT + BLOCK  # so that no round within LENGTH is cut short
    params = [SamplingParams(temperature=temperature, max_tokens=more, seed=i) for i in range(count)]
    names = [one.submit(p, q) for p, q in zip(prompts(count), params, strict=True)]
    emitted: dict[str, list[list[int]]] = {n: [] for n in names}
    while one.scheduler.running or one.scheduler.waiting:
        for event in one.step():
            emitted[event.request].append(list(event.tokens))
    rows, runs = [], []
    for prompt, name in zip(prompts(count), names, strict=True):
        rows.append([*prompt, *(t for part in emitted[name] for t in part)])
        at, mine = PROMPT, []
        for part in emitted[name][1:]:  # the first token comes of the prompt alone
            if at + BLOCK > LENGTH:
                break
            mine.append(len(part) - 1)
            at += len(part)
        runs.append(mine)
    return torch.tensor(rows)[:, :LENGTH], runs, one


def test_the_trainers_rounds_are_the_engines() -> None:
    """Train-serve parity without any noise: at temperature 0 the walk over finished text makes the engine's rounds, one by one.

    In double precision, where serving multiplies by the very weights that were trained.
    """
    model = copy.deepcopy(trained()).double()
    rows, runs, one = engine_runs(model, 40, 0.0, "greedy")
    assert torch.equal(rows, plain(40, 0.0)), "a drafter never changes the text"
    hidden = hidden_of(TARGET, rows, READ)
    assert walk(model, rows, hidden.double(), PROMPT, most_likely) == runs
    accepted = [a for row in runs for a in row]
    assert {0, BLOCK - 1} <= set(accepted), "rounds of every kind"
    assert one.counts.rejected > 20


@pytest.mark.parametrize("sample", [pytest.param("sampled", marks=pytest.mark.slow), "greedy"])
def test_the_trainers_acceptance_is_the_engines(sample: str) -> None:
    """Train-serve parity at temperature 1, in distribution: mean accepted tokens of a round, sampled proposals and most likely
    ones.

    The walk reads what the target wrote without any drafter; the engine wrote with this one. Bound: 6 standard errors of the
    difference of two means over rows (rows are independent; false alarms below 1e-8). Control: a drafter that was not
    trained is told apart.
    """
    model, count = trained(), 150
    _, runs, _ = engine_runs(model, count, 1.0, sample)
    rows = plain(count, 1.0, first=count)  # other seeds, so that the two are independent
    hidden = hidden_of(TARGET, rows, STORED)
    log_p = torch.zeros(rows.shape)
    distributions = torch.log_softmax(JUDGE.distributions(hidden), -1)
    log_p[:, 1:] = distributions[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    uniform = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3))
    accepts = sampled(log_p, uniform) if sample == "sampled" else most_likely

    def mean(found: list[list[int]]) -> tuple[float, float]:
        """Accepted tokens per round, and its standard error: a ratio of sums, linearised row by row."""
        a, n = (np.array([f(r) for r in found], dtype=float) for f in (sum, len))
        ratio = a.sum() / n.sum()
        return ratio, float(np.sqrt(((a - ratio * n) ** 2).sum()) / n.sum())

    def gap(m: DFlashNetwork) -> float:
        (x, dx), (y, dy) = mean(walk(m, rows, hidden[:, :, list(JUDGE.taps)], PROMPT, accepts)), mean(runs)
        return abs(x - y) / (dx**2 + dy**2) ** 0.5

    assert gap(model) < 6
    assert gap(fresh()) > 6


def test_the_judges_acceptance_is_the_ledgers() -> None:
    """The acceptance of slot 1 over all positions is one minus the mean risk of the first judged node, within 6 standard errors."""
    model, growth = trained(), Levels(levels((1,)), V)
    one = Engine(
        TARGET,
        DFlashDrafter(model, growth),
        load_rule("speculative_sampling"),
        Fixed(1),
        slots=64,
        max_length=64,
        eos=(),
    )
    n = 150
    params = [SamplingParams(max_tokens=LENGTH - PROMPT, seed=i) for i in range(n)]
    rows = rows_of(one.generate(prompts(n), params))
    risk = one.counts.risk / one.counts.judged
    two = predictor_of_size(model, 2)
    measured = measure_of(JUDGE, two, features(rows), rows=n)(model)["accept_1"]
    assert abs((1 - risk) - measured) < 6 * (0.25 / one.counts.judged) ** 0.5


def predictor_of_size(model: DFlashNetwork, size: int):
    """Blocks of `size` slots at every position, as a draft of size - 1 tokens makes them."""

    def predict(m: DFlashNetwork, tokens: Tensor, taps: Tensor) -> list[Tensor]:
        anchors = torch.arange(1, tokens.shape[1] - size + 1).expand(len(tokens), -1)
        logits = m.blocks(m.inject(taps), tokens.gather(1, anchors), anchors, slots=size)
        return [logits[:, :, d] for d in range(size - 1)]

    return predict

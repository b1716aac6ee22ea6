"""Block drafters in training: anchors, labels and loss, resumption, and the trainer's acceptance against the engine's."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.none import NoDraft
from outrider.drafters.target_tables import output_of
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.engine.outputs import Result
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.train.distill import Teacher, measure_of
from outrider.train.features import Features, hidden_of
from outrider.train.loop import LoopConfig, train
from outrider.train.methods.dflash import (
    Blocks,
    DFlash,
    block_distillation_loss,
    block_loss,
    labels_of,
    new_blocks,
    packed,
)
from outrider.train.slot_losses import ARMS, Objective, distillation_loss, objective_named, slot_loss
from outrider.train.walk import most_likely, sampled, walk
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


# ------------------------------------------------------------------------------------------------------------ anchors
def test_anchors() -> None:
    """Distinct, ascending, within reach of their labels, behind the given text; the same for every objective; all are used."""
    blocks = Blocks(data(), BLOCK, 10, PROMPT - 1)
    seen = set()
    for step in range(60):
        found = blocks.anchors(step, 8, LENGTH)
        assert found.shape == (8, 10)
        assert bool((np.diff(found, axis=1) > 0).all())
        assert found.min() >= PROMPT - 1
        assert found.max() + BLOCK - 1 <= LENGTH - 1
        seen |= set(found.ravel().tolist())
    assert seen == set(range(PROMPT - 1, LENGTH - BLOCK + 1))
    assert np.array_equal(blocks.anchors(7, 8, LENGTH), blocks.anchors(7, 8, LENGTH))
    assert not np.array_equal(blocks.anchors(7, 8, LENGTH), blocks.anchors(8, 8, LENGTH))
    assert Blocks(data(), BLOCK, 1000, 0).anchors(0, 1, 9).tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ConfigError, match="no room"):
        blocks.anchors(0, 1, BLOCK)


def test_labels_are_the_tokens_behind_the_anchor() -> None:
    tokens = torch.arange(20)[None] * 3 % V
    found = labels_of(tokens, torch.tensor([[1, 5, 16]]), BLOCK)
    assert found.tolist() == [[[int(tokens[0, a + k]) for k in (1, 2, 3)] for a in (1, 5, 16)]]


# --------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("name", list(ARMS))
def test_the_loss_is_that_of_the_blocks_one_by_one(name: str) -> None:
    """Packed and gathered against logits and labels put together by hand, in value and in every gradient."""
    model, how = fresh(), objective_named(name, BLOCK)
    tokens, hidden, anchors = Blocks(data(), BLOCK, 5, PROMPT - 1)(3)

    def by_hand() -> Tensor:
        logits, labels = [], []
        for r in range(len(tokens)):
            for a in anchors[r].tolist():
                keys = model.inject(hidden[r : r + 1, :a, list(JUDGE.taps)])
                logits.append(model.blocks(keys, tokens[r : r + 1, a : a + 1], torch.tensor([[a]]))[0, 0])
                labels.append(tokens[r, a + 1 : a + BLOCK])
        y = torch.stack(labels)
        return slot_loss(torch.stack(logits), y, torch.ones_like(y, dtype=torch.bool), how)

    gradients = []
    for loss in (block_loss(JUDGE.taps, how)(model, (tokens, hidden, anchors), 0.0), by_hand()):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["loss"] = loss.detach()
    for n, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][n], rtol=1e-3, atol=1e-6)
    assert "lm_head.weight" not in gradients[0], "the target's tables are frozen"
    assert "embed_tokens.weight" not in gradients[0]


def test_distributions_stand_at_their_slots() -> None:
    """The loss against distributions is least for a drafter that knows them: with its own logits for a target's it is the
    entropy."""
    model, how = fresh(), objective_named("uniform", BLOCK)
    batch = Blocks(data(), BLOCK, 5, PROMPT - 1)(0)
    tokens, hidden, anchors = batch
    distributions = JUDGE.distributions(hidden)
    want = torch.stack([distributions[r, a : a + BLOCK - 1] for r in range(len(tokens)) for a in anchors[r].tolist()])
    _, logits = packed(model, batch, JUDGE.taps)
    every = torch.ones(want.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(
        block_distillation_loss(JUDGE.taps, JUDGE.last, TARGET, how)(model, batch, 0.0),
        distillation_loss(logits, want, every, how),
    )
    for name, (entropy, overlap) in (("staged", (0.1, 1.0)), ("kl", (1.0, 0.0)), ("log_acceptance", (0.0, 1.0))):
        late = block_distillation_loss(JUDGE.taps, JUDGE.last, TARGET, how, name)(model, batch, 0.9)
        torch.testing.assert_close(late, distillation_loss(logits, want, every, how, entropy=entropy, overlap=overlap))
    entropy = -(torch.softmax(want, -1) * torch.log_softmax(want, -1)).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(want, want, every, how), entropy)


def test_constants_follow_the_size_of_the_block() -> None:
    """gamma of Whalen et al. and DFlash at their sizes; the chain's weight is the same per drafted slot."""
    assert objective_named("decay", 16) == Objective(gamma=10.0)
    assert objective_named("chain", 16) == Objective(gamma=10.0, focal=0.3, chain=40.0)
    assert objective_named("chain", 8).chain == pytest.approx(ARMS["chain"].chain, rel=0.01)
    assert objective_named("chain", 4) == Objective(gamma=2.5, focal=0.3, chain=8.0)
    assert objective_named("uniform", 4) == Objective()
    assert objective_named("dpace", 4) == Objective(pace=0.5)
    with pytest.raises(ConfigError, match="chain"):
        objective_named("chian", 8)


# ----------------------------------------------------------------------------------------------------------- training
class StopsHere(Exception):
    """Stands for a kill: raised from the report of a step."""


def fit(folder: Path, steps: int = 9, stop_at: tuple[int, ...] = ()) -> dict[str, Tensor]:
    model = fresh()
    config = LoopConfig(steps=steps, lr=1e-2, warmup=2, save_every_s=0.0, log_every=1)
    measure = measure_of(JUDGE, DFlash().predictor(BLOCK - 1), data(), rows=4)

    def report(line: str) -> None:
        if any(line.startswith(f"step {n}/") for n in stop_at):
            raise StopsHere

    train(
        model,
        Blocks(data(), BLOCK, 6, 2),
        block_loss(JUDGE.taps, objective_named("chain", BLOCK)),
        config,
        folder,
        measure,
        report,
    )
    return model.state_dict()


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    want = fit(tmp_path / "whole")
    for n in (2, 3, 7):
        with pytest.raises(StopsHere):
            fit(tmp_path / "parts", stop_at=(n,))
    found = fit(tmp_path / "parts")
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_training_raises_acceptance_and_leaves_the_tables_alone() -> None:
    before, after = fresh(), trained()
    measured = [measure_of(JUDGE, DFlash().predictor(BLOCK - 1), data())(m) for m in (before, after)]
    assert measured[1]["tokens"] > measured[0]["tokens"] + 0.1
    assert set(measured[1]) == {f"{n}_{d}" for n in ("accept", "same") for d in (1, 2, 3)} | {"tokens", "greedy"}
    assert torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_columns_of_the_prediction_stand_where_the_judge_looks() -> None:
    """Entry d, column i is slot d + 1 of the block at anchor i + 1, one at a time."""
    model = trained()
    tokens, hidden = data().take([0, 3])
    taps = hidden[:, :, list(JUDGE.taps)]
    found = DFlash().predict(model, tokens, taps, BLOCK - 1)
    for i in (0, 5, LENGTH - BLOCK - 1):
        keys = model.inject(taps[:, : i + 1])
        one = model.blocks(keys, tokens[:, i + 1 : i + 2], torch.full((2, 1), i + 1))
        for d in range(BLOCK - 1):
            torch.testing.assert_close(found[d][:, i], one[:, 0, d], rtol=1e-4, atol=1e-4)
    assert found[0].shape[1] == LENGTH - BLOCK


# ---------------------------------------------------------------------------------------------- trainer and engine
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

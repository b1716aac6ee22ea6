"""Block drafters in training: anchors, labels and loss, resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.train.distill import measure_of
from outrider.train.loop import LoopConfig, train
from outrider.train.methods.dflash import (
    Blocks,
    DFlash,
    block_distillation_loss,
    block_loss,
    labels_of,
    packed,
)
from outrider.train.slot_losses import ARMS, Objective, distillation_loss, objective_named, slot_loss
from tests.train.dflash import (
    BLOCK,
    JUDGE,
    LENGTH,
    PROMPT,
    TARGET,
    V,
    data,
    fresh,
    trained,
)


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

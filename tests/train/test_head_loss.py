"""Losses straight from the rows before the head, and attention of levels: equal to their plain twins, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from outrider.nn.level_attention import attend, plain
from outrider.train import losses
from outrider.train.distill import loss_of
from outrider.train.head_loss import TILE, head_distillation
from outrider.train.methods.registry import METHODS
from tests.train.killable import setup

ROWS, LENGTH, WIDE, VOCAB, LEVELS = 3, TILE + 9, 6, 23, 3
SHARES = (0.5, 0.3, 0.2)
WEIGHTS = [(0.0, 1.0), (1.0, 0.1), (1.0, 0.0), (0.3, 0.7)]


def rows(seed: int = 0, kind: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The target's logits, a matrix, and states of three levels of which the last is shorter, as Medusa's are."""
    torch.manual_seed(seed)
    wanted, matrix = 2 * torch.randn(ROWS, LENGTH, VOCAB), torch.randn(VOCAB, WIDE, dtype=kind)
    states = [torch.randn(ROWS, LENGTH - LEVELS - d // 2, WIDE, dtype=kind) for d in range(LEVELS)]
    return wanted, matrix.requires_grad_(), [s.requires_grad_() for s in states]


def twin(wanted: torch.Tensor, matrix: torch.Tensor, states: list[torch.Tensor], tv: float, kl: float) -> torch.Tensor:
    """The sum over levels of `losses.distillation` of logits."""
    at = [wanted[:, d + 1 : d + 1 + s.shape[1]] for d, s in enumerate(states)]
    pairs = zip(SHARES, at, states, strict=True)
    return torch.stack([share * losses.distillation(p, s @ matrix.T, tv, kl) for share, p, s in pairs]).sum()


@pytest.mark.parametrize(("tv", "kl"), WEIGHTS)
def test_the_loss_and_its_gradients_are_those_of_the_logits(tv: float, kl: float) -> None:
    wanted, matrix, states = rows()
    ours = head_distillation(lambda part: wanted[part], states, matrix, SHARES, tv, kl)
    theirs = twin(wanted, matrix, states, tv, kl)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    found, expected = (torch.autograd.grad(3 * loss, [matrix, *states]) for loss in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_false_column_is_seen() -> None:
    """The control: labels that are one position off give another loss, by far more than the tolerance above."""
    wanted, matrix, states = rows()
    off = head_distillation(lambda part: wanted[part].roll(1, 1), states, matrix, SHARES, 0.0, 1.0)
    assert abs(off - twin(wanted, matrix, states, 0.0, 1.0)).item() > 1e-3


@pytest.mark.parametrize("learns", ["matrix", "states", "neither"])
def test_what_needs_no_gradient_gets_none(learns: str) -> None:
    wanted, matrix, states = rows()
    matrix.requires_grad_(learns == "matrix")
    states = [s.requires_grad_(learns == "states") for s in states]
    loss = head_distillation(lambda part: wanted[part], states, matrix, SHARES, 0.0, 1.0)
    assert loss.requires_grad == (learns != "neither")
    torch.testing.assert_close(loss, twin(wanted, matrix, states, 0.0, 1.0))
    if loss.requires_grad:
        loss.backward()
        assert (matrix.grad is not None) == (learns == "matrix")
        assert all((s.grad is not None) == (learns == "states") for s in states)


def test_under_autocast_products_alone_are_rounded() -> None:
    """To bfloat16's 8 bits, in value and direction of the gradients."""
    wanted, matrix, states = rows(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head_distillation(lambda part: wanted[part], states, matrix, SHARES, 0.0, 1.0)
    theirs = twin(wanted, matrix, states, 0.0, 1.0)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=0.02)
    assert ours.item() != theirs.item()
    found, expected = (torch.autograd.grad(loss, [matrix, *states]) for loss in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle", "mtp", "draft"])
def test_every_methods_loss_is_that_of_its_predictions(kind: str, loss: str) -> None:
    """With the rows before the head and without, at both stages: value and every parameter's gradient."""
    model, judge, data = setup(kind)
    levels, method = 1 if kind == "draft" else 3, METHODS[kind]
    scored, batch = partial(method.scored, levels=levels), data(0)
    assert scored(model, batch[0], batch[1][:, :, list(judge.taps)]) is not None
    for progress in (0.1, 0.9):
        found = gradients(model, loss_of(judge, method.predictor(levels), loss, scored), batch, progress)
        expected = gradients(model, loss_of(judge, method.predictor(levels), loss), batch, progress)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def gradients(model: Any, loss: Callable, batch: tuple, progress: float) -> list[torch.Tensor]:
    """The loss, and its gradient by every parameter that has one."""
    model.zero_grad()
    value = loss(model, batch, progress)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_part_of_the_vocabulary_goes_by_logits() -> None:
    model, judge, data = setup("eagle")
    model.support = torch.arange(model.config.vocab_size)
    batch = data(0)
    assert METHODS["eagle"].scored(model, batch[0], batch[1][:, :, list(judge.taps)], 3) is None


# ------------------------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_attention_of_levels_is_that_of_the_operators(levels: int) -> None:
    torch.manual_seed(levels)
    q, *pairs = (torch.randn(2, 7, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(1 + 2 * levels))
    keys, values = pairs[:levels], pairs[levels:]
    ours, theirs = (f(q, keys, values, 0.3) for f in (attend, plain))
    torch.testing.assert_close(ours, theirs)
    wanted = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(x, [q, *pairs], wanted) for x in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        other = [k.flip(1) for k in keys]
        torch.testing.assert_close(attend(q, other, values, 0.3), plain(q, other, values, 0.3))


def test_attention_of_rounded_inputs_keeps_their_type() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 4).bfloat16().requires_grad_() for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(q, [k], [v], 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), plain(q.double(), [k.double()], [v.double()], 0.3), atol=0.01, rtol=0.01)
    found.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in (q, k, v))

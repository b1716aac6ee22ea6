"""Losses against the formulas written out by hand, and their gradients against finite differences."""

import pytest
import torch

from outrider.train import losses


def laws(seed: int, shape=(2, 3, 7)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(2)]


def by_hand(target: torch.Tensor, draft: torch.Tensor, kl_weight: float, tv_weight: float) -> float:
    """KL and TV as plain Python sums over the vocabulary."""
    total = 0.0
    rows = list(zip(target.flatten(0, -2).double(), draft.flatten(0, -2).double(), strict=True))
    for a, b in rows:
        p, q = (a.exp() / a.exp().sum()).tolist(), (b.exp() / b.exp().sum()).tolist()
        kl = sum(x * float(torch.log(torch.tensor(x / y, dtype=torch.float64))) for x, y in zip(p, q, strict=True))
        tv = 0.5 * sum(abs(x - y) for x, y in zip(p, q, strict=True))
        total += kl_weight * kl + tv_weight * tv
    return total / len(rows)


@pytest.mark.parametrize(("kl", "tv"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_distillation_is_the_written_formula(kl, tv):
    target, draft = laws(0)
    assert losses.distillation(target, draft, tv, kl).item() == pytest.approx(by_hand(target, draft, kl, tv), abs=1e-6)


def test_the_terms_alone_agree_with_the_combined_loss():
    target, draft = laws(1)
    torch.testing.assert_close(losses.kl_divergence(target, draft), losses.distillation(target, draft, 0.0, 1.0))
    torch.testing.assert_close(losses.total_variation(target, draft), losses.distillation(target, draft, 1.0, 0.0))


def test_kl_gradient_is_q_minus_p():
    target, draft = laws(2, (1, 1, 5))
    draft.requires_grad_()
    losses.kl_divergence(target, draft).backward()
    torch.testing.assert_close(draft.grad, draft.detach().softmax(-1) - target.softmax(-1))


@pytest.mark.parametrize(("kl", "tv"), [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_gradient_against_finite_differences(kl, tv):
    target, draft = laws(3, (2, 5))
    draft.requires_grad_()
    losses.distillation(target, draft, tv, kl).backward()
    step = 1e-4
    for index in [(0, 0), (1, 3)]:
        moved = []
        for sign in (1, -1):
            shifted = draft.detach().clone()
            shifted[index] += sign * step
            moved.append(by_hand(target, shifted, kl, tv))
        assert draft.grad[index].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-3)


def test_cross_entropy_is_the_mean_negative_log_probability():
    logits, _ = laws(4)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(losses.cross_entropy(logits, tokens), expected)


def test_acceptance_of_equal_laws_is_one_and_of_disjoint_ones_zero():
    target, _ = laws(5)
    assert losses.acceptance(target, target, 0.7).allclose(torch.ones(2, 3))
    apart = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert losses.acceptance(apart[:1], apart[1:]).item() == pytest.approx(0.0, abs=1e-6)


def test_pinsker_holds():
    target, draft = laws(6)
    assert losses.total_variation(target, draft) <= (losses.kl_divergence(target, draft) / 2).sqrt()

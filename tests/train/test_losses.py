"""Losses against the formulas written out by hand, and their gradients against finite differences."""

import math

import pytest
import torch

from outrider.train import losses


def distributions_of(seed: int, shape=(2, 3, 7)):
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
    target, draft = distributions_of(0)
    assert losses.distillation(target, draft, tv, kl).item() == pytest.approx(by_hand(target, draft, kl, tv), abs=1e-6)


def test_the_terms_alone_agree_with_the_combined_loss():
    target, draft = distributions_of(1)
    torch.testing.assert_close(losses.kl_divergence(target, draft), losses.distillation(target, draft, 0.0, 1.0))
    torch.testing.assert_close(losses.total_variation(target, draft), losses.distillation(target, draft, 1.0, 0.0))


def test_kl_gradient_is_q_minus_p():
    target, draft = distributions_of(2, (1, 1, 5))
    draft.requires_grad_()
    losses.kl_divergence(target, draft).backward()
    torch.testing.assert_close(draft.grad, draft.detach().softmax(-1) - target.softmax(-1))


@pytest.mark.parametrize(("kl", "tv"), [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_gradient_against_finite_differences(kl, tv):
    target, draft = distributions_of(3, (2, 5))
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
    logits, _ = distributions_of(4)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(losses.cross_entropy(logits, tokens), expected)


def test_acceptance_of_equal_distributions_is_one_and_of_disjoint_ones_zero():
    target, _ = distributions_of(5)
    assert losses.acceptance(target, target, 0.7).allclose(torch.ones(2, 3))
    apart = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert losses.acceptance(apart[:1], apart[1:]).item() == pytest.approx(0.0, abs=1e-6)


def test_pinsker_holds():
    target, draft = distributions_of(6)
    assert losses.total_variation(target, draft) <= (losses.kl_divergence(target, draft) / 2).sqrt()


# ------------------------------------------------------------------------------------- what fixes vanishing gradients
def apart(by: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions that hardly overlap."""
    return torch.tensor([[by, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, by]], requires_grad=True)


def test_the_hybrid_is_the_written_formula():
    target, draft = distributions_of(7)
    terms = []
    for a, b in zip(target.flatten(0, -2), draft.flatten(0, -2), strict=True):
        kl, tv = by_hand(a[None], b[None], 1.0, 0.0), by_hand(a[None], b[None], 0.0, 1.0)
        weight = math.exp(-3.0 * (1.0 - tv))
        terms.append(weight * kl + (1.0 - weight) * tv)
    assert losses.hybrid(target, draft).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_where_distributions_hardly_overlap_tv_has_no_gradient_and_the_hybrid_has():
    found = {}
    for name, loss in (("tv", losses.total_variation), ("hybrid", losses.hybrid), ("log", losses.log_acceptance)):
        target, draft = apart(12.0)
        loss(target, draft).backward()
        found[name] = float(draft.grad.abs().max())
    assert found["tv"] < 1e-3
    assert found["hybrid"] > 0.5
    assert found["log"] > 0.1


def test_the_hybrids_weight_is_a_constant_for_the_gradient():
    target, draft = distributions_of(8, (1, 5))
    draft.requires_grad_()
    losses.hybrid(target, draft).backward()
    weight = math.exp(-3.0 * float(losses.acceptance(target, draft.detach())))
    again = draft.detach().clone().requires_grad_()
    losses.distillation(target, again, 1.0 - weight, weight).backward()
    torch.testing.assert_close(draft.grad, again.grad)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_by_its_name_falls_when_it_is_followed(name):
    target, draft = distributions_of(9, (2, 4, 7))
    draft = draft.clone().requires_grad_()
    tokens = target.argmax(-1)[:, :-1]
    values = []
    for _ in range(30):
        loss = losses.distillation_loss(name, target, draft, tokens, 0.9)
        values.append(loss.item())
        (slope,) = torch.autograd.grad(loss, draft)
        with torch.no_grad():
            draft -= 2.0 * slope
    assert values[-1] < values[0]


def test_staged_is_kl_and_then_mostly_tv():
    target, draft = distributions_of(10)
    none = torch.zeros(2, 2, dtype=torch.long)
    early, late = (losses.distillation_loss("staged", target, draft, none, x) for x in (0.1, 0.9))
    torch.testing.assert_close(early, losses.kl_divergence(target, draft))
    torch.testing.assert_close(late, losses.distillation(target, draft, 1.0, 0.1))

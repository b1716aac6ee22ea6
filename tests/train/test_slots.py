"""Slot weights against autograd of the formulas as they are written (to 1e-6), and the identities between objectives."""

from __future__ import annotations

import math

import pytest
import torch

from outrider.errors import ConfigError
from outrider.train.slot_losses import (
    ARMS,
    Objective,
    closed,
    distillation_loss,
    first_error,
    slot_loss,
    suffix_of_products,
    value,
)
from outrider.train.slot_losses import weights as weights_of

N, S, V = 6, 7, 5


def case(seed: int, slots: int = S) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels (often the most likely token), and valid slots with gaps."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, slots, V, generator=g, dtype=torch.float64)
    labels = torch.where(
        torch.rand(N, slots, generator=g) < 0.6, logits.argmax(-1), torch.randint(V, (N, slots), generator=g)
    )
    mask = torch.rand(N, slots, generator=g) < 0.85
    mask[:, 0] = True
    return logits, labels, mask


def by_hand(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, how: Objective) -> torch.Tensor:
    """Equations 7 to 13 with loops, block by block."""
    log_q = torch.log_softmax(logits, -1)
    slots = logits.shape[1]
    ce, norm, fe, fe_norm, reward = 0.0, 0.0, 0.0, 0.0, 0.0
    for n in range(N):
        log_p, done = torch.zeros((), dtype=torch.float64), False
        for k in range(slots):
            if not bool(mask[n, k]):
                break
            w, term = math.exp(-k / how.gamma), -log_q[n, k, labels[n, k]]
            ce, norm = ce + w * term, norm + w
            if not done and int(logits[n, k].argmax()) != int(labels[n, k]):
                fe, fe_norm, done = fe + w * term, fe_norm + w, True
            log_p = log_p - term
            reward = reward + torch.exp(log_p) / slots / N
    total = ce / (norm if how.reduction == "mean" else N)
    return total + (how.focal * fe / fe_norm if fe_norm else 0.0) - how.chain * reward


def gradient(f, logits: torch.Tensor) -> torch.Tensor:
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("slots", [1, S])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("gamma", "focal", "chain"), [(math.inf, 0, 0), (3.0, 0, 0), (3.0, 0.3, 0), (3.0, 0.3, 9.0), (math.inf, 0, 4)]
)
def test_weights_have_the_gradient_of_the_formulas(gamma, focal, chain, reduction, slots) -> None:
    how = Objective(gamma, focal, chain, reduction=reduction)
    for seed in range(5):
        logits, labels, mask = case(seed, slots)
        want = gradient(lambda x: by_hand(x, labels, mask, how), logits)  # noqa: B023
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        correct = logits.argmax(-1) == labels
        c = weights_of(nll, correct, mask, how)

        def weighted(x: torch.Tensor) -> torch.Tensor:
            return (c * torch.nn.functional.cross_entropy(x.transpose(1, 2), labels, reduction="none")).sum()  # noqa: B023

        torch.testing.assert_close(gradient(weighted, logits), want, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            value(nll, correct, mask, how), by_hand(logits, labels, mask, how), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            gradient(lambda x: slot_loss(x, labels, mask, how), logits),  # noqa: B023
            want,
            rtol=0,
            atol=1e-5,
        )


def test_pace_without_smoothing_is_the_chain_reward() -> None:
    """(S * grad R) = D-PACE's gradient at a = 0, and a = 1 is the linear decay S - j."""
    logits, labels, mask = case(3)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = logits.argmax(-1) == labels
    chain = weights_of(nll, correct, mask, Objective(chain=1.0)) - weights_of(nll, correct, mask, Objective())
    torch.testing.assert_close(S * chain, weights_of(nll, correct, mask, Objective(pace=0.0)))
    full = torch.ones(N, S, dtype=torch.bool)
    linear = suffix_of_products(torch.exp(-nll), full, 1.0)
    torch.testing.assert_close(linear, torch.arange(S, 0, -1, dtype=torch.float64).expand(N, S))


def test_blocks_without_errors_have_no_focal_weight() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    correct = torch.tensor([[True] * 4, [True, False, True, False]])
    assert first_error(correct, mask).tolist() == [[False] * 4, [False, True, False, False]]
    nll = torch.ones(2, 4, dtype=torch.float64)
    extra = weights_of(nll, correct, mask, Objective(focal=0.5)) - weights_of(nll, correct, mask, Objective())
    assert extra.nonzero().tolist() == [[1, 1]]


def test_a_block_ends_at_its_first_gap() -> None:
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    assert closed(mask).tolist() == [[True, True, False, False], [True] * 4]
    nll = torch.ones(2, 4, dtype=torch.float64)
    for how in ARMS.values():
        c = weights_of(nll, torch.zeros(2, 4, dtype=torch.bool), mask, how)
        assert c[0, 2:].tolist() == [0.0, 0.0]
        assert bool((c >= 0).all())


def test_until_error_keeps_the_first_error_and_nothing_behind_it() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    c = weights_of(torch.ones(1, 4), torch.tensor([[True, False, True, True]]), mask, Objective(until_error=True))
    assert c.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_objectives_that_make_no_sense_are_refused() -> None:
    for wrong in ({"gamma": 0.0}, {"pace": 1.5}, {"pace": 0.5, "chain": 1.0}, {"reduction": "median"}, {"focal": -1.0}):
        with pytest.raises(ConfigError):
            Objective(**wrong)


@pytest.mark.parametrize("name", list(ARMS))
def test_against_distributions_is_against_tokens_in_the_mean(name: str) -> None:
    """For a distribution that is one token both losses have the same gradient; without weights that look, it is the mean over
    tokens."""
    logits, labels, mask = case(7)
    how = ARMS[name]
    sure = torch.full_like(logits, -1e4).scatter_(-1, labels[..., None], 0.0)
    torch.testing.assert_close(
        gradient(lambda x: distillation_loss(x, sure, mask, how), logits),
        gradient(lambda x: slot_loss(x, labels, mask, how), logits),
        rtol=1e-4,
        atol=1e-6,
    )
    wanted = torch.randn(N, S, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.softmax(wanted, -1)
    decay = ARMS["decay"]
    mean = sum(
        gradient(
            lambda x, t=t: (
                weights_of(-p[..., t].log(), mask, mask, decay) * p[..., t] * -torch.log_softmax(x, -1)[..., t]
            ).sum(),
            logits,
        )
        for t in range(V)
    )
    torch.testing.assert_close(
        gradient(lambda x: distillation_loss(x, wanted, mask, decay), logits), mean, rtol=1e-4, atol=1e-6
    )


def test_against_overlaps_the_chain_reward_is_the_accepted_length() -> None:
    """With -log a, a = sum min(p, q), the gradient is that of mean(-log a) minus the accepted tokens of a sampled draft."""
    logits, _, mask = case(8)
    wanted = 2 * torch.randn(N, S, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    valid, p = closed(mask).double(), torch.softmax(wanted, -1)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        a = torch.minimum(p, torch.softmax(x, -1)).sum(-1)
        accepted = (torch.where(closed(mask), a, 1.0).cumprod(1) * valid).sum(1).mean()
        return (-a.log() * valid).sum() / valid.sum() - 3.0 * accepted

    how = Objective(chain=3.0 * S)
    found = gradient(lambda x: distillation_loss(x, wanted, mask, how, entropy=0.0, overlap=1.0), logits)
    torch.testing.assert_close(found, gradient(by_hand, logits), rtol=1e-4, atol=1e-6)
    both = gradient(lambda x: distillation_loss(x, wanted, mask, how, entropy=0.5, overlap=1.0), logits)
    entropy = gradient(lambda x: distillation_loss(x, wanted, mask, how), logits)
    torch.testing.assert_close(both, found + 0.5 * entropy, rtol=1e-4, atol=1e-6)

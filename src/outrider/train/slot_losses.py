"""One loss for all objectives on blocks of slots: detached weights on the same negative log-likelihood.

A block drafter predicts slots k = 1 .. S of a block at once; the leading run of correct ones is accepted. With
l_k = -log q_k(x_k) and p_k = exp(-l_k), every objective below has a gradient of the form sum_k c_k * grad l_k with weights c
that are constants for the gradient:

    uniform, decay  c_k = w_k,  w_k = exp(-(k - 1) / gamma)                     (Whalen et al. 2026, eqs. 7-9)
    first error     + focal * w_k at k = k*, the first wrong slot of a block    (eqs. 10-11)
    chain reward    - chain * R,  R = 1/S sum_k prod_{j<=k} p_j                 (eqs. 12-13): dR/dlog p_k = 1/S sum_{j>=k} prod p
    D-PACE          c_j = sum_{m>=j} prod_{i<=m} ((1 - a) p_i + a)              (arXiv 2605.18810)
    until error     c_k = 1 for k <= k*                                         (AUF, arXiv 2607.01893)

D-PACE with a = 0 is S times the gradient of R, and with a = 1 a linear decay: one function, `suffix_of_products`, is both.
Shapes: N blocks, S slots. A block ends at its first invalid slot: products do not jump over gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from outrider.errors import ConfigError, unknown_name

EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Objective:
    """gamma: of the decay, infinity for none. focal, chain: weights of the other terms. pace: D-PACE's a, instead of all others.

    until_error: only slots up to the first error count. reduction: whether the first term is divided by the sum of its
    weights ("mean") or by the number of blocks ("sum"); the other terms are means over blocks either way.
    """

    gamma: float = math.inf
    focal: float = 0.0
    chain: float = 0.0
    pace: float | None = None
    until_error: bool = False
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not self.gamma > 0 or self.focal < 0 or self.chain < 0:
            raise ConfigError("an objective needs gamma > 0 and focal, chain >= 0")
        if self.pace is not None and not 0 <= self.pace <= 1:
            raise ConfigError(f"pace must lie in [0, 1], got {self.pace}")
        if self.reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction is 'mean' or 'sum', got {self.reduction!r}")
        alone = self.pace is not None or self.until_error
        if alone and (
            self.gamma != math.inf or self.focal or self.chain or (self.pace is not None and self.until_error)
        ):
            raise ConfigError("pace and until_error stand alone: leave gamma, focal and chain out")


ARMS = {
    "uniform": Objective(),
    "decay": Objective(gamma=5.0),
    "focal": Objective(gamma=5.0, focal=0.3),
    "chain": Objective(gamma=5.0, focal=0.3, chain=18.7),
    "dpace": Objective(pace=0.5),
    "until_error": Objective(until_error=True),
}
"""The arms of the comparison, with the constants for 7 drafted slots; see `objective_named`."""
GAMMAS = {16: 10.0, 10: 5.0, 8: 5.0, 4: 2.5}
"""Decays for blocks of so many slots; between them 0.6 of the slots."""
CHAIN_PER_SLOT = 40 / 15
"""Weight of the chain reward per draft slot: 40 for the 15 slots of Whalen et al., the same per expected token for others."""


def objective_named(name: str, block: int) -> Objective:
    """The objective `name` of ARMS for blocks of `block` slots, including the anchor's."""
    if name not in ARMS:
        raise ConfigError(unknown_name("objective", name, ARMS))
    how = ARMS[name]
    gamma = GAMMAS.get(block, 0.6 * block) if how.gamma != math.inf else math.inf
    return replace(how, gamma=gamma, chain=CHAIN_PER_SLOT * (block - 1) if how.chain else 0.0)


def closed(mask: Bool[Tensor, "N S"]) -> Bool[Tensor, "N S"]:
    """The leading valid slots of every block."""
    return mask.int().cumprod(1).bool()


def first_error(correct: Bool[Tensor, "N S"], mask: Bool[Tensor, "N S"]) -> Bool[Tensor, "N S"]:
    """True at the first wrong slot of a block, and nowhere in a block without errors."""
    wrong = ~correct & mask
    return wrong & (wrong.int().cumsum(1) == 1)


def suffix_of_products(p: Float[Tensor, "N S"], mask: Bool[Tensor, "N S"], smooth: float = 0.0) -> Float[Tensor, "N S"]:
    """sum_{m>=j} prod_{i<=m} ((1 - smooth) p_i + smooth) over valid slots."""
    products = torch.where(mask, (1 - smooth) * p + smooth, torch.ones_like(p)).cumprod(1) * mask
    return products.flip(1).cumsum(1).flip(1)


@torch.no_grad()
def weights(
    nll: Float[Tensor, "N S"], correct: Bool[Tensor, "N S"], mask: Bool[Tensor, "N S"], how: Objective
) -> Float[Tensor, "N S"]:
    """The weights c of every slot, so that sum(c * nll) has the gradient of the objective.

    nll: of the labels. correct: whether the most likely token is the label. mask: slots that have a label.
    """
    mask = closed(mask)
    m, blocks = mask.to(nll.dtype), mask[:, 0].sum().clamp(min=1)
    if how.pace is not None:
        return suffix_of_products(torch.exp(-nll), mask, how.pace) * m / blocks
    slot = torch.arange(nll.shape[1], device=nll.device, dtype=nll.dtype)
    w = torch.exp(-slot / how.gamma) * m
    error = first_error(correct, mask)
    if how.until_error:
        behind = error.int().cumsum(1) - error.int()
        w = w * (behind == 0)
    c = w / (w.sum().clamp(min=EPS) if how.reduction == "mean" else blocks)
    if how.focal:
        c = c + how.focal * w * error / ((w * error).sum() + EPS)
    if how.chain:
        c = c + how.chain * suffix_of_products(torch.exp(-nll), mask) / (nll.shape[1] * blocks) * m
    return c


def slot_loss(logits: Float[Tensor, "N S V"], labels: Tensor, mask: Bool[Tensor, "N S"], how: Objective) -> Tensor:
    """A scalar with the gradient of the objective; `value` is the objective itself."""
    flat = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    nll = flat.view(labels.shape)
    c = weights(nll.detach(), logits.argmax(-1) == labels, mask, how)
    return (c * nll).sum()


def distillation_loss(
    logits: Float[Tensor, "N S V"],
    wanted: Float[Tensor, "N S V"],
    mask: Bool[Tensor, "N S"],
    how: Objective,
    *,
    entropy: float = 1.0,
    overlap: float = 0.0,
) -> Tensor:
    """The same against distributions instead of tokens. wanted: the logits of the target's distribution of every slot.

    In the weights the probability of a label becomes a = sum min(p, q), the probability that a sampled draft token is accepted; a
    slot is wrong when the two disagree on the most likely token. A slot's loss is `entropy` times the
    cross-entropy of p and q (tokens are draws from p, so that is training on tokens with less noise) and `overlap` times
    -log a: then the chain reward has the gradient of the accepted tokens of a sampled draft, mean_k prod_{j<=k} a_j, itself.
    """
    p, log_q = torch.softmax(wanted.float(), -1), torch.log_softmax(logits.float(), -1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and overlap > 0):
        refused = -torch.minimum(p, log_q.exp()).sum(-1).clamp(EPS, 1.0).log()
    c = weights(refused.detach(), logits.argmax(-1) == wanted.argmax(-1), mask, how)
    loss = overlap * (c * refused).sum() if overlap else log_q.new_zeros(())
    return loss - entropy * (c * (p * log_q).sum(-1)).sum()


def value(nll: Float[Tensor, "N S"], correct: Bool[Tensor, "N S"], mask: Bool[Tensor, "N S"], how: Objective) -> Tensor:
    """The value of the objective (for logs and tests); for D-PACE, which has none, its weighted sum."""
    mask = closed(mask)
    if how.pace is not None or how.until_error:
        return (weights(nll.detach(), correct, mask, how) * nll).sum()
    m, blocks = mask.to(nll.dtype), mask[:, 0].sum().clamp(min=1)
    w = torch.exp(-torch.arange(nll.shape[1], device=nll.device, dtype=nll.dtype) / how.gamma) * m
    total = (w * nll).sum() / (w.sum().clamp(min=EPS) if how.reduction == "mean" else blocks)
    e = w * first_error(correct, mask)
    total = total + how.focal * (e * nll).sum() / (e.sum() + EPS)
    reward = (torch.exp(-(nll * m).cumsum(1)) * m).sum() / (nll.shape[1] * blocks)
    return total - how.chain * reward
